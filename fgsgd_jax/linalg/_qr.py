"""Sign-fixed QR decomposition."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._largest import largest


def qf(y: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """Q of `y = QR`, n ≥ p, with the diagonal of R made positive, which makes Q unique.

    Of a rank-deficient `y` it is some matrix with orthonormal columns, the same each time.
    """
    # Householder vectors of an overflowing matrix are no numbers; Q is that of the scaled matrix.
    top = lax.stop_gradient(largest(jnp.abs(y), (-2, -1), keepdims=True))
    q, r = jnp.linalg.qr(y / jnp.where(top > 1, top, 1))
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(y.dtype)
    return q * signs[..., None, :]
