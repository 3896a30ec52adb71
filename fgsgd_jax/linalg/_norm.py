"""Euclidean norm without overflow, underflow or a NaN gradient."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._largest import largest
from ._products import MATRICES_LAST, layout_for


def norm(x: Float[Array, "..."], axis: int | Sequence[int], keepdims: bool = False) -> Float[Array, "..."]:
    """Euclidean norm over `axis`, exact to round-off for entries of any magnitude.

    The entries are scaled by the largest, so that `1e30` does not overflow nor `1e-30` vanish in float32.
    The derivative at zero is 0 instead of NaN.
    """
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if axes == (-2, -1) and (layout := layout_for(x.shape)) is not MATRICES_LAST:
        x = layout.take(x)
        length = layout.give_values(_norm(x, layout.sum, layout.max))[..., None, None]
    else:
        length = _norm(
            x,
            lambda x: jnp.sum(x, axis=axes, keepdims=True),
            lambda x: largest(x, axes, keepdims=True),
        )
    return length if keepdims else jnp.squeeze(length, axis=axes)


def _norm(x, total, maximum):
    top = lax.stop_gradient(maximum(jnp.abs(x)))
    # The reciprocal of a denormal overflows, so below `tiny` entries are left as they are.
    scale = jnp.where((top > jnp.finfo(x.dtype).tiny) & jnp.isfinite(top), top, 1)
    squares = total(jnp.square(x / scale))
    return jnp.where(squares == 0, 0, scale * jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def squared_norm(x: Float[Array, "*batch n p"]) -> Float[Array, "*batch"]:
    """Sum of the squared entries of each matrix, as it comes: it may overflow."""
    layout = layout_for(x.shape)
    return layout.give_values(layout.apart(lambda x: layout.sum(jnp.square(layout.take_kept(x))), layout.keep(x)))
