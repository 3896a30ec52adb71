"""Matrices with orthonormal columns."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import gmres
from jaxtyping import Array

from ..linalg import (
    cayley,
    deviation,
    expm,
    gram,
    identity,
    largest,
    matmul,
    msign,
    norm,
    or_fallback,
    orthonormalize,
    polar,
    qf,
    transpose,
)
from ._manifold import Manifold
from ._sphere import spherical_log
from ._tangent_ball import steepest_tangent, tangent as _tangent

Retraction = Literal["polar", "qr", "cayley", "exp"]

# Columns that tell a radius: a number whose root is exact, or the radius is off by its rounding.
_FEW = 16
_SQUARE_ROOTS = 5
_SHOOTING_STOPS = 8
_MOST_SHOTS = 200


@dataclasses.dataclass(frozen=True)
class Stiefel(Manifold):
    """Matrices with orthonormal columns times `radius`: xᵀx = s²I for n ≥ p; for n < p the rows, xxᵀ = s²I.

    Dimension np - p(p+1)/2 for n ≥ p. The metric is the embedded one (Edelman et al. 1998, section 2.2), in which the
    sectional curvature, times s², lies in [-½, 1] for 2 ≤ p ≤ n - 2, in [-½, ½] for p = n - 1 and in [0, ¼] for
    p = n ≥ 4, and is ⅛ for p = n = 3. So products of Stiefel manifolds can have negative curvature, contrary to
    Remark 2.

    `retraction` chooses how a step returns to the manifold: `"polar"` (default: the nearest point to x + v, two n·p²
    products for small steps), `"qr"` (sign-fixed), `"cayley"` (the Cayley transform, made orthonormal to round-off)
    or `"exp"` (the geodesic).

    Args:
      radius: s; see `Manifold`.
      retraction: how a step returns to the manifold.

    Raises:
      ValueError: for an unknown retraction.

    References:
      Edelman, Arias & Smith, The Geometry of Algorithms with Orthogonality Constraints, 1998 (embedded metric).
      Absil, Mahony & Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008, example 4.1.3 (polar, QR).
      Wen & Yin, A Feasible Method for Optimization with Orthogonality Constraints, 2013 (Cayley).
      Zimmermann & Hüper, Computing the Riemannian Logarithm on the Stiefel Manifold, 2022 (logarithm).

    Example:
      >>> import jax
      >>> import fgsgd_jax as fg
      >>> stiefel = fg.Stiefel(retraction="cayley")
      >>> x = stiefel.random_point(jax.random.key(0), (4, 2))
      >>> v = stiefel.random_tangent(jax.random.key(1), x)
      >>> bool(stiefel.violation(stiefel.retract(x, v)) < 1e-6)
      True
    """

    retraction: Retraction = "polar"

    def __post_init__(self):
        if self.retraction not in get_args(Retraction):
            raise ValueError(f"Stiefel(retraction={self.retraction!r}): choose one of {get_args(Retraction)}")

    def _project(self, x, g):
        x, g, back = _tall(x, g)
        return back(_tangent(x, g))

    def _retract(self, x, v):
        x, v, back = _tall(x, v)
        return back(self._retract_tall(x, v))

    def _retract_tall(self, x, v):
        match self.retraction:
            case "polar":
                return orthonormalize(x + v, x)
            case "qr":
                y = x + v
                usable = jnp.all(jnp.isfinite(y), axis=(-2, -1), keepdims=True)
                return or_fallback(qf(jnp.where(usable, y, identity(y))), usable, x)
            # Both are defined for tangent vectors only.
            case "cayley":
                return orthonormalize(cayley(x, _tangent(x, v)), x)
            case "exp":
                return orthonormalize(_geodesic(x, _tangent(x, v)), x)

    def _exp(self, x, v):
        x, v, back = _tall(x, v)
        return back(_geodesic(x, v))

    def _log(self, x, y):
        x, y, back = _tall(x, y)
        n, p = x.shape[-2:]
        if p == 1:
            return back(spherical_log(x, y, (-2, -1)))
        if n == p:
            return back(_rotation_log(x, y))
        return back(_shooting_log(x, y))

    def _dist(self, x, y):
        length = norm(self._log(x, y), axis=(-2, -1))
        x, y, _ = _tall(x, y)
        if x.shape[-2] > x.shape[-1]:
            return length
        return jnp.where(jnp.linalg.det(gram(x, y)) < 0, jnp.inf, length)

    def _nearest(self, x):
        x, back = _tall(x)
        return back(polar(x))

    def _steepest(self, x, g, method, tangent, coarse):
        x, g, back = _tall(x, g)
        g = _tangent(x, g, coarse) if tangent else g
        return back(steepest_tangent(x, g) if method == "dual" else msign(g, coarse))

    def _violation(self, x):
        x, _ = _tall(x)
        return largest(jnp.abs(deviation(x)), (-2, -1))

    def dim(self, shape):
        """Dimension np - p(p+1)/2 for n ≥ p, and the same of the transpose for n < p."""
        n, p = max(shape), min(shape)
        return n * p - p * (p + 1) // 2

    def _curvature_bounds(self, shape):
        n, p = max(shape), min(shape)
        if p == 1:
            return 1.0, 1.0
        if n == p:
            return (0.125, 0.125) if n == 3 else (0.0, 0.25)
        # Found by maximising and minimising the Gauss equation's sectional curvature over pairs of tangent vectors.
        return -0.5, (0.5 if n == p + 1 else 1.0)

    def _squared_length(self, shape):
        return min(shape)

    def _sample(self, x):
        # All columns have one length, and all rows of square and wide matrices, which lie together in memory.
        n, p = x.shape[-2:]
        return x[..., :_FEW, :] if n <= p else x[..., :_FEW], min(n, p, _FEW)

    def origin(self, shape, dtype=jnp.float32):
        """The n×p identity."""
        return jnp.eye(*shape, dtype=dtype)


def _tall(*arrays: Array):
    """The arrays, transposed if they are wider than tall (the smaller Gram), and the map that undoes it."""
    if arrays[0].shape[-2] >= arrays[0].shape[-1]:
        return *arrays, lambda x: x
    return *(transpose(x) for x in arrays), transpose


def _geodesic(x: Array, v: Array) -> Array:
    """Geodesic of the embedded metric at time 1 (Edelman et al. 1998, eq. 2.42), by 2p×2p exponentials."""
    p = x.shape[-1]
    # In the direction of v, so that both halves of the block are of the order of its length.
    length = lax.stop_gradient(norm(v, (-2, -1), keepdims=True))
    length = jnp.where(length > 0, length, 1)
    u = v / length
    a, s = gram(x, v), gram(u, v)
    eye = identity(a)
    block = jnp.concatenate([jnp.concatenate([a, -s], axis=-1), jnp.concatenate([length * eye, a], axis=-1)], axis=-2)
    columns = expm(block)[..., :, :p]
    return matmul(matmul(jnp.concatenate([x, u], axis=-1), columns), expm(-a))


def _rotation_log(x: Array, y: Array) -> Array:
    """Logarithm among square matrices: x A with the skew A = log(xᵀy); NaN across components or at angle π.

    A square root of a rotation R is the polar factor of I + R. After a few of them R is near I and A follows
    from its skew part, sinh A.
    """
    r = gram(x, y)
    eye = identity(r)
    root = orthonormalize(eye + r, eye)
    # The identity, where I + R is singular: then R has an eigenvalue of -1.
    found = norm(matmul(root, root) - r, (-2, -1), keepdims=True) < 1
    r = root
    for _ in range(_SQUARE_ROOTS - 1):
        r = orthonormalize(eye + r, eye)
    sinh = (r - transpose(r)) / 2
    square = matmul(sinh, sinh)
    # arsinh: angles are below π / 2⁵ here, so the first term left out is below 1e-17.
    coefficients = (1.0, -1 / 6, 3 / 40, -15 / 336, 105 / 3456, -945 / 42240)
    series = coefficients[-1] * eye
    for coefficient in coefficients[-2::-1]:
        series = coefficient * eye + matmul(square, series)
    return jnp.where(found, matmul(x, 2.0**_SQUARE_ROOTS * matmul(sinh, series)), jnp.nan)


@jax.custom_vjp
def _shooting_log(x: Array, y: Array) -> Array:
    """Logarithm by shooting: correct the velocity by the miss, carried back along the geodesic; NaN if that fails.

    Zimmermann & Hüper 2022, algorithm 1: the miss is projected at a few points on the way and its length kept. It
    converges for points within about the injectivity radius.
    """
    tolerance = 8 * jnp.finfo(x.dtype).eps * x.shape[-1] ** 0.5

    def missing(carry):
        _, miss, shots = carry
        return (largest(norm(miss, (-2, -1))) > tolerance) & (shots < _MOST_SHOTS)

    def shoot(carry):
        v, miss, shots = carry
        w = _carried_back(x, v, miss)
        length, reached = norm(miss, (-2, -1), keepdims=True), norm(w, (-2, -1), keepdims=True)
        v = v + jnp.where(reached > 0, w * (length / jnp.where(reached > 0, reached, 1)), 0)
        return v, y - _geodesic(x, v), shots + 1

    start = _tangent(x, y - x)
    v, miss, _ = lax.while_loop(missing, shoot, (start, y - _geodesic(x, start), 0))
    error = norm(miss, (-2, -1), keepdims=True)
    return jnp.where(error <= jnp.finfo(x.dtype).eps ** 0.5, v, jnp.nan)


def _shooting_log_forward(x, y):
    v = _shooting_log(x, y)
    return v, (x, y, v)


def _shooting_log_backward(residuals, cotangent):
    """Derivative of the implicit function: of the v that solves `equation`, whatever found it."""
    x, y, v = residuals

    def equation(v, x, y):
        # The miss, brought to the tangent space at x, and beside it that v is tangent: as many equations as unknowns.
        return v - _tangent(x, v) - _carried_back(x, v, y - _geodesic(x, v))

    _, pullback = jax.vjp(equation, v, x, y)
    adjoint, _ = gmres(lambda w: pullback(w)[0], cotangent, tol=float(8 * jnp.finfo(x.dtype).eps))
    _, x_bar, y_bar = pullback(-adjoint)
    return x_bar, y_bar


_shooting_log.defvjp(_shooting_log_forward, _shooting_log_backward)


def _carried_back(x: Array, v: Array, w: Array) -> Array:
    """`w`, given at the end of the geodesic `(x, v)`, projected at a few of its points on the way back to `x`."""

    def stop(index, w):
        return _tangent(_geodesic(x, (1 - index / _SHOOTING_STOPS) * v), w)

    return _tangent(x, lax.fori_loop(0, _SHOOTING_STOPS, stop, w))
