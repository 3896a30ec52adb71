"""Matrix exponential, by products alone."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._floats import largest
from ._products import matmul

_MOST_SQUARINGS = 16
# Of the polynomial in a matrix of norm 2: what is left out of the series is below round-off, and every squaring saved
# halves an error.
_DEGREES = {jnp.dtype("float32"): 16, jnp.dtype("float64"): 24}


def expm(a: Float[Array, "*batch p p"]) -> Float[Array, "*batch p p"]:
    """Matrix exponential at full precision on every backend; NaN for 1-norms above 2¹⁷.

    Scaling and squaring of the Taylor polynomial, evaluated in blocks of four powers (Paterson & Stockmeyer 1973).
    Padé approximants, as `jax.scipy.linalg.expm` has them, need a linear solver: two of those side by side in one
    program, with tens of thousands of matrices each, deadlock the thread pool of jaxlib 0.10 on CPU.
    """
    length = largest(jnp.sum(jnp.abs(lax.stop_gradient(a)), axis=-2), axis=-1)
    bounded = length <= 2.0 ** (_MOST_SQUARINGS + 1)
    squarings = jnp.where(bounded, jnp.ceil(jnp.log2(jnp.maximum(length, 2))) - 1, 0)
    scaled = a * jnp.exp2(-squarings)[..., None, None]
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    square = matmul(scaled, scaled)
    powers = (eye, scaled, square, matmul(square, scaled))
    fourth = matmul(square, square)
    degree = _DEGREES[a.dtype]
    series = eye * (1 / math.factorial(degree))
    for start in range(degree - 4, -1, -4):
        block = sum(
            (power * (1 / math.factorial(start + k)) for k, power in enumerate(powers)), start=jnp.zeros_like(a)
        )
        series = block + matmul(fourth, series)

    def squared(x: Array, count: Array) -> tuple[Array, None]:
        on = (count < squarings)[..., None, None]
        return lax.cond(jnp.any(on), lambda x: jnp.where(on, matmul(x, x), x), lambda x: x, x), None

    # A scan, because a loop with a length found at run time has no gradient.
    series, _ = lax.scan(squared, series, jnp.arange(_MOST_SQUARINGS, dtype=a.dtype))
    return jnp.where(bounded[..., None, None], series, jnp.nan)
