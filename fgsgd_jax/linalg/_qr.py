"""Sign-fixed QR decomposition."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._floats import largest


def qf(y: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """Q of `y = QR`, n ≥ p, with the diagonal of R made positive, which makes Q unique.

    Of a rank-deficient `y` it is some matrix with orthonormal columns, the same each time.
    """
    # Householder vectors of an overflowing matrix are no numbers; Q is that of the scaled matrix.
    top = lax.stop_gradient(largest(jnp.abs(y), (-2, -1), keepdims=True))
    y = y / jnp.where(top > 1, top, 1)
    q, _ = jnp.linalg.qr(y)
    # The diagonal of R from Q: with R itself read while Q is made, two decompositions of many matrices side by side
    # deadlock the thread pool of jaxlib 0.10 on CPU.
    diagonal = jnp.sum(q * y, axis=-2, keepdims=True)
    return q * jnp.where(diagonal < 0, -1, 1).astype(y.dtype)
