"""A batch of matrices, each on a manifold of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..linalg import MATRICES_LAST, Layout, chunks_of, layout_for, norm, squared_norm
from ._chunks import by_chunks
from ._euclidean import Euclidean
from ._manifold import Manifold, compute_dtype
from ._shared_products import displace_together, project_together, share_products


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Matrices of one shape of which `kind` says, one by one, on which of `manifolds` they lie.

    `kind` is an integer array over the leading axes (None if there is one manifold), `radius` a number or an array
    over the leading axes; the manifolds' own radii are not used. Elementwise selection by `kind` keeps shardings and
    costs less than sorting small matrices. Each manifold's arithmetic runs on the whole batch, except for many small
    matrices, where all manifolds share the products of a step. Large ones are handled by chunks that stay in the cache.
    """

    manifolds: tuple[Manifold, ...]
    kind: Int[Array, "*b"] | None
    radius: float | Float[Array, "*b"] = 1.0

    def at(self, radius: float | Float[Array, "*b"]) -> "Mixture":
        """The same mixture at other radii."""
        return Mixture(self.manifolds, self.kind, radius)

    def project(self, x: Float[Array, "*b n p"], g: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Projection of `g` onto the tangent space at `x`."""
        return self.measured_projection(x, g)[0]

    def measured_projection(
        self, x: Float[Array, "*b n p"], g: Float[Array, "*b n p"]
    ) -> tuple[Float[Array, "*b n p"], Float[Array, "*b"]]:
        """`project`, and the squared norms as they come: they may overflow."""
        if self._by_parts(x.shape):
            return _project(self.manifolds, self.kind, self.radius, x, g)
        return self._project_each(x, g)

    def displace(
        self,
        x: Float[Array, "*b n p"],
        w: Float[Array, "*b n p"],
        radius: Float[Array, "*b"] | None = None,
        tangent: bool = False,
        factor: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, "*b n p"], Float[Array, "*b"]]:
        """The displacement `φ_x(v) - x`, v being `factor` times the tangent part of `w`, and ‖v‖_F/s (0 if Euclidean).

        The point reached is set to the new `radius` if that is given. `tangent` says that `w` has no other part.
        """
        if self._by_parts(x.shape):
            displacement, ratio = _displace(self.manifolds, tangent, self.kind, self.radius, x, w, radius, factor)
        else:
            growth = None if radius is None else radius / self.radius
            displacement, ratio = self._displace_each(x, w, growth, tangent, factor)
        return displacement, self.constrained(ratio)

    def nearest(self, x: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Nearest points."""
        return self._select(lambda m, _, x: m.nearest(x), x)

    def from_gaussian(self, z: Float[Array, "*b n p"], x: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Uniform points, made from standard Gaussian matrices `z`; Euclidean matrices are those of `x`."""
        return self._select(lambda m, _, x: x if isinstance(m, Euclidean) else m.from_gaussian(z), x)

    def violation(self, x: Float[Array, "*b n p"]) -> Float[Array, "*b"]:
        """Violation of each matrix."""
        return self._select(lambda m, _, x: m.violation(x), x)

    def radius_of(self, x: Float[Array, "*b n p"]) -> Float[Array, "*b"]:
        """Radius at which each matrix lies; 1 for Euclidean ones."""
        return self._select(lambda m, _, x: m.radius_of(x), x)

    def rescale(self, x: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
        """Points of any radius brought to exactly `radius`; Euclidean matrices as they are."""

        def rescale(manifold, _, x):
            if isinstance(manifold, Euclidean):
                return x
            return x * (manifold.radius / manifold.radius_of(x))[..., None, None]

        return self._select(rescale, x)

    def constrained(self, ones: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """`ones` where the manifold is not Euclidean, 0 elsewhere."""
        x = ones[..., None, None]
        return self._select(lambda m, _, x: 0 * ones if isinstance(m, Euclidean) else ones, x)

    def _by_parts(self, shape: tuple[int, ...]) -> bool:
        """Whether other functions than the manifolds' own are faster, on the whole batch."""
        return share_products(self.manifolds, shape) or _large(shape)

    def _project_each(self, x: Array, g: Array) -> tuple[Array, Array]:
        v = self._select(lambda m, _, x, g: m.project(x, g), x, g)
        return v, squared_norm(v)

    def _displace_each(
        self, x: Array, w: Array, growth: Array | None, tangent: bool, factor: float | Array
    ) -> tuple[Array, Array]:
        def retract(manifold, on, x, v):
            if on is not None:
                # A retraction may choose its algorithm by the largest step of the batch: show it its own steps only.
                origin = manifold.origin(x.shape[-2:], compute_dtype(x.dtype)).astype(x.dtype)
                origin = jnp.broadcast_to(origin, x.shape)
                x, v = jnp.where(on, x, origin), jnp.where(on, v, 0)
                manifold = manifold.with_radius(jnp.where(on[..., 0, 0], manifold.radius, 1))
            return manifold.retract(x, v)

        v = factor * (w if tangent else self._project_each(x, w)[0])
        y = self._select(retract, x, v)
        if growth is not None:
            y = y * growth[..., None, None]
        return y - x, norm(v, (-2, -1)) / self.radius

    def _select(self, method, x: Array, *vectors: Array) -> Array:
        if self.kind is None:
            return method(self.manifolds[0].with_radius(self.radius), None, x, *vectors)
        selected = jnp.zeros(())
        for index, manifold in enumerate(self.manifolds):
            on = (self.kind == index)[..., None, None]
            result = method(manifold.with_radius(self.radius), on, x, *vectors)
            selected = jnp.where(on if result.ndim == x.ndim else on[..., 0, 0], result, selected) if index else result
        return selected


def _part(manifolds: tuple[Manifold, ...], layout: Layout, kind: Array | None, radius: Array) -> Mixture:
    """Some of a mixture's matrices, of which `kind` and `radius` are given in a layout."""
    return Mixture(manifolds, None if kind is None else layout.give_values(kind), layout.give_values(radius))


def _large(shape: tuple[int, ...]) -> bool:
    """Whether the matrices do not stay in the cache together."""
    return layout_for(shape) is MATRICES_LAST and chunks_of(shape) > 1


# What is found at run time has no derivative, and a loop over chunks a slow one; derivatives are those of the
# manifolds' own methods.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _project(manifolds, kind, at, x, g) -> tuple[Array, Array]:
    if share_products(manifolds, x.shape):
        return project_together(manifolds, kind, at, x, g)

    def project(layout, x, g, kind, at, _):
        v, squares = _part(manifolds, layout, kind, at)._project_each(x, g)
        return v, layout.take_values(squares)

    return by_chunks(project, x, g, kind, at)


@_project.defjvp
def _project_jvp(manifolds, primals, tangents):
    def project_each(kind, at, x, g):
        return Mixture(manifolds, kind, at)._project_each(x, g)

    return _project(manifolds, *primals), jax.jvp(project_each, primals, tangents)[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _displace(manifolds, tangent: bool, kind, at, x, w, radius, factor) -> tuple[Array, Array]:
    if share_products(manifolds, x.shape):
        return displace_together(manifolds, kind, at, x, w, radius, factor, tangent)

    def displace(layout, x, w, kind, at, _, growth, factor):
        growth = None if growth is None else layout.give_values(growth)
        displacement, ratio = _part(manifolds, layout, kind, at)._displace_each(x, w, growth, tangent, factor)
        return displacement, layout.take_values(ratio)

    return by_chunks(displace, x, w, kind, at, radius, scalars=(factor,))


@_displace.defjvp
def _displace_jvp(manifolds, tangent, primals, tangents):
    def displace_each(kind, at, x, w, radius, factor):
        growth = None if radius is None else radius / at
        return Mixture(manifolds, kind, at)._displace_each(x, w, growth, tangent, factor)

    return _displace(manifolds, tangent, *primals), jax.jvp(displace_each, primals, tangents)[1]
