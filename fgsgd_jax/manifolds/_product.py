"""Cartesian products of manifolds."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from ..linalg import largest
from ._manifold import Manifold

Points = tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product:
    """Cartesian product M₁ × … × M_m, with the sum of the metrics: a POM of the paper (definition 1).

    Points and vectors are tuples with one batch of matrices per factor; the batches' leading axes agree. Every map
    acts factor by factor, lengths add as in eq. 6: ‖v‖² = Σ ‖v_i‖².

    Args:
      manifolds: the factors.

    Raises:
      ValueError: in its methods, for tuples of another length.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, definition 1 and Theorem 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> pom = fg.Product((fg.Sphere(), fg.Euclidean()))
      >>> x, v = (jnp.array([[1.0], [0.0]]), jnp.zeros((1, 1))), (jnp.array([[0.0], [3.0]]), jnp.full((1, 1), 4.0))
      >>> float(pom.norm(x, v)), pom.dim([(2, 1), (1, 1)])
      (5.0, 2)
    """

    manifolds: tuple[Manifold, ...]

    @property
    def radius(self) -> tuple[float | Array, ...]:
        """The factors' radii."""
        return tuple(m.radius for m in self.manifolds)

    def with_radius(self, radius: float | Array | Sequence[float | Array]) -> "Product":
        """The same product with one radius for all factors, or one for each."""
        radii = radius if isinstance(radius, Sequence) else (radius,) * len(self.manifolds)
        return Product(tuple(m.with_radius(r) for m, r in zip(self.manifolds, radii, strict=True)))

    def _each(self, method: str, *arguments: Sequence) -> tuple:
        for argument in arguments:
            if len(argument) != len(self.manifolds):
                raise ValueError(
                    f"Product.{method} takes tuples of {len(self.manifolds)} arrays, one a factor, got {len(argument)}"
                )
        return tuple(getattr(m, method)(*of_factor) for m, *of_factor in zip(self.manifolds, *arguments, strict=True))

    def project(self, x: Points, g: Points) -> Points:
        """Projection onto the tangent space, factor by factor."""
        return self._each("project", x, g)

    def retract(self, x: Points, v: Points) -> Points:
        """Retraction, factor by factor."""
        return self._each("retract", x, v)

    def exp(self, x: Points, v: Points) -> Points:
        """Exponential map, factor by factor."""
        return self._each("exp", x, v)

    def log(self, x: Points, y: Points) -> Points:
        """Logarithm, factor by factor."""
        return self._each("log", x, y)

    def transport(self, x: Points, y: Points, v: Points) -> Points:
        """Vector transport, factor by factor."""
        return self._each("transport", x, y, v)

    def nearest(self, x: Points) -> Points:
        """Nearest point, factor by factor."""
        return self._each("nearest", x)

    def dist(self, x: Points, y: Points) -> Array:
        """Geodesic distance: the root of the sum of the factors' squares."""
        return functools.reduce(jnp.hypot, self._each("dist", x, y))

    def inner(self, x: Points, u: Points, v: Points) -> Array:
        """The metric: the sum of the factors'."""
        return functools.reduce(jnp.add, self._each("inner", x, u, v))

    def norm(self, x: Points, v: Points) -> Array:
        """Length of a tangent vector, by eq. 6."""
        return functools.reduce(jnp.hypot, self._each("norm", x, v))

    def violation(self, x: Points) -> Array:
        """The largest violation of a factor."""
        return largest(jnp.stack(self._each("violation", x)), 0)

    def dim(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """The sum of the factors' dimensions, for one shape per factor."""
        return sum(self._each("dim", shapes))

    def random_point(self, key: PRNGKeyArray, shapes: Sequence[tuple[int, ...]], dtype=jnp.float32) -> Points:
        """Independent uniform points, for one shape per factor."""
        keys = list(jax.random.split(key, len(self.manifolds)))
        return self._each("random_point", keys, shapes, (dtype,) * len(keys))

    def random_tangent(self, key: PRNGKeyArray, x: Points) -> Points:
        """Standard Gaussian vector of the tangent space at `x`."""
        return self._each("random_tangent", list(jax.random.split(key, len(self.manifolds))), x)

    def curvature_bounds(self, shapes: Sequence[tuple[int, ...]]) -> tuple[float | Array, float | Array]:
        """Bounds of the sectional curvatures, for one shape per factor: planes across two factors are flat."""
        bounds = self._each("curvature_bounds", shapes)
        moving = [bound for bound, dim in zip(bounds, self._each("dim", shapes), strict=True) if dim > 0]
        if len(moving) == 1:
            return moving[0]
        low, high = 0.0, 0.0
        for factor_low, factor_high in moving:
            low, high = jnp.minimum(low, factor_low), jnp.maximum(high, factor_high)
        return low, high
