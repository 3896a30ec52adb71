"""Euclidean norm without overflow, underflow or a NaN gradient."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._floats import largest


def norm(x: Float[Array, "..."], axis: int | Sequence[int], keepdims: bool = False) -> Float[Array, "..."]:
    """Euclidean norm over `axis`, exact to round-off for entries of any magnitude.

    The entries are scaled by the largest, so that `1e30` does not overflow nor `1e-30` vanish in float32.
    The derivative at zero is 0 instead of NaN.
    """
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    top = lax.stop_gradient(largest(jnp.abs(x), axes, keepdims=True))
    # The reciprocal of a denormal overflows, so below `tiny` entries are left as they are.
    scale = jnp.where((top > jnp.finfo(x.dtype).tiny) & jnp.isfinite(top), top, 1)
    squares = jnp.sum(jnp.square(x / scale), axis=axes, keepdims=True)
    length = jnp.where(squares == 0, 0, scale * jnp.sqrt(jnp.where(squares == 0, 1, squares)))
    return length if keepdims else jnp.squeeze(length, axis=axes)


def squared_norm(x: Float[Array, "*batch n p"]) -> Float[Array, "*batch"]:
    """Sum of the squared entries of each matrix. It overflows where the sum does."""
    return jnp.sum(jnp.square(x), axis=(-2, -1))
