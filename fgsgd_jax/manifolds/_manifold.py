"""What every manifold of matrices shares: the radius, the dtype of the arithmetic, and the derived methods."""

import abc
import dataclasses
import functools
import math
from typing import Any, Final, Literal, Self, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ..linalg import compute_dtype, norm

Steepest = Literal["polar", "dual"]


class _Unstated(float):
    """The radius of a manifold for which none was given: a single object, also after copies and pickles.

    A plan puts γ in its place. Everywhere else it is the number 1, and one leaf.
    """

    def __new__(cls) -> Self:
        return super().__new__(cls, 1)

    def __reduce__(self) -> str:
        # The name of a global of this module.
        return "UNSTATED"


UNSTATED: Final = _Unstated()


@dataclasses.dataclass(frozen=True)
class Manifold(abc.ABC):
    """A Riemannian submanifold of the n×p matrices with the Frobenius metric, scaled by `radius`.

    Points and vectors are arrays `[..., n, p]` of one dtype. Every method works on all leading axes at once, computes
    in at least float32 and returns that dtype. `radius` is a number or an array that broadcasts over the leading axes.

    A manifold of your own is a subclass: a frozen dataclass, whose fields beside `radius` are static and hashable. It
    is a pytree by being a subclass, with `radius` as its leaf. It describes the geometry at radius 1, in the methods
    that start with an underscore; this class does the scaling and the dtypes.

    | method | at radius 1, for arrays `[..., n, p]` |
    |---|---|
    | `_project(x, g)` | the tangent part of `g` at `x` |
    | `_retract(x, v)` | a point near x + v; `x` where there is none |
    | `_exp(x, v)`, `_log(x, y)` | the end of the geodesic; its initial velocity, NaN where none was found |
    | `_nearest(x)` | the nearest point |
    | `_violation(x)` | `[...]`, the largest residual of the defining equation |
    | `_squared_length(shape)` | ‖x‖_F², the same for all points |
    | `_curvature_bounds(shape)` | bounds of the sectional curvature |
    | `dim(shape)`, `origin(shape, dtype)` | the dimension; any one point |
    | `_dist(x, y)` | if it is not the norm of `_log(x, y)` |
    | `_from_gaussian(z)` | if `_nearest` of a Gaussian matrix is not uniform |
    | `_steepest(x, g, method, tangent, coarse)` | if the norm of directions is not Frobenius' |

    Args:
      radius: s, in the units of the points. Left out, it is 1; in the rules of a plan it is γ of eq. 2.

    References:
      Absil, Mahony & Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> spheres = fg.Sphere(radius=jnp.array([1.0, 2.0]))  # two, one of each radius
      >>> isinstance(spheres, fg.Manifold), spheres.with_radius(3.0)
      (True, Sphere(radius=3.0))
      >>> points = spheres.random_point(jax.random.key(0), (2, 3, 3))
      >>> [round(float(x), 6) for x in jnp.linalg.norm(points, axis=(1, 2))]
      [1.0, 2.0]
    """

    radius: float | Array = UNSTATED

    def __init_subclass__(cls, **kwargs: Any):
        # `jax.tree_util.register_dataclass` would make structures of different classes equal (JAX 0.10.2 compares their
        # static fields alone): once in a hundred or so, a function that was compiled for one manifold then runs for
        # another.
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_pytree_with_keys(cls, _flatten, functools.partial(_unflatten, cls))

    @abc.abstractmethod
    def _project(self, x: Array, g: Array) -> Array:
        """Orthogonal projection of `g` onto the tangent space at `x`."""

    @abc.abstractmethod
    def _retract(self, x: Array, v: Array) -> Array:
        """A point, x + v to first order; `x` where none can be computed."""

    @abc.abstractmethod
    def _exp(self, x: Array, v: Array) -> Array:
        """The end of the geodesic from `x` with velocity `v`."""

    @abc.abstractmethod
    def _log(self, x: Array, y: Array) -> Array:
        """A shortest `v` with `_exp(x, v) = y`; NaN where none was found."""

    @abc.abstractmethod
    def _nearest(self, x: Array) -> Array:
        """The point nearest to any matrix `x`."""

    @abc.abstractmethod
    def _violation(self, x: Array) -> Array:
        """Largest absolute entry of the defining equation's residual, one number a matrix."""

    @abc.abstractmethod
    def _curvature_bounds(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """Bounds of the sectional curvature, for manifolds of dimension 2 or more."""

    @abc.abstractmethod
    def _squared_length(self, shape: tuple[int, ...]) -> int:
        """‖x‖_F² of the points of radius 1, the same for all of them."""

    @abc.abstractmethod
    def dim(self, shape: tuple[int, ...]) -> int:
        """Dimension of the manifold of matrices of `shape` (n, p)."""

    def _sample(self, x: Array) -> tuple[Array, int]:
        """A part of `x` whose length tells the radius, and its squared length at radius 1."""
        return x, self._squared_length(x.shape[-2:])

    def _dist(self, x: Array, y: Array) -> Array:
        """Geodesic distance."""
        return norm(self._log(x, y), axis=(-2, -1))

    def _from_gaussian(self, z: Array) -> Array:
        """A uniform point made of a standard Gaussian matrix."""
        # The Gaussian is invariant under the isometries of all our manifolds, so its nearest point is uniform.
        return self._nearest(z)

    def _steepest(self, x: Array, g: Array, method: Steepest, tangent: bool, coarse: bool) -> Array:
        """The vector of norm 1, tangent if asked for, with the largest inner product with `g`; 0 for 0."""
        del method, coarse
        return unit(self._project(x, g) if tangent else g, (-2, -1))

    def with_radius(self, radius: float | Array) -> Self:
        """The same manifold at another radius, a number or an array over the leading axes of the points.

        Example:
          >>> import fgsgd_jax as fg
          >>> fg.Sphere().with_radius(2.0)
          Sphere(radius=2.0)
        """
        return dataclasses.replace(self, radius=radius)

    def project(self, x: Float[Array, "*b n p"], g: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Orthogonal projection of the ambient vector `g` onto the tangent space at `x`: Π_x(g).

        Args:
          x: points.
          g: any matrices, such as gradients.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> east, north = jnp.array([[2.0], [0.0]]), jnp.array([[0.0], [2.0]])
          >>> circle = fg.Sphere(radius=2.0)
          >>> circle.project(east, east + north).ravel().tolist()
          [0.0, 2.0]
        """
        s = self._scale(x)
        return self._project(_up(x) / s, _up(g)).astype(g.dtype)

    def retract(self, x: Float[Array, "*b n p"], v: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """A point in the direction of the tangent vector `v` from `x`: `exp` to first order.

        It is on the manifold to round-off for a tangent vector of any length. `v` need not be tangent: spheres, oblique
        matrices and the polar retraction go to the point nearest to x + v, "qr" factorizes x + v, and "cayley" and
        "exp" project v first. If no point can be computed (`v` is not finite, or `x + v` is singular, which no tangent
        vector leads to), the result is `x`, to round-off, or some point of the manifold if `x` is not on it.

        Args:
          x: points.
          v: tangent vectors at them.

        References:
          Absil, Mahony & Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008, section 4.1.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> east, north = jnp.array([[2.0], [0.0]]), jnp.array([[0.0], [2.0]])
          >>> circle = fg.Sphere(radius=2.0)
          >>> [round(z, 6) for z in circle.retract(east, north).ravel().tolist()]  # at 45°
          [1.414214, 1.414214]
        """
        s = self._scale(x)
        return (s * self._retract(_up(x) / s, _up(v) / s)).astype(x.dtype)

    def exp(self, x: Float[Array, "*b n p"], v: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Exponential map: the end of the geodesic that leaves `x` with velocity `v`, after time 1.

        Args:
          x: points.
          v: tangent vectors at them.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> east, north = jnp.array([[2.0], [0.0]]), jnp.array([[0.0], [2.0]])
          >>> circle = fg.Sphere(radius=2.0)
          >>> [round(z, 6) + 0.0 for z in circle.exp(east, jnp.pi / 2 * north).ravel().tolist()]  # a length of π
          [0.0, 2.0]
        """
        s = self._scale(x)
        return (s * self._exp(_up(x) / s, _up(v) / s)).astype(x.dtype)

    def log(self, x: Float[Array, "*b n p"], y: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Logarithm: a shortest tangent vector at `x` with `exp(x, log(x, y)) = y`; NaN where none was found.

        If several are shortest (antipodal points), it is one of them, the same each time. Across components it is NaN.

        Args:
          x: points.
          y: points on the same manifold.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> east, north = jnp.array([[2.0], [0.0]]), jnp.array([[0.0], [2.0]])
          >>> circle = fg.Sphere(radius=2.0)
          >>> [round(z, 6) for z in circle.log(east, north).ravel().tolist()]  # a length of π
          [0.0, 3.141593]
        """
        s = self._scale(x)
        return (s * self._log(_up(x) / s, _up(y) / s)).astype(x.dtype)

    def dist(self, x: Float[Array, "*b n p"], y: Float[Array, "*b n p"]) -> Float[Array, "*b"]:
        """Geodesic distance, in the units of the radius; infinite across components.

        Args:
          x: points.
          y: points on the same manifold.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> east, north = jnp.array([[2.0], [0.0]]), jnp.array([[0.0], [2.0]])
          >>> circle = fg.Sphere(radius=2.0)
          >>> round(float(circle.dist(east, north)), 6)
          3.141593
        """
        s = self._scale(x)
        return (s[..., 0, 0] * self._dist(_up(x) / s, _up(y) / s)).astype(x.dtype)

    def transport(
        self, x: Float[Array, "*b n p"], y: Float[Array, "*b n p"], v: Float[Array, "*b n p"]
    ) -> Float[Array, "*b n p"]:
        """Vector transport of `v` from `x` to `y`: the projection at `y` (Absil et al. 2008, section 8.1.3).

        Args:
          x: points.
          y: points on the same manifold.
          v: tangent vectors at `x`.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> east, north = jnp.array([[2.0], [0.0]]), jnp.array([[0.0], [2.0]])
          >>> circle = fg.Sphere(radius=2.0)
          >>> circle.transport(east, north, north).ravel().tolist()
          [0.0, 0.0]
        """
        del x
        return self.project(y, v)

    def inner(
        self, x: Float[Array, "*b n p"], u: Float[Array, "*b n p"], v: Float[Array, "*b n p"]
    ) -> Float[Array, "*b"]:
        """The metric: the Frobenius inner product of the tangent vectors `u` and `v` at `x`, in squared units of them.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> east, north = jnp.array([[2.0], [0.0]]), jnp.array([[0.0], [2.0]])
          >>> circle = fg.Sphere(radius=2.0)
          >>> float(circle.inner(east, north, north))
          4.0
        """
        del x
        return jnp.sum(_up(u) * _up(v), axis=(-2, -1)).astype(u.dtype)

    def norm(self, x: Float[Array, "*b n p"], v: Float[Array, "*b n p"]) -> Float[Array, "*b"]:
        """Length of the tangent vector `v` at `x`.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> east, north = jnp.array([[2.0], [0.0]]), jnp.array([[0.0], [2.0]])
          >>> circle = fg.Sphere(radius=2.0)
          >>> float(circle.norm(east, north))
          2.0
        """
        del x
        return norm(_up(v), axis=(-2, -1)).astype(v.dtype)

    def nearest(self, x: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """The point of the manifold nearest to the matrix `x`; if there are several, one of them, the same each time.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> [round(z, 6) for z in fg.Sphere().nearest(jnp.array([[3.0], [4.0]])).ravel().tolist()]
          [0.6, 0.8]
        """
        return (self._scale(x) * self._nearest(_up(x))).astype(x.dtype)

    def violation(self, x: Float[Array, "*b n p"]) -> Float[Array, "*b"]:
        """Largest absolute entry of the defining equation's residual at `x/radius`. No unit; 0 on the manifold.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> float(fg.Stiefel().violation(2 * jnp.eye(3)))  # of xᵀx - 1
          3.0
        """
        return self._violation(_up(x) / self._scale(x))

    def steepest(
        self,
        x: Float[Array, "*b n p"],
        g: Float[Array, "*b n p"],
        method: Steepest = "polar",
        *,
        tangent: bool = True,
        coarse: bool = False,
    ) -> Float[Array, "*b n p"]:
        """The direction in which `<g, ·>` rises most steeply: of norm `radius`, in the manifold's own norm.

        The norm is Frobenius' on spheres (and manifolds of your own), the largest column norm on oblique matrices, and
        the spectral norm on Stiefel and Euclidean matrices (whose radius counts as 1). So the direction is the
        projection of `g` divided by its length; on oblique matrices, column by column; on Stiefel and Euclidean
        matrices, with its singular values replaced by 1. Where the projection is 0, so is the direction.

        On Stiefel this is `"polar"`, the steepest of all matrices, which is not tangent unless n = p. `"dual"` is the
        steepest tangent vector, to 1e-4 of `<g, ·>`. It takes tens to hundreds of times the products and has no
        derivative.

        Args:
          x: points.
          g: any matrices, such as gradients.
          method: `"polar"` or `"dual"`; they differ on Stiefel alone.
          tangent: whether `g` is projected first. False: the direction of `g` itself, not for `"dual"`.
          coarse: whether products take JAX's default precision, not for `"dual"`: singular values above 1e-3 of the
            Frobenius norm end within 15 % of 1.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> east, north = jnp.array([[2.0], [0.0]]), jnp.array([[0.0], [3.0]])
          >>> fg.Sphere(radius=2.0).steepest(east, east + north).ravel().tolist()
          [0.0, 2.0]
        """
        check_steepest(method, tangent, coarse)
        s = self._scale(x)
        return (s * self._steepest(_up(x) / s, _up(g), method, tangent, coarse)).astype(g.dtype)

    def radius_of(self, x: Float[Array, "*b n p"]) -> Float[Array, "*b"]:
        """The radius at which the point `x` lies, whatever `radius` says: exact for a point of any radius.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> float(fg.Oblique().radius_of(2 * jnp.eye(4)))
          2.0
        """
        x, squared_length = self._sample(_up(x))
        length = norm(x, axis=(-2, -1), keepdims=True)
        # Summed one by one, as compilers may, squares are off by 5e-7 at 32×32; their deviations from the mean are not.
        squares = jnp.square(x / jnp.where(length > 0, length, 1)) - 1 / math.prod(x.shape[-2:])
        length = length[..., 0, 0] * (1 + jnp.sum(squares, axis=(-2, -1)) / 2)
        return length / squared_length**0.5

    def random_point(
        self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
    ) -> Float[Array, "*b n p"]:
        """Points drawn from the uniform (isometry-invariant) distribution.

        Args:
          key: a JAX random key.
          shape: [..., n, p].
          dtype: of the points; computed in float32 at least.

        Example:
          >>> import jax
          >>> import fgsgd_jax as fg
          >>> x = fg.Stiefel().random_point(jax.random.key(0), (5, 4, 2))
          >>> x.shape, bool((fg.Stiefel().violation(x) < 1e-6).all())
          ((5, 4, 2), True)
        """
        return self.from_gaussian(jax.random.normal(key, shape, compute_dtype(dtype))).astype(dtype)

    def from_gaussian(self, z: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Uniform points, made from standard Gaussian matrices `z`: what `random_point` does with its draw.

        Example:
          >>> import jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> fg.Sphere().from_gaussian(jnp.array([[0.0], [-0.3]])).ravel().tolist()
          [0.0, -1.0]
        """
        return (self._scale(z) * self._from_gaussian(_up(z))).astype(z.dtype)

    def random_tangent(self, key: PRNGKeyArray, x: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Standard Gaussian vectors of the tangent spaces at `x`.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> import fgsgd_jax as fg
          >>> x = jnp.eye(3)
          >>> v = fg.Stiefel().random_tangent(jax.random.key(0), x)
          >>> bool(jnp.abs(v + v.T).max() < 1e-6)  # skew at the identity
          True
        """
        return self.project(x, jax.random.normal(key, x.shape, compute_dtype(x.dtype)).astype(x.dtype))

    def curvature_bounds(self, shape: tuple[int, ...]) -> tuple[float | Array, float | Array]:
        """Lower and upper bound of the sectional curvatures for matrices of `shape` (n, p), in radius⁻².

        (0, 0) where there is no two-plane (dimension below 2).

        Args:
          shape: (n, p).

        Example:
          >>> import fgsgd_jax as fg
          >>> fg.Sphere(radius=2.0).curvature_bounds((3, 3))
          (0.25, 0.25)
          >>> fg.Stiefel().curvature_bounds((3, 3)), fg.Stiefel().curvature_bounds((5, 3))
          ((0.125, 0.125), (-0.5, 1.0))
        """
        low, high = self._curvature_bounds(shape) if self.dim(shape) >= 2 else (0.0, 0.0)
        return low / self.radius**2, high / self.radius**2

    @abc.abstractmethod
    def origin(self, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Float[Array, "n p"]:
        """A fixed point of radius 1, for matrices of `shape` (n, p)."""

    def _scale(self, x: Array) -> Array:
        """The radius, shaped to multiply the matrices of `x`."""
        radius = jnp.asarray(self.radius, compute_dtype(x.dtype))
        if radius.ndim > x.ndim - 2:
            raise ValueError(
                f"a radius of shape {radius.shape} does not broadcast over the leading axes of an array of shape "
                f"{x.shape}: give a number or an array over {x.shape[:-2]}"
            )
        return radius.reshape((1,) * (x.ndim - 2 - radius.ndim) + radius.shape + (1, 1))


def unit(x: Array, axes: tuple[int, ...]) -> Array:
    """The vectors along `axes` divided by their length; 0 for 0."""
    length = norm(x, axes, keepdims=True)
    return jnp.where(length > 0, x / jnp.where(length > 0, length, 1), 0)


def check_steepest(method: str, tangent: bool, coarse: bool) -> None:
    """Raises for options of `steepest` that make no sense."""
    if method not in get_args(Steepest):
        raise ValueError(f"steepest(method={method!r}): choose one of {get_args(Steepest)}")
    if method == "dual" and (coarse or not tangent):
        raise ValueError(
            "steepest(method='dual') finds the steepest tangent vector exactly: leave out "
            f"{'coarse=True' if coarse else 'tangent=False'}, or take method='polar'"
        )


def _up(x: Array) -> Array:
    return x.astype(compute_dtype(x.dtype))


# Fields are looked up late: a class is registered before it becomes a dataclass.


@functools.cache
def _static_fields(cls: type[Manifold]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls) if field.name != "radius")


def _flatten(manifold: Manifold) -> tuple[tuple, tuple]:
    static = tuple(getattr(manifold, name) for name in _static_fields(type(manifold)))
    return ((jax.tree_util.GetAttrKey("radius"), manifold.radius),), static


def _unflatten(cls: type[Manifold], static: tuple, leaves: Any) -> Any:
    # Without the constructor: while JAX transforms trees, leaves may be anything.
    manifold = object.__new__(cls)
    for name, value in zip(("radius", *_static_fields(cls)), (*leaves, *static), strict=True):
        object.__setattr__(manifold, name, value)
    return manifold
