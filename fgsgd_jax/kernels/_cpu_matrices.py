"""CPU: larger matrices, by the manifolds' own methods, a few at a time so that they stay in the cache.

On the Stiefel manifold wide matrices are nowhere transposed, and no sum runs along rows that are far apart in memory:
XLA on CPU makes a copy of the first, and takes longer for the second than for a product. Narrow matrices are handled as
wide ones: XLA on CPU leaves loops along a short last axis scalar.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from ..linalg import Products, identity, matmul, or_fallback, polar_iteration, transpose
from ..manifolds import Manifold, Stiefel
from . import _reference
from ._cpu_lengths import row_totals, total
from ._layers import (
    Layer,
    Layers,
    Operation,
    Results,
    by_chunks,
    by_polar,
    fusion_barrier,
    is_wide,
    jitted,
    joined,
    one_by_one,
    split,
    times,
)

# So many numbers of each array of a step stay in a core's L2 cache. Below the second figure all of them are taken at
# once.
_NUMBERS, _FEW_NUMBERS = 2**17, 2**20
# Up to so many multiplications layers are joined, so that a program does not grow with each; beyond, copies cost more.
_MULTIPLICATIONS = 16**3
# Tall matrices of fewer columns are narrow: 64 matrices of 64×16 take 0.86 of the time when they are transposed, of
# 64×32 as long.
_NARROW = 32


def serves(manifolds: tuple[Manifold, ...], n: int, p: int, count: int) -> bool:
    """Whether this form serves `count` n×p matrices on these manifolds."""
    return (_is_large(n, p) and any(by_polar(manifold) for manifold in manifolds)) or _by_few(n, p, count)


def _is_large(n: int, p: int) -> bool:
    return n * p * min(n, p) > _MULTIPLICATIONS


@jitted
def run(operation: Operation, layers: Sequence[Layers], factor: Float[Array, ""]) -> Results:
    """See `_reference.run`."""
    # `Mixture` sets the radii.
    own = tuple(_Stiefel() if by_polar(manifold) else manifold for manifold in operation.manifolds)
    operation = operation._replace(manifolds=own)
    if _is_large(*layers[0].x[0].shape[-2:]):
        return one_by_one(lambda layer: _by_chunks(operation, layer, factor), layers)
    # A fused concatenation would find out for every entry which part it comes from.
    layer = joined(layers, lambda parts: fusion_barrier(lambda *parts: jnp.concatenate(parts), *parts))
    results, figures = _by_chunks(operation, layer, factor)
    return split(results, figures, layers)


# Lowered once for all layers of a shape.
@functools.partial(jax.jit, static_argnums=0)
def _by_chunks(operation: Operation, layer: Layer, factor: Float[Array, ""]) -> tuple[Array, Array]:
    of_layer = functools.partial(_reference.of_layer, operation, factor=factor)
    n, p = layer.x.shape[-2:]
    if not _by_few(n, p, layer.radius.size):
        # With axes of length 1 XLA on CPU computes what it multiplies twice: with them, and without.
        grid = tuple(length for length in layer.radius.shape if length != 1)
        short = jax.tree.map(lambda a: a.reshape(grid + a.shape[layer.radius.ndim :]), layer)
        results, figures = of_layer(short)
        return results.reshape(layer.x.shape), figures.reshape(layer.radius.shape)
    flat = joined([Layers((layer.x,), (layer.w,), *layer[2:])])
    results, figures = by_chunks(of_layer, flat, _size(*flat.x.shape), axis=0)
    return results.reshape(layer.x.shape), figures.reshape(layer.radius.shape)


def _by_few(n: int, p: int, count: int) -> bool:
    """Whether to take a few at a time."""
    return count * n * p > _FEW_NUMBERS and _size(count, n, p) < count


def _size(count: int, n: int, p: int) -> int:
    """The matrices of a chunk: as many as fit the cache and divide all."""
    # Even one by one, 1,021 matrices of 64×64 take half the time of all at once.
    most = max(1, _NUMBERS // (n * p))
    return next(size for size in range(most, 0, -1) if count % size == 0)


@dataclasses.dataclass(frozen=True)
class _Stiefel(Stiefel):
    """The same manifold by other means."""

    def _project(self, x, g):
        if _is_narrow(x):
            return transpose(self._project(_transposed(x), transpose(g)))
        products = matmul(x, transpose(g)) if is_wide(x) else matmul(_transposed(x), g)
        # Read along the columns, what is added would take three times as long.
        return g - times(x, (products + _transposed(products)) / 2)

    def _retract(self, x, v):
        if _is_narrow(x):
            return transpose(self._retract(_transposed(x), transpose(v)))
        return or_fallback(*polar_iteration(x + v, products=Products(_deviation, times)), x)


def _deviation(y: Float[Array, "*b n p"]) -> Float[Array, "*b q q"]:
    """See `linalg.deviation`."""
    if is_wide(y):
        products = matmul(y, transpose(y))
        squares = row_totals(jnp.square(y) - 1 / y.shape[-1])
    else:
        products = matmul(_transposed(y), y)
        squares = total(jnp.square(y) - 1 / y.shape[-2], whole=False)
    return jnp.where(identity(products) > 0, squares, products)


def _is_narrow(x: Array) -> bool:
    n, p = x.shape[-2:]
    # Of 25×20 matrices the transposition takes longer than it gains.
    return p < _NARROW and n >= 2 * p


def _transposed(x: Array) -> Array:
    """The transposed matrices, copied: XLA on CPU takes longer for a product that reads along columns."""
    return with_layout_constraint(transpose(x), Layout(tuple(range(x.ndim))))
