"""A batch of matrices, each on a manifold of its own."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..linalg import compute_dtype
from ._euclidean import Euclidean
from ._manifold import Manifold, Steepest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Matrices of one shape of which `kind` says, one by one, on which of `manifolds` they lie.

    `kind` is an integer array over the leading axes (None if there is one manifold), `radius` a number or an array
    over the leading axes; the manifolds' own radii are not used. Every map is the manifold's own, run on the whole
    batch and selected by `kind`: that keeps shardings.
    """

    manifolds: tuple[Manifold, ...] = dataclasses.field(metadata={"static": True})
    kind: Int[Array, "*b"] | None
    radius: float | Float[Array, "*b"] = 1.0

    def with_radius(self, radius: float | Float[Array, "*b"]) -> "Mixture":
        """The same mixture at other radii."""
        return Mixture(self.manifolds, self.kind, radius)

    def project(self, x: Float[Array, "*b n p"], g: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Projection of `g` onto the tangent space at `x`."""
        return self.select(lambda m, _, x, g: m.project(x, g), x, g)

    def retract(self, x: Float[Array, "*b n p"], v: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Retraction of the tangent vectors `v`."""

        def retract(manifold, on, x, v):
            if on is not None:
                # A retraction may choose its iterations by the largest step of the batch: show it its own steps only.
                origin = manifold.origin(x.shape[-2:], compute_dtype(x.dtype)).astype(x.dtype)
                x, v = jnp.where(on, x, jnp.broadcast_to(origin, x.shape)), jnp.where(on, v, 0)
                manifold = manifold.with_radius(jnp.where(on[..., 0, 0], manifold.radius, 1))
            return manifold.retract(x, v)

        return self.select(retract, x, v)

    def steepest(
        self, x: Float[Array, "*b n p"], g: Float[Array, "*b n p"], method: Steepest, tangent: bool, coarse: bool
    ) -> Float[Array, "*b n p"]:
        """Directions of steepest ascent of `<g, ·>`."""

        def steepest(manifold, on, x, g):
            # An iteration lasts as long as the slowest of the batch: nothing is asked of the others.
            g = g if on is None else jnp.where(on, g, 0)
            return manifold.steepest(x, g, method, tangent=tangent, coarse=coarse)

        return self.select(steepest, x, g)

    def nearest(self, x: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Nearest points."""
        return self.select(lambda m, _, x: m.nearest(x), x)

    def from_gaussian(self, z: Float[Array, "*b n p"], x: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Uniform points, made from standard Gaussian matrices `z`; Euclidean matrices are those of `x`."""
        return self.select(lambda m, _, z, x: x if isinstance(m, Euclidean) else m.from_gaussian(z), z, x)

    def violation(self, x: Float[Array, "*b n p"]) -> Float[Array, "*b"]:
        """Violation of each matrix."""
        return self.select(lambda m, _, x: m.violation(x), x)

    def radius_of(self, x: Float[Array, "*b n p"]) -> Float[Array, "*b"]:
        """Radius at which each matrix lies; 1 for Euclidean ones."""
        return self.select(lambda m, _, x: m.radius_of(x), x)

    def rescale(self, x: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Points of any radius brought to exactly `radius`; Euclidean matrices as they are."""

        def rescale(manifold, _, x):
            if isinstance(manifold, Euclidean):
                return x
            return x * (manifold.radius / manifold.radius_of(x))[..., None, None]

        return self.select(rescale, x)

    def constrained(self, values: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """`values` where the manifold is not Euclidean, 0 elsewhere."""
        x = values[..., None, None]
        return self.select(lambda m, _, x: jnp.zeros_like(values) if isinstance(m, Euclidean) else values, x)

    def select(self, method: Callable[..., Array], x: Float[Array, "*b n p"], *others: Array) -> Array:
        """Of every matrix what `method(manifold, on, x, *others)` gives for its manifold.

        `on` says which matrices lie on that manifold; None where all do. `method` may be asked for all of them.
        """
        if self.kind is None:
            return method(self.manifolds[0].with_radius(self.radius), None, x, *others)
        selected = jnp.zeros(())
        for index, manifold in enumerate(self.manifolds):
            on = (self.kind == index)[..., None, None]
            result = method(manifold.with_radius(self.radius), on, x, *others)
            selected = jnp.where(on if result.ndim == x.ndim else on[..., 0, 0], result, selected) if index else result
        return selected
