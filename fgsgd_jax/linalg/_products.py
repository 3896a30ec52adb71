"""Matrix products at full precision.

JAX multiplies float32 in TF32 on recent GPUs and in bfloat16 on TPUs unless told otherwise, which is enough to lose a
constraint in one step. Every product of the package that a constraint depends on is one of these.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Multiplications of a product that accelerators do better as sums: all those of 3×3, 9×3 and 5×5 matrices.
_SMALL = 128
# Those of a product that XLA takes seconds to compile for TPU.
_LARGE = 256**3


def matmul(
    a: Float[Array, "*batch n k"], b: Float[Array, "*batch k p"], coarse: bool = False, alone: bool = False
) -> Float[Array, "*batch n p"]:
    """`a @ b` at the precision of its dtype on every backend.

    `coarse` leaves the precision to JAX's default. `alone` keeps large exact products from being fused with others on
    TPU: they compile faster, and cannot be transposed as linear maps.
    """
    (n, k), p = a.shape[-2:], b.shape[-1]
    product = jnp.matmul if coarse else _exact
    if alone and not coarse and n * k * p >= _LARGE:
        return lax.platform_dependent(a, b, tpu=_alone, default=_exact)
    if n * k * p > _SMALL or not a.ndim == b.ndim > 2:
        return product(a, b)
    # Matrix units take each of them as a matrix of 128×128: a hundred times the memory, and long to compile.
    return lax.platform_dependent(a, b, cpu=product, default=_sum)


def _exact(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


@jax.custom_jvp
def _alone(a: Array, b: Array) -> Array:
    """A product that XLA fuses nothing with.

    It unrolls the six passes of an exact product, and compiles the longer the more is fused with them. Alone, products
    of one shape share a kernel: `fg.spel` compiles in half of the time on St(768, 768) and in a third on St(3072, 768),
    for 13 to 20 % more cycles.
    """
    return lax.optimization_barrier(_exact(*lax.optimization_barrier((a, b))))


@_alone.defjvp
def _alone_jvp(primals, tangents):
    # A barrier of two arrays has no reverse derivative.
    (a, b), (da, db) = primals, tangents
    return _alone(a, b), _exact(da, b) + _exact(a, db)


def _sum(a: Array, b: Array) -> Array:
    return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)


def transpose(a: Float[Array, "*batch n p"]) -> Float[Array, "*batch p n"]:
    """The transposed matrices."""
    return jnp.swapaxes(a, -2, -1)


def gram(
    a: Float[Array, "*batch n p"], b: Float[Array, "*batch n q"], coarse: bool = False, alone: bool = False
) -> Float[Array, "*batch p q"]:
    """`aᵀb`, as `matmul`."""
    return matmul(transpose(a), b, coarse, alone)


def symmetric(a: Float[Array, "*batch p p"]) -> Float[Array, "*batch p p"]:
    """Symmetric part, `(a + aᵀ)/2`."""
    return (a + transpose(a)) / 2
