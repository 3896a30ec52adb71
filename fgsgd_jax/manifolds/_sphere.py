"""Spheres: the unit vectors along some axes of an array."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ..linalg import largest, norm
from ._manifold import Manifold, unit


def spherical_log(x: Array, y: Array, axes: tuple[int, ...]) -> Array:
    """Logarithm on the unit spheres along `axes`; NaN between the two points of a sphere of dimension 0."""
    aligned = jnp.sum(x * y, axis=axes, keepdims=True)
    # The tangent part of y is that of y - x and of y + x; the shorter of the two loses no digits to cancellation.
    direction = _tangent(x, jnp.where(aligned >= 0, y - x, y + x), axes)
    length = norm(direction, axes, keepdims=True)
    # Antipodes have no direction of their own: take the coordinate axis that is most nearly tangent.
    away = _tangent(x, _axis_of_smallest(x, axes), axes)
    direction = jnp.where((length == 0) & (aligned < 0), away, direction)
    length = norm(direction, axes, keepdims=True)
    direction = jnp.where(length == 0, 0, direction / jnp.where(length == 0, 1, length))
    # Near antipodes the direction is mostly round-off; a second pass makes it tangent and of length one again.
    direction = _tangent(x, direction, axes)
    length = norm(direction, axes, keepdims=True)
    direction = jnp.where(length == 0, 0, direction / jnp.where(length == 0, 1, length))
    log = spherical_angle(x, y, axes) * direction
    if math.prod(x.shape[axis] for axis in axes) == 1:
        return jnp.where(aligned < 0, jnp.nan, log)
    return log


def spherical_angle(x: Array, y: Array, axes: tuple[int, ...]) -> Array:
    """Angle between unit vectors, accurate at 0 and at π (Kahan); infinite across components."""
    angle = 2 * jnp.arctan2(norm(y - x, axes, keepdims=True), norm(y + x, axes, keepdims=True))
    if math.prod(x.shape[axis] for axis in axes) == 1:
        return jnp.where(angle > 2, jnp.inf, 0 * angle)
    return angle


def _tangent(x: Array, g: Array, axes: tuple[int, ...]) -> Array:
    return g - jnp.sum(x * g, axis=axes, keepdims=True) * x


def _axis_of_smallest(x: Array, axes: tuple[int, ...]) -> Array:
    """The coordinate axis along which the entry of `x` is smallest in absolute value."""
    last = tuple(range(-len(axes), 0))
    moved = jnp.moveaxis(x, axes, last)
    count = math.prod(moved.shape[moved.ndim - len(axes) :])
    flat = moved.reshape(*moved.shape[: moved.ndim - len(axes)], count)
    index = jnp.argmin(jnp.abs(flat), axis=-1) if count else jnp.zeros(flat.shape[:-1], int)
    return jnp.moveaxis(jax.nn.one_hot(index, count, dtype=x.dtype).reshape(moved.shape), last, axes)


class Spherical(Manifold):
    """Unit vectors along `_axes`, all other axes being independent of each other."""

    _axes: tuple[int, ...]

    def _project(self, x, g):
        return _tangent(x, g, self._axes)

    def _retract(self, x, v):
        y = x + v
        squares = jnp.sum(jnp.square(y), axis=self._axes, keepdims=True)
        # A tangent step gives at least 1. Next to nothing, overflow and NaN mean that there is no step to take.
        info = jnp.finfo(x.dtype)
        usable = (squares > info.tiny / info.eps) & jnp.isfinite(squares)
        is_point = jnp.abs(jnp.sum(jnp.square(x), axis=self._axes, keepdims=True) - 1) < 0.1
        fallback = jnp.where(is_point, x, self.origin(x.shape[-2:], x.dtype))
        return jnp.where(usable, y / jnp.sqrt(jnp.where(usable, squares, 1)), fallback)

    def _exp(self, x, v):
        angle = norm(v, self._axes, keepdims=True)
        y = jnp.cos(angle) * x + jnp.sinc(angle / jnp.pi) * v
        return y / norm(y, self._axes, keepdims=True)

    def _log(self, x, y):
        return spherical_log(x, y, self._axes)

    def _dist(self, x, y):
        return norm(spherical_angle(x, y, self._axes), (-2, -1))

    def _nearest(self, x):
        # First by the largest entry: the length itself may overflow.
        top = lax.stop_gradient(largest(jnp.abs(x), self._axes, keepdims=True))
        x = x / jnp.where(top > 1, top, 1)
        length = norm(x, self._axes, keepdims=True)
        origin = jnp.broadcast_to(self.origin(x.shape[-2:], x.dtype), x.shape)
        return jnp.where(length > 0, x / jnp.where(length > 0, length, 1), origin)

    def _steepest(self, x, g, method, tangent, coarse):
        return unit(self._project(x, g) if tangent else g, self._axes)

    def _violation(self, x):
        return largest(jnp.abs(norm(x, self._axes, keepdims=True) - 1), (-2, -1))


@dataclasses.dataclass(frozen=True)
class Sphere(Spherical):
    """Matrices of Frobenius norm `radius`: ‖x‖_F = s.

    Dimension np - 1; sectional curvature 1/s². The projection is `g - <x, g> x / s²`, the retraction
    `s (x + v) / ‖x + v‖_F` (Absil et al. 2008, sections 3.6.1 and 4.1.1), exponential and logarithm are closed forms.

    Example:
      >>> import math
      >>> import jax
      >>> import fgsgd_jax as fg
      >>> x, y = fg.Sphere().random_point(jax.random.key(0), (2, 3, 3))
      >>> fg.Sphere().dim((3, 3)), bool(fg.Sphere().dist(x, y) <= math.pi)
      (8, True)
    """

    _axes = (-2, -1)

    def dim(self, shape):
        """Dimension np - 1."""
        return shape[0] * shape[1] - 1

    def _curvature_bounds(self, shape):
        return 1.0, 1.0

    def _squared_length(self, shape):
        return 1

    def origin(self, shape, dtype=jnp.float32):
        """All entries equal."""
        return jnp.full(shape, math.prod(shape) ** -0.5, dtype)
