"""Matrix products at full precision.

JAX multiplies float32 in TF32 on recent GPUs and in bfloat16 on TPUs unless told otherwise, which is enough to lose a
constraint in one step. Every product of the manifolds that a constraint depends on is one of these. The products of
large matrices on accelerators are in `kernels._matrices`, which says where less is enough, and why.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Multiplications of a product that accelerators do better as sums: all those of 3×3, 9×3 and 5×5 matrices.
_SMALL = 128


def matmul(
    a: Float[Array, "*batch n k"], b: Float[Array, "*batch k p"], coarse: bool = False
) -> Float[Array, "*batch n p"]:
    """`a @ b` at the precision of its dtype on every backend; `coarse` leaves the precision to JAX's default."""
    (n, k), p = a.shape[-2:], b.shape[-1]
    product = jnp.matmul if coarse else _exact
    if n * k * p > _SMALL or not a.ndim == b.ndim > 2:
        return product(a, b)
    # Matrix units take each of them as a matrix of 128×128: a hundred times the memory, and long to compile.
    return lax.platform_dependent(a, b, cpu=product, default=_sum)


def _exact(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _sum(a: Array, b: Array) -> Array:
    return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)


def transpose(a: Float[Array, "*batch n p"]) -> Float[Array, "*batch p n"]:
    """The transposed matrices."""
    return jnp.swapaxes(a, -2, -1)


def gram(
    a: Float[Array, "*batch n p"], b: Float[Array, "*batch n q"], coarse: bool = False
) -> Float[Array, "*batch p q"]:
    """`aᵀb`, as `matmul`."""
    return matmul(transpose(a), b, coarse)


def symmetric(a: Float[Array, "*batch p p"]) -> Float[Array, "*batch p p"]:
    """Symmetric part, `(a + aᵀ)/2`."""
    return (a + transpose(a)) / 2
