"""Sign-fixed QR decomposition."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def qf(y: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """Q of `y = QR`, n ≥ p, with the diagonal of R made positive, which makes Q unique.

    Of a rank-deficient `y` it is some matrix with orthonormal columns, the same each time.
    """
    q, r = jnp.linalg.qr(y)
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(y.dtype)
    return q * signs[..., None, :]
