"""Polar factor of a matrix, by products alone."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ._floats import largest
from ._products import gram, matmul, symmetric, transpose

# A small singular value grows by 3/2 a turn: from eps of the largest to 1 in 89 turns in float64, 40 in float32.
_MOST_TURNS = 100
# With at least so many times as many rows as columns, products of p×p matrices cost little beside those with y.
_TALLER = 4
# With so many rows a plain sum of squares is off by 3e-7 in float32, and Σ(y² - 1/n) by 1e-7.
_TALL = 32


@jax.custom_jvp
def orthonormalize(y: Float[Array, "*batch n p"], fallback: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """Polar factor `y (yᵀy)^-½` of matrices with n ≥ p; `fallback` where there is none (NaN, rank below p).

    It squares what it is given: matrices that overflow or vanish there get the fallback too. A fallback without the
    length of a point is replaced by the identity.

    One turn of Newton and Schulz is `y ← y - y (yᵀy - I)/2`. One is exact to round-off after a step of 1 % of the
    radius in float32, and each turn more squares the deviation; how many follow is measured on the whole batch. Tall
    matrices take two terms more of the series of (yᵀy)^-½: one turn serves steps of 10 %. The Gram matrix is that of
    `y` itself, so that errors of earlier calls are corrected, not carried along.
    """
    return or_fallback(*polar_iteration(y), fallback)


@jax.custom_jvp
def polar(y: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """Polar factor of any matrix with n ≥ p: a nearest matrix with orthonormal columns.

    A rank-deficient `y` has several nearest matrices; this returns one of them, the same each time. A matrix that is
    not finite gives the identity.
    """
    top = largest(jnp.abs(y), (-2, -1), keepdims=True)
    # The factor of an overflowing or denormal matrix is that of its scaled self.
    y = jnp.where((top > 0) & jnp.isfinite(top), y / jnp.where(top > 0, top, 1), 0)
    # A perturbation at round-off has full rank: its factor is taken where the matrix itself has none.
    point, converged = polar_iteration(y, y + 4 * jnp.finfo(y.dtype).eps * _generic(y))
    return jnp.where(converged, point, identity(y))


def or_fallback(
    point: Float[Array, "*batch n p"], converged: Bool[Array, "*batch 1 1"], fallback: Float[Array, "*batch n p"]
) -> Float[Array, "*batch n p"]:
    """What converged; elsewhere the fallback, or the identity where it has not the length of a point."""
    length = jnp.sum(jnp.square(fallback), axis=(-2, -1), keepdims=True) / min(fallback.shape[-2:])
    is_point = jnp.abs(length - 1) < 0.1
    return jnp.where(converged, point, jnp.where(is_point, fallback, identity(fallback)))


class Products(NamedTuple):
    """The two products of `polar_iteration`: `yᵀy - I`, or `yyᵀ - I` of wide matrices, and y by such a one."""

    deviation: Callable[[Float[Array, "*batch n p"]], Float[Array, "*batch q q"]]
    times: Callable[[Float[Array, "*batch n p"], Float[Array, "*batch q q"]], Float[Array, "*batch n p"]]


def polar_iteration(
    y: Float[Array, "*batch n p"],
    otherwise: Float[Array, "*batch n p"] | None = None,
    products: Products | None = None,
) -> tuple[Float[Array, "*batch n p"], Bool[Array, "*batch 1 1"]]:
    """Polar factors by as many turns as the matrix that is furthest from orthonormal takes, and which converged.

    Where y has none, it is that of `otherwise`. Matrices with n < p need `products` of their own.
    """
    products = products or Products(deviation, matmul)
    starts = 1 if otherwise is None else 2

    def unfinished(carry):
        _, bound, turns = carry
        return jnp.any(bound > exact_below(y.dtype)) & (turns < starts * _MOST_TURNS)

    def turn(carry):
        y, bound, turns = carry
        if otherwise is not None:
            y = jnp.where((turns == _MOST_TURNS) & (bound > exact_below(y.dtype)), otherwise, y)
        e = products.deviation(y)
        root, small = _root(e, third_order=max(y.shape[-2:]) >= _TALLER * e.shape[-1])
        # Entries of small² are at most the square of the longest column.
        bound = jnp.sqrt(jnp.max(jnp.sum(jnp.square(small), axis=-2, keepdims=True), axis=-1, keepdims=True))
        # Below a Gram of norm 2 the iteration converges. Anything else is first scaled into (0, 1], by the 1-norm.
        size = jnp.max(jnp.sum(jnp.abs(e), axis=-2, keepdims=True), axis=-1, keepdims=True)
        is_large = (turns % _MOST_TURNS == 0) & (size > 1) & (size < jnp.inf)
        scale = jnp.where(is_large, lax.rsqrt(1 + size), 1)
        y = scale * jnp.where(is_large, y, y + products.times(y, root))
        return y, jnp.where(is_large, jnp.inf, bound), turns + 1

    start = jnp.full_like(y[..., :1, :1], jnp.inf)
    y, bound, _ = lax.while_loop(unfinished, turn, (y, start, 0))
    return y, bound <= exact_below(y.dtype)


def polar_turn(y: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """One turn: exact to round-off where the Gram matrix is within `exact_below` of the identity."""
    return y + matmul(y, _root(deviation(y))[0])


def exact_below(dtype: jnp.dtype) -> float:
    """The deviation e of a Gram matrix from I up to which one turn is exact to round-off: it leaves 3/4 e²."""
    return (2 / 3 * float(jnp.finfo(dtype).eps)) ** 0.5


def _root(e: Array, third_order: bool = False) -> tuple[Array, Array]:
    """(I + e)^-½ - I of order 1 or 3, and e or e²: the Gram matrix is left with at most 3/4 of its square."""
    if not third_order:
        return -e / 2, e
    square = matmul(e, e)
    return -e / 2 + 3 / 8 * square - 5 / 16 * matmul(e, square), square


def deviation(y: Float[Array, "*batch n p"]) -> Float[Array, "*batch p p"]:
    """`yᵀy - I`; the diagonal of tall matrices is summed as Σ(y² - 1/n).

    The sum of squares rounds every partial sum relative to 1, and all in one direction: that is 1e-6 at n = 768 in
    float32. These partial sums stay small: 1e-7.
    """
    products = gram(y, y)
    eye = identity(products)
    if (n := y.shape[-2]) < _TALL:
        return products - eye
    return jnp.where(eye > 0, jnp.sum(jnp.square(y) - 1 / n, axis=-2, keepdims=True), products)


def identity(x: Float[Array, "*batch n p"]) -> Float[Array, "*batch n p"]:
    """The n×p identity for each of the matrices."""
    return jnp.broadcast_to(jnp.eye(*x.shape[-2:], dtype=x.dtype), x.shape)


def _generic(y: Array) -> Array:
    """Matrices without symmetry, of entries up to 1: cosines of squares."""
    n, p = y.shape[-2:]
    index = jnp.arange(n * p, dtype=y.dtype).reshape(n, p)
    return jnp.broadcast_to(jnp.cos(jnp.square(index)), y.shape)


@orthonormalize.defjvp
def _orthonormalize_jvp(primals, tangents):
    u = orthonormalize(*primals)
    return u, polar_differential(u, primals[0], tangents[0])


@polar.defjvp
def _polar_jvp(primals, tangents):
    u = polar(*primals)
    return u, polar_differential(u, primals[0], tangents[0])


def polar_differential(u: Array, y: Array, dy: Array) -> Array:
    """Differential of the polar factor `u` of `y` along `dy`.

    With `H = uᵀy` it is `uΩ + (I - uuᵀ) dy H⁻¹`, where `HΩ + ΩH = uᵀdy - dyᵀu` (Higham, *Functions of
    Matrices*, section 8.2). Directions in which `y` is singular are taken as constant.
    """
    eigenvalues, q = jnp.linalg.eigh(symmetric(gram(u, y)))
    floor = jnp.finfo(y.dtype).eps * jnp.max(jnp.abs(eigenvalues), axis=-1, keepdims=True)
    regular = eigenvalues > floor
    inverse = jnp.where(regular, 1 / jnp.where(regular, eigenvalues, 1), 0)
    sums = eigenvalues[..., :, None] + eigenvalues[..., None, :]
    inverse_sums = jnp.where(sums > floor[..., None], 1 / jnp.where(sums > floor[..., None], sums, 1), 0)
    udy = gram(u, dy)
    omega = matmul(matmul(q, gram(q, matmul(udy - transpose(udy), q)) * inverse_sums), transpose(q))
    normal = matmul(matmul(dy - matmul(u, udy), q) * inverse[..., None, :], transpose(q))
    return matmul(u, omega) + normal
