"""Floating-point numbers: in which dtype to compute, and a maximum that no NaN escapes."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def compute_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype to compute in with arrays of these dtypes: the widest, at least float32.

    Raises:
      ValueError: for integers.
    """
    return max([jnp.finfo(dtype).dtype for dtype in (jnp.float32, *dtypes)], key=lambda dtype: dtype.itemsize)


def largest(
    x: Float[Array, "..."], axis: int | Sequence[int] | None = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Maximum over `axis` of entries that are not negative, 0 of none; NaN counts as infinite.

    `jnp.max` is no substitute: jaxlib 0.10 on CPU loses a NaN among a few thousand numbers, and can return -inf for
    them. A guard or a figure of feasibility that is built on it would pass a weight that is not a number.
    """
    axis = tuple(axis) if isinstance(axis, Sequence) else axis
    return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, x), axis=axis, keepdims=keepdims, initial=0.0)
