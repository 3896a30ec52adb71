"""Polar factor of any matrix, by the singular value decomposition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._largest import largest
from ._products import gram, matmul


@jax.custom_jvp
def polar(y: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """Orthonormal factor `U = y (yᵀy)^-½` of a matrix with n ≥ p: the nearest with orthonormal columns.

    A rank-deficient `y` has several nearest matrices; this returns one of them, the same each time.
    The derivative is that of the polar factor, also where singular values coincide.
    """
    # The factors of an overflowing or denormal matrix are those of its scaled self.
    top = largest(jnp.abs(y), (-2, -1), keepdims=True)
    scaled = jnp.where(top > 0, y / jnp.where(top > 0, top, 1), 0)
    u, _, vh = jnp.linalg.svd(scaled, full_matrices=False)
    u = matmul(u, vh)
    # The product of two orthonormal factors carries both errors; one Newton step removes them.
    return 1.5 * u - 0.5 * matmul(u, gram(u, u))


@polar.defjvp
def _polar_jvp(primals, tangents):
    (y,), (dy,) = primals, tangents
    u = polar(y)
    return u, polar_differential(u, y, dy)


def polar_differential(u: Array, y: Array, dy: Array) -> Array:
    """Differential of the polar factor `u` of `y` along `dy`.

    With `H = uᵀy` it is `uΩ + (I - uuᵀ) dy H⁻¹`, where `HΩ + ΩH = uᵀdy - dyᵀu` (Higham, *Functions of
    Matrices*, section 8.2). Directions in which `y` is singular are taken as constant.
    """
    h = gram(u, y)
    eigenvalues, q = jnp.linalg.eigh((h + jnp.swapaxes(h, -1, -2)) / 2)
    floor = jnp.finfo(y.dtype).eps * jnp.max(jnp.abs(eigenvalues), axis=-1, keepdims=True)
    regular = eigenvalues > floor
    inverse = jnp.where(regular, 1 / jnp.where(regular, eigenvalues, 1), 0)
    sums = eigenvalues[..., :, None] + eigenvalues[..., None, :]
    inverse_sums = jnp.where(sums > floor[..., None], 1 / jnp.where(sums > floor[..., None], sums, 1), 0)
    udy = gram(u, dy)
    skew = udy - jnp.swapaxes(udy, -1, -2)
    omega = matmul(matmul(q, gram(q, matmul(skew, q)) * inverse_sums), jnp.swapaxes(q, -1, -2))
    normal = matmul(matmul(dy - matmul(u, udy), q) * inverse[..., None, :], jnp.swapaxes(q, -1, -2))
    return matmul(u, omega) + normal
