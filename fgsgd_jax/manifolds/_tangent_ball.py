"""Linear functions on the unit spectral ball of a tangent space of the Stiefel manifold."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..linalg import gram, identity, largest, matmul, msign, norm, symmetric

# What the result may lack of the maximum, as a share of it.
_TOLERANCE = 1e-4
_MOST_TURNS = 300
# Over-relaxation as Boyd et al. (2011), section 3.4.3, advise.
_RELAXATION = 1.6


def steepest_tangent(x: Float[Array, "*batch n p"], t: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """The tangent vector `a` at `x` (n ≥ p) with `‖a‖₂ ≤ 1` for which `<t, a>` is largest, within 1e-4 of it.

    By its Lagrangian `a = msign(t + 2xΛ)`, with a symmetric Λ that ascends along `xᵀa + aᵀx` until that vanishes. But
    where `t + 2xΛ` loses rank at the solution, which for n < 2p is the rule, no Λ gives a tangent `a`, and the ascent
    oscillates. So it is done on the augmented Lagrangian (alternating directions): `a` in the tangent space, `b` in the
    ball, and the multiplier `u` of `a = b`, whose part normal to the manifold is xΛ. The result is `b`, projected and
    shortened into the ball. An upper bound of the maximum, found from `u`, says when to stop.

    References:
      Bernstein, Modular Manifolds, 2025 (the problem and its dual).
      Boyd et al., Distributed Optimization and Statistical Learning via ADMM, 2011.
    """
    start = msign(t)
    n, p = t.shape[-2:]
    if n == p:
        # t = xΩ, and the sign of a skew matrix is skew, up to what it makes of round-off where Ω is singular.
        return tangent(x, start)
    nuclear = _inner(t, start)
    # To a mean singular value of 1: then the penalty of the augmented Lagrangian is well chosen as 1.
    t = p * t / jnp.where(nuclear > 0, nuclear, 1)

    def unfinished(carry):
        *_, gap, turns = carry
        return (largest(gap, range(gap.ndim)) > _TOLERANCE) & (turns < _MOST_TURNS)

    def turn(carry):
        b, u, _, _, turns = carry
        a = t + tangent(x, b - u)
        y = _RELAXATION * a + (1 - _RELAXATION) * b + u
        b = _into_ball(y)
        u = y - b
        projected = tangent(x, b)
        found = projected / (1 + norm(b - projected, (-2, -1), keepdims=True))
        # Singular vectors of u are those of b to singular values of 1.
        most = _inner(u, b) + p**0.5 * norm(tangent(x, u) - t, (-2, -1), keepdims=True)
        gap = jnp.where(nuclear > 0, 1 - _inner(t, found) / jnp.where(most > 0, most, 1), 0)
        return b, u, found, gap, turns + 1

    # In `shard_map` what is carried must vary between devices from the start.
    carry = (start, jnp.zeros_like(t), start, jnp.full_like(nuclear, jnp.inf), 0)
    return lax.while_loop(unfinished, turn, carry)[2]


def _into_ball(y: Array) -> Array:
    """The nearest matrix of spectral norm 1 or less: singular values above 1 become 1."""
    sign = msign(y)
    length = symmetric(gram(y, sign))
    # min(σ, 1) = (σ + 1 - (σ - 1) sign(σ - 1)) / 2.
    return (y + sign - matmul(y - sign, msign(length - identity(length)))) / 2


def tangent(
    x: Float[Array, "*batch n p"], w: Float[Array, "*batch n p"], coarse: bool = False
) -> Float[Array, "*batch n p"]:
    """The part of `w` in the tangent space at `x`; options as of `matmul`."""
    return w - matmul(x, symmetric(gram(x, w, coarse)), coarse)


def _inner(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=(-2, -1), keepdims=True)
