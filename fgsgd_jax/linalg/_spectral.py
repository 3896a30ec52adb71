"""Spectral norm of a batch of matrices."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from ._largest import largest
from ._norm import norm


def spectral_norm(x: Inexact[Array, "*batch n p"]) -> Float[Array, "*batch"]:
    """Largest singular value of each matrix, real or complex, by the eigenvalues of its smaller Gram matrix.

    The Gram squares singular values, which costs the small ones their digits and the largest none: its relative error
    is a few eps·min(n, p). For matrices of a few rows and many columns, or the reverse, it is far cheaper than a
    singular value decomposition.
    """
    n, p = x.shape[-2:]
    if min(n, p) == 1:
        return norm(jnp.abs(x), (-2, -1))
    top = largest(jnp.abs(x), (-2, -1))
    # Scaled, so that the squares neither overflow nor vanish; what is not finite stays so.
    scale = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
    y = x / scale[..., None, None].astype(x.dtype)
    eigenvalues = jnp.linalg.eigvalsh(smaller_gram(y))
    return scale * jnp.sqrt(jnp.maximum(eigenvalues[..., -1], 0))


def smaller_gram(x: Inexact[Array, "*batch n p"]) -> Inexact[Array, "*batch q q"]:
    """`xᴴx` or `xxᴴ`, whichever is smaller: q = min(n, p)."""
    adjoint = jnp.conj(jnp.swapaxes(x, -1, -2))
    left, right = (x, adjoint) if x.shape[-2] < x.shape[-1] else (adjoint, x)
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
