"""Cayley transform along a tangent vector of the Stiefel manifold."""

import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from ._products import gram, matmul


def cayley(x: Float[Array, "*batch n p"], v: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """`(I - W/2)⁻¹ (I + W/2) x`, with the skew `W = (I - xxᵀ/2) v xᵀ - x vᵀ (I - xxᵀ/2)`, so that `Wx = v`.

    `W` has rank 2p, so one 2p×2p system is solved (Wen & Yin 2013, lemma 4). The solution drifts off the manifold
    in finite precision: whoever needs feasibility orthonormalizes it.
    """
    pv = v - matmul(x, gram(x, v)) / 2
    left = jnp.concatenate([pv, x], axis=-1)
    right = jnp.concatenate([x, -pv], axis=-1)
    small = gram(right, left)
    eye = jnp.broadcast_to(jnp.eye(small.shape[-1], dtype=x.dtype), small.shape)
    system = eye - small / 2
    # By QR, and R from Q: two LU solves of many matrices side by side, and two decompositions of which R is read while
    # Q is made, deadlock the thread pool of jaxlib 0.10 on CPU.
    q, _ = jnp.linalg.qr(system)
    return x + matmul(left, solve_triangular(gram(q, system), gram(q, gram(right, x))))
