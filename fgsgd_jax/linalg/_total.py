"""Sums along rows and columns that are as fast as what they are sums of."""

import functools
import math
import operator

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._products import MATRICES_LAST, Layout

# So many slices are added up in one loop over their entries; of 16 and more XLA on CPU makes several.
_SLICES = 8


def total(x: Array, axes: tuple[int, ...], parts: int = 1, layout: Layout = MATRICES_LAST) -> Array:
    """Sums along `axes`, which stay, with length 1; rounded less if the rows are added up in so many parts."""
    # Sums of slices, which XLA on CPU computes together with what they are sums of, and then products, since it takes
    # up to thirty times as long to add up what it computes along these axes.
    rows, _ = layout.axes
    if axes != (rows,):
        x = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1], 1)
    height = x.shape[rows] // _SLICES
    if height < 2:
        return functools.reduce(operator.add, jnp.split(x, max(x.shape[rows], 1), axis=rows))
    slices = [lax.slice_in_dim(x, i * height, (i + 1) * height, axis=rows) for i in range(_SLICES)]
    result = sum_of_rows(functools.reduce(operator.add, slices), parts, layout)
    if _SLICES * height < x.shape[rows]:
        result += sum_of_rows(lax.slice_in_dim(x, _SLICES * height, None, axis=rows), parts, layout)
    return result


def sum_of_rows(x: Array, parts: int = 1, layout: Layout = MATRICES_LAST) -> Array:
    """The total over the rows by a product alone."""
    batch, (n, p) = x.shape[:-2], (x.shape[axis] for axis in layout.axes)
    if p > 1:
        # As many rows of ones as matrices: for one, XLA on CPU would transpose x.
        shape = list(x.shape)
        for axis, size in zip(layout.axes, (parts, n), strict=True):
            shape[axis] = size
        row, column = (lax.broadcasted_iota(jnp.int32, shape, x.ndim + axis) for axis in layout.axes)
        ones = (column // -(-n // parts) == row).astype(x.dtype)
        return functools.reduce(operator.add, jnp.split(layout.matmul(ones, x), parts, axis=layout.axes[0]))
    # Of a product of one row and one column, XLA on CPU makes the slow sum again.
    columns = max(parts, 2 if math.prod(batch) == 1 else 1)
    row, column = (lax.broadcasted_iota(jnp.int32, (n, columns), axis) for axis in range(2))
    ones = (row // -(-n // parts) == column).astype(x.dtype)
    sums = jnp.split(MATRICES_LAST.matmul(x.reshape(*batch, n), ones), columns, axis=-1)
    return functools.reduce(operator.add, sums)[..., None]
