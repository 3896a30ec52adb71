"""A step of many small matrices on different manifolds, which share the matrix products.

On the Euclidean space, the sphere, the oblique and the Stiefel manifold alike the projection is `g - x C(xᵀg)/s²` and
the retraction is `s y C(yᵀy)` with `y = (x + v)/s`; only the p×p matrix C depends on the manifold, and is diagonal
but for Stiefel. Inside this file matrices are in the layout for many small ones, `[blocks, n, p, lanes]`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ..linalg import (
    LARGEST_DEVIATION,
    MATRICES_LAST,
    Layout,
    chunks_of,
    gram_less_eye,
    infinity_norm,
    inverse_root_less_eye,
    iterate,
    largest,
    layout_for,
)
from ._euclidean import Euclidean
from ._manifold import Manifold
from ._oblique import Oblique
from ._sphere import Sphere
from ._stiefel import Stiefel, shortened


def share_products(manifolds: tuple[Manifold, ...], shape: tuple[int, ...]) -> bool:
    """Whether the functions below serve points of `shape` [*batch, n, p] on these manifolds, and are the fastest."""
    return (
        layout_for(shape) is not MATRICES_LAST
        and shape[-2] >= shape[-1]
        and all(isinstance(m, (Euclidean, Sphere, Oblique)) or m == Stiefel(m.radius) for m in manifolds)
    )


def project_together(manifolds, kind: Array | None, radius: float | Array, x: Array, g: Array) -> tuple[Array, Array]:
    """The projections of `g` onto the tangent spaces at `x`, both [*batch, n, p], and their squared norms [*batch].

    `kind` and `radius` are arrays [*batch].
    """

    def project(layout, x, g, kind, radius):
        v = _Shared(manifolds, layout).project(x, g, kind, radius)
        return v, layout.apart(lambda v: layout.sum(jnp.square(v)), v)

    return _by_chunks(project, x, g, kind, radius)


def displace_together(
    manifolds, kind: Array | None, radius: float | Array, x: Array, w: Array, new_radius: Array | None, tangent: bool
) -> tuple[Array, Array]:
    """`φ_x(v) - x` with v the tangent part of `w`, and ‖v‖/s; arrays as above, the result at `new_radius` if given."""

    def displace(layout, x, w, kind, radius, new_radius):
        shared = _Shared(manifolds, layout)
        v = w if tangent else shared.project(x, w, kind, radius)
        return shared.displace(x, v, kind, radius, new_radius)

    return _by_chunks(displace, x, w, kind, radius, new_radius)


def _by_chunks(function: Callable, x: Array, w: Array, kind: Array | None, radius: float | Array, *radii: Array | None):
    """`function(layout, x, w, kind, radius, *radii)`, of arrays in the layout: an array like `w`, a figure a matrix.

    On CPU in chunks, so that the intermediate results stay in the cache. Those of a whole network would be new to the
    process at every call, and the page faults cost more than the arithmetic.
    """
    batch, layout = x.shape[:-2], layout_for(x.shape)
    values = [kind, jnp.broadcast_to(jnp.asarray(radius, x.dtype), batch), *radii]
    # What goes into a loop or a branch is shaped as it is in memory, or it would be copied at every turn.
    x, w = layout.keep(x), layout.keep(w)
    # More than one batch axis means that the axes may be sharded.
    chunks = chunks_of(*batch) if len(batch) == 1 else 1

    def whole(x, w, *values):
        return _in_lanes(function, layout, x, w, *values)

    def chunked(x, w, *values):
        size = batch[0] // chunks
        part_layout = layout_for((size, *x.shape[:2]))

        def chunk(index, carry):
            def part(a: Array) -> Array:
                return lax.dynamic_slice_in_dim(a, index * size, size, a.ndim - 1)

            # The result takes the place of what it is made from.
            results = _in_lanes(function, part_layout, x, carry[0], *values, part=part)
            return tuple(
                lax.dynamic_update_slice_in_dim(a, own, index * size, a.ndim - 1)
                for a, own in zip(carry, results, strict=True)
            )

        return lax.fori_loop(0, chunks, chunk, (w, jnp.zeros_like(values[1])))

    results, figures = lax.platform_dependent(x, w, *values, cpu=chunked if chunks > 1 else whole, default=whole)
    return layout.kept(results), figures


def _in_lanes(function: Callable, layout: Layout, x: Array, w: Array, *values: Array | None, part=lambda a: a):
    """`function` of some `part` of the arrays `[n, p, *batch]`, answered in that order."""
    x, w = (layout.apart(lambda a: layout.take_kept(part(a)), each) for each in (x, w))
    own = (None if each is None else layout.take_values(part(each)) for each in values)
    result, figure = function(layout, x, w, *own)
    return layout.apart(layout.keep_given, result), layout.give_values(figure)


class _Shared:
    """The arithmetic of a batch on these manifolds. Every array is in `layout`, one value a matrix included."""

    def __init__(self, manifolds: tuple[Manifold, ...], layout: Layout):
        self.manifolds, self.layout = manifolds, layout
        self.stiefel = any(isinstance(manifold, Stiefel) for manifold in manifolds)
        self.lengths = any(isinstance(manifold, (Sphere, Oblique)) for manifold in manifolds)

    def project(self, x: Array, g: Array, kind: Array | None, radius: Array) -> Array:
        """`g - x C(xᵀg)/s²`."""
        layout, shape = self.layout, (x, g, kind, radius)

        def normal_by_columns(x, g, kind, radius):
            return self._lengths(kind, x * g, 0.0) / jnp.square(radius)

        def sum_of_products(x, g):
            products = layout.gram(x, g)
            return products + layout.transpose(products)

        def tangent(x, g, kind, radius, columns, products):
            normal = x * columns if self.lengths else jnp.zeros_like(g)
            if self.stiefel:
                normal = self._where_stiefel(kind, layout.matmul(x, products) / (2 * jnp.square(radius)), normal)
            return g - normal

        columns = layout.apart(normal_by_columns, *shape) if self.lengths else None
        products = layout.apart(sum_of_products, x, g) if self.stiefel else None
        return layout.apart(tangent, *shape, columns, products)

    def displace(self, x: Array, v: Array, kind: Array | None, radius: Array, new_radius: Array | None):
        """`s y C(yᵀy) - x` with `y = (x + v)/s`, and ‖v‖/s."""
        layout = self.layout

        def scaled(x, v, kind, radius):
            return (x + v) / self._of_kind(kind, lambda m: 1.0 if isinstance(m, Euclidean) else radius, radius)

        def ratio(v, radius):
            return jnp.sqrt(layout.sum(jnp.square(v / radius)))

        def furthest_of(e, kind):
            return self._where_stiefel(kind, infinity_norm(e, layout), 0.0)

        y = layout.apart(scaled, x, v, kind, radius)
        ratios = layout.apart(ratio, v, radius)
        if not self.stiefel:
            return self._placed(x, y, None, kind, radius, new_radius), ratios
        e = layout.apart(lambda y: gram_less_eye(y, layout), y)
        furthest = largest(layout.apart(furthest_of, e, kind))

        def by_gram(x, v, y, e):
            del v
            root = inverse_root_less_eye(e, furthest, layout)
            return self._placed(x, y, root, kind, radius, new_radius)

        def by_iteration(x, v, y, e):
            del e
            origin = layout.eye(x)
            start = self._where_stiefel(kind, x / radius, origin)
            step = self._where_stiefel(kind, v / radius, 0.0)
            polar = iterate(start + shortened(step, layout), start, layout)
            y = self._where_stiefel(kind, polar, y)
            return self._placed(x, y, jnp.zeros_like(layout.gram(y, y)), kind, radius, new_radius)

        return lax.cond(furthest <= LARGEST_DEVIATION, by_gram, by_iteration, x, v, y, e), ratios

    def _placed(self, x, y, root, kind, radius, new_radius) -> Array:
        """`s y C - x`; no step where y is zero, overflows or is not a number."""
        layout = self.layout

        def lengths(y, kind):
            # One where nothing is normalized: the polar factor of a tangent step exists, and Euclidean steps are free.
            squares = self._lengths(kind, jnp.square(y), 1.0)
            usable = (squares > 0) & jnp.isfinite(squares)
            return jnp.where(usable, 1 / jnp.sqrt(jnp.where(usable, squares, 1)), 0)

        def placed(x, y, root, columns, kind, radius, new_radius):
            s = self._of_kind(kind, lambda m: 1.0 if isinstance(m, Euclidean) else radius, radius)
            point = y if columns is None else jnp.where(columns > 0, y * columns, x / s)
            if self.stiefel:
                point = self._where_stiefel(kind, y + layout.matmul(y, root), point)
            point = s * point
            return (point if new_radius is None else point * (new_radius / radius)) - x

        columns = layout.apart(lengths, y, kind) if self.lengths else None
        return layout.apart(placed, x, y, root, columns, kind, radius, new_radius)

    def _lengths(self, kind: Array | None, entries: Array, otherwise: float) -> Array:
        """Sums over the columns of oblique matrices and over all of those on spheres [blocks, 1, p, lanes]."""
        columns = self.layout.sum(entries, 0)
        total = jnp.broadcast_to(self.layout.sum(columns, 1), columns.shape)

        def of(manifold: Manifold) -> Array | float:
            return total if isinstance(manifold, Sphere) else columns if isinstance(manifold, Oblique) else otherwise

        return self._of_kind(kind, of, columns)

    def _where_stiefel(self, kind: Array | None, values: Array, others: Array | float) -> Array:
        return self._of_kind(kind, lambda m: values if isinstance(m, Stiefel) else others, values)

    def _of_kind(self, kind: Array | None, value: Callable[[Manifold], Array | float], like: Array) -> Array:
        """`value(manifold)` for the manifold of each matrix."""
        values = [value(manifold) for manifold in self.manifolds]
        selected = jnp.asarray(values[0], like.dtype)
        for index, other in enumerate(values):
            if other is not values[0]:
                selected = jnp.where(kind == index, jnp.asarray(other, like.dtype), selected)
        return selected
