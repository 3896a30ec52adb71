"""Upper bound of the spectral norm by Gram iteration."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from ._spectral import smaller_gram

# Scales stay within these powers of two, so that neither they nor their reciprocals overflow in float32.
_LARGEST_EXPONENT = 100


def gram_iteration(x: Inexact[Array, "*batch n p"], steps: int = 10) -> Float[Array, "*batch"]:
    """An upper bound of the largest singular value of each matrix, real or complex; never below it by round-off.

    `G ← GᴴG` squares the singular values, so after t steps `‖G‖_F^(2⁻ᵗ)` is at least the largest singular value of x
    and at most q^(2⁻ᵗ⁻¹) times it, with q = min(n, p): 0.3 % more for q = 512 and the default of 10 steps.

    Rounding of each product is bounded by `γ ‖G‖_F²` in the spectral norm, γ = (n + 4) eps, twice that for complex
    matrices (Higham, *Accuracy and Stability of Numerical Algorithms*, sections 3.5 and 3.6: half of it would do), and
    added before the root of its step is taken. So the
    bound holds for the matrices as they are stored, in the arithmetic of their dtype. It is inf where an entry is not
    finite.

    References:
      Delattre et al., Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram Iteration, 2023.
    """
    eps = float(jnp.finfo(x.dtype).eps)

    def up(value: Array, roundings: int) -> Array:
        return value * (1 + (roundings + 8) * eps)

    def frobenius(g: Array) -> Array:
        squares = jnp.square(jnp.real(g)) + jnp.square(jnp.imag(g)) if jnp.iscomplexobj(g) else jnp.square(g)
        # However the sum is ordered, its relative error is at most one rounding an entry.
        return up(jnp.sqrt(jnp.sum(squares, axis=(-2, -1))), g.shape[-2] * g.shape[-1])

    def step(g: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        gamma = (2 if jnp.iscomplexobj(g) else 1) * (max(g.shape[-2:]) + 4) * eps
        slack = up(gamma * jnp.square(frobenius(g)), 4)
        g, scale = _scaled(smaller_gram(g))
        return g, (scale, slack)

    def back(bound: Array, of_step: tuple[Array, Array]) -> tuple[Array, None]:
        # From the norm of a step's Gram to that of its matrix.
        scale, slack = of_step
        return up(jnp.sqrt(scale * bound + slack), 4), None

    # The first step may change the shape; the others are one loop.
    g, outer = _scaled(x)
    g, first = step(g, None)
    g, others = lax.scan(step, g, None, length=steps - 1)
    bound, _ = lax.scan(back, frobenius(g), others, reverse=True)
    # XLA takes denormal entries for zero.
    bound = outer * back(bound, first)[0] + x.shape[-2] * x.shape[-1] * float(jnp.finfo(x.dtype).tiny)
    return jnp.where(jnp.isfinite(bound), bound, jnp.inf)


def _scaled(g: Array) -> tuple[Array, Array]:
    """`g` divided by a power of two, which rounds nothing, so that its largest entry is about 1; and that power."""
    largest = jnp.max(jnp.abs(g), axis=(-2, -1), initial=0.0)
    info = jnp.finfo(largest.dtype)
    integer = jnp.uint64 if info.bits == 64 else jnp.uint32
    # The exponent's bits alone: `exp2` and `ldexp` need not be exact.
    bias = info.maxexp - 1
    exponent = lax.bitcast_convert_type(largest, integer) >> info.nmant
    exponent = jnp.clip(exponent, bias - _LARGEST_EXPONENT, bias + _LARGEST_EXPONENT)
    power, reciprocal = (
        lax.bitcast_convert_type(field.astype(integer) << info.nmant, largest.dtype)
        for field in (exponent, 2 * bias - exponent)
    )
    return g * reciprocal[..., None, None].astype(g.dtype), power
