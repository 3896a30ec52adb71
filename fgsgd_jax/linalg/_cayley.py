"""Cayley transform along a tangent vector of the Stiefel manifold."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._floats import largest
from ._products import gram, matmul

_MOST_ITERATIONS = 128


def cayley(x: Float[Array, "*batch n p"], v: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """`(I - W/2)⁻¹ (I + W/2) x`, with the skew `W = (I - xxᵀ/2) v xᵀ - x vᵀ (I - xxᵀ/2)`, so that `Wx = v`.

    W has rank 2p (Wen & Yin 2013, lemma 4). Eliminating one half of that 2p×2p system leaves a p×p one, with the skew
    `A = xᵀv` and the normal part `N = v - xA`: `(2x + N) (I + NᵀN/4 - A/2)⁻¹ - x`. The solution drifts off the
    manifold in finite precision: whoever needs feasibility orthonormalizes it.
    """
    a = gram(x, v)
    normal, a = v - matmul(x, a), (a - jnp.swapaxes(a, -1, -2)) / 2
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=x.dtype), a.shape)
    return matmul(2 * x + normal, _inverse(eye + gram(normal, normal) / 4 - a / 2)) - x


@jax.custom_jvp
def _inverse(m: Float[Array, "*batch p p"]) -> Float[Array, "*batch p p"]:
    """By Newton's iteration (Schulz 1933), for matrices whose symmetric part is at least I.

    By products alone: two decompositions of many matrices side by side deadlock the thread pool of jaxlib 0.10 on CPU.
    """
    eye = jnp.broadcast_to(jnp.eye(m.shape[-1], dtype=m.dtype), m.shape)
    enough = jnp.finfo(m.dtype).eps ** 0.5

    def unconverged(carry):
        _, residual, iteration = carry
        return (largest(jnp.abs(residual)) > enough) & (iteration < _MOST_ITERATIONS)

    def nearer(carry):
        inverse, residual, iteration = carry
        inverse = inverse + matmul(inverse, residual)
        return inverse, eye - matmul(m, inverse), iteration + 1

    def largest_sum(axis):
        return largest(jnp.sum(jnp.abs(m), axis, keepdims=True), (-2, -1), keepdims=True)

    start = jnp.swapaxes(m, -1, -2) / largest_sum(-1) / largest_sum(-2)
    # The residual is squared at every turn: one more takes it to round-off.
    return nearer(lax.while_loop(unconverged, nearer, (start, eye - matmul(m, start), 0)))[0]


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    inverse = _inverse(*primals)
    return inverse, -matmul(inverse, matmul(tangents[0], inverse))
