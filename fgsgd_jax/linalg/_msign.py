"""Sign of the singular values of a matrix, by products alone."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ._norm import norm
from ._polar import exact_below, identity, polar_turn
from ._products import gram, matmul, transpose

# Relative to the Frobenius norm. With the last turn that is 8 turns in float32, 9 in float64; 5 coarse ones.
_SMALLEST, _COARSE_SMALLEST, _COARSE_ERROR = 4e-4, 1e-3, 0.15


def msign(y: Float[Array, "*batch n p"], coarse: bool = False) -> Float[Array, "*batch n p"]:
    """`u sign(σ) vᵀ` of `y = u σ vᵀ`, with `sign(0) = 0`: an odd polynomial of `y`.

    It is exact to round-off for singular values above 4e-4 of the Frobenius norm; smaller ones become less than 1, in
    proportion to themselves at last. So a matrix without full rank gets no direction that is not its own, and zero none
    at all, unlike from `polar`.

    Each turn is `y ← y (a + b yᵀy + c (yᵀy)²)` with the coefficients that come nearest to 1 on the interval that the
    turn before leaves (Amsel et al., The Polar Express, 2025). The last one is that of `polar`.

    Args:
      y: any matrices.
      coarse: products at JAX's default precision, which is bfloat16 on TPU and TF32 on GPU, and turns until all
        singular values above 1e-3 are within 0.15 of 1.
    """
    if y.shape[-2] < y.shape[-1]:
        return transpose(msign(transpose(y), coarse))
    length = norm(y, (-2, -1), keepdims=True)
    unit = jnp.where(length > 0, y / jnp.where(length > 0, length, 1), 0)
    eps = float(jnp.finfo(jnp.bfloat16 if coarse else y.dtype).eps)
    turns = _turns(_COARSE_SMALLEST, _COARSE_ERROR, eps) if coarse else _turns(_SMALLEST, exact_below(y.dtype) / 3, eps)

    def turn(y, coefficients):
        a, b, c = coefficients
        e = gram(y, y, coarse)
        # The first term is no pass over y this way.
        polynomial = a * identity(e) + b * e + c * matmul(e, e, coarse)
        return matmul(y, polynomial, coarse), None

    unit, _ = lax.scan(turn, unit, jnp.asarray(turns, y.dtype))
    return unit if coarse else polar_turn(unit)


@functools.cache
def _turns(smallest: float, enough: float, eps: float) -> np.ndarray:
    """Coefficients of the turns that bring singular values in [smallest, 1] to within `enough` of 1."""
    low, high, turns = smallest, 1.0, []
    while high - 1 > enough or not turns:
        # Products round upwards too, and beyond its interval a turn diverges.
        coefficients, error = _nearest_to_one(low, high * (1 + 2 * eps))
        low, high = 1 - error, 1 + error
        turns.append(coefficients)
    return np.array(turns)


def _nearest_to_one(low: float, high: float) -> tuple[np.ndarray, float]:
    """The odd polynomial of degree 5 nearest to 1 on an interval, and its error, by Remez' exchange."""
    if high - low < 1e-3:
        # The system below is singular in the limit, which is Taylor's polynomial.
        return np.array([1.875, -1.25, 0.375]), 2.5 * (high - low) ** 3
    x, coefficients, error = np.linspace(low, high, 4), [], 0.0
    for _ in range(50):
        # Errors of one size and alternating signs, at points that move to where they are largest.
        *coefficients, error = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1), np.ones(4))
        a, b, c = coefficients
        extrema = np.sqrt(np.roots([5 * c, 3 * b, a]).real)
        x = np.array([low, *np.sort(extrema), high])
    return np.array(coefficients), abs(error)
