"""A step of many small matrices on different manifolds, which share the matrix products.

On the Euclidean space, the sphere, the oblique and the Stiefel manifold alike the projection is `g - x C(xᵀg)/s²` and
the retraction is `s y C(yᵀy)` with `y = (x + v)/s`; only the p×p matrix C depends on the manifold, and is diagonal
but for Stiefel. Inside this file matrices are in the layout for many small ones, `[blocks, n, p, lanes]`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from ..linalg import (
    MATRICES_LAST,
    Layout,
    gram_less_eye,
    iterate,
    largest,
    layout_for,
    spectral_bounds,
    with_inverse_root,
    within_reach,
)
from ._chunks import by_chunks
from ._euclidean import Euclidean
from ._manifold import Manifold
from ._oblique import Oblique
from ._sphere import Sphere
from ._stiefel import Stiefel


def share_products(manifolds: tuple[Manifold, ...], shape: tuple[int, ...]) -> bool:
    """Whether the functions below serve points of `shape` [*batch, n, p] on these manifolds, and are the fastest."""
    return (
        layout_for(shape) is not MATRICES_LAST
        and shape[-2] >= shape[-1]
        and all(isinstance(m, (Euclidean, Sphere, Oblique)) or m == Stiefel(m.radius) for m in manifolds)
    )


def project_together(
    manifolds: tuple[Manifold, ...], kind: Array | None, radius: float | Array, x: Array, g: Array
) -> tuple[Array, Array]:
    """The projections of `g` onto the tangent spaces at `x`, both [*batch, n, p], and their squared norms [*batch].

    `kind` is an array [*batch], or None for the one manifold; `radius` a number or an array.
    """

    def project(layout, x, g, kind, radius, inverse):
        v = _Shared(manifolds, layout, kind, radius, inverse).project(x, g)
        return v, layout.apart(lambda v: layout.sum(jnp.square(v)), v)

    return by_chunks(project, x, g, kind, radius)


def displace_together(
    manifolds: tuple[Manifold, ...],
    kind: Array | None,
    radius: float | Array,
    x: Array,
    w: Array,
    new_radius: Array | None,
    factor: float | Array,
    tangent: bool,
) -> tuple[Array, Array]:
    """`φ_x(v) - x` with v `factor` times the tangent part of `w`, and ‖v‖/s; at `new_radius` [*batch] if given."""

    def displace(layout, x, w, kind, radius, inverse, growth, factor):
        shared = _Shared(manifolds, layout, kind, radius, inverse)
        return shared.displace(x, w if tangent else shared.project(x, w), factor, growth)

    return by_chunks(displace, x, w, kind, radius, new_radius, scalars=(factor,))


class _Shared:
    """The arithmetic of a batch on these manifolds. Every array is in `layout`, one value a matrix included.

    `inverse` is 1/radius.
    """

    def __init__(self, manifolds, layout: Layout, kind: Array | None, radius: Array, inverse: Array):
        self.manifolds, self.layout = manifolds, layout
        self.kind, self.radius, self.inverse = kind, radius, inverse
        self.stiefel = any(isinstance(manifold, Stiefel) for manifold in manifolds)
        self.lengths = any(isinstance(manifold, (Sphere, Oblique)) for manifold in manifolds)

    def project(self, x: Array, g: Array) -> Array:
        """`g - x C(xᵀg)/s²`."""
        layout = self.layout

        def by_columns(x, g):
            return self._lengths(x * g, 0.0) * jnp.square(self.inverse)

        def tangent(x, g, columns, products):
            normal = x * columns if self.lengths else jnp.zeros_like(g)
            if self.stiefel:
                normal = self._where_stiefel(layout.matmul(x, products) * jnp.square(self.inverse), normal)
            return g - normal

        columns = layout.apart(by_columns, x, g) if self.lengths else None
        products = layout.apart(lambda x, g: layout.symmetric(layout.gram(x, g)), x, g) if self.stiefel else None
        return layout.apart(tangent, x, g, columns, products)

    def displace(self, x: Array, v: Array, factor: Array, growth: Array | None) -> tuple[Array, Array]:
        """`s y C(yᵀy) - x` with `y = (x + factor v)/s`, the first term times `growth` if given, and factor ‖v‖/s."""
        layout = self.layout

        def scaled(x, v, factor):
            return (x + factor * v) * self._but_euclidean(self.inverse)

        def ratio(v, factor):
            return jnp.sqrt(layout.sum(jnp.square(v * (factor * self.inverse))))

        def deviations(square):
            return self._where_stiefel(spectral_bounds(square, layout), 0.0)

        def by_gram(root, x, y):
            return self._placed(x, y, root, growth)

        def by_iteration(x, y):
            start = self._where_stiefel(x * self.inverse, layout.eye(x))
            end = within_reach(layout.give(self._where_stiefel(y, start)), layout.give(start))
            y = self._where_stiefel(iterate(layout.take(end), start, layout), y)
            return self._placed(x, y, jnp.zeros_like(layout.gram(y, y)), growth)

        y = layout.apart(scaled, x, v, factor)
        ratios = layout.apart(ratio, v, factor)
        if not self.stiefel:
            return self._placed(x, y, None, growth), ratios
        e, square = gram_less_eye(y, layout)
        furthest = largest(layout.apart(deviations, square))
        return with_inverse_root(furthest, e, square, by_gram, by_iteration, x, y, layout=layout), ratios

    def _placed(self, x: Array, y: Array, root: Array | None, growth: Array | None) -> Array:
        """`s y C - x`; no step where y is zero, overflows or is not a number."""
        layout = self.layout

        def normalizing(y):
            # One where nothing is normalized: the polar factor of a tangent step exists, and Euclidean steps are free.
            squares = self._lengths(jnp.square(y), 1.0)
            usable = (squares > 0) & jnp.isfinite(squares)
            return jnp.where(usable, 1 / jnp.sqrt(jnp.where(usable, squares, 1)), 0)

        def placed(x, y, root, columns):
            point = y
            if columns is not None:
                point = jnp.where(columns > 0, y * columns, x * self._but_euclidean(self.inverse))
            if root is not None:
                point = self._where_stiefel(y + layout.matmul(y, root), point)
            point = point * self._but_euclidean(self.radius)
            return (point if growth is None else point * growth) - x

        columns = layout.apart(normalizing, y) if self.lengths else None
        return layout.apart(placed, x, y, root, columns)

    def _lengths(self, entries: Array, otherwise: float) -> Array:
        """Sums over the columns of oblique matrices and over all of those on spheres [blocks, 1, p, lanes]."""
        columns = self.layout.sum(entries, 0)
        total = jnp.broadcast_to(self.layout.sum(columns, 1), columns.shape)

        def of(manifold: Manifold) -> Array | float:
            return total if isinstance(manifold, Sphere) else columns if isinstance(manifold, Oblique) else otherwise

        return self._of_kind(of, columns)

    def _but_euclidean(self, values: Array) -> Array:
        return self._of_kind(lambda manifold: 1.0 if isinstance(manifold, Euclidean) else values, values)

    def _where_stiefel(self, values: Array, others: Array | float) -> Array:
        return self._of_kind(lambda manifold: values if isinstance(manifold, Stiefel) else others, values)

    def _of_kind(self, value: Callable[[Manifold], Array | float], like: Array) -> Array:
        """`value(manifold)` for the manifold of each matrix."""
        values = [value(manifold) for manifold in self.manifolds]
        selected = jnp.asarray(values[0], like.dtype)
        for index, other in enumerate(values):
            if other is not values[0]:
                selected = jnp.where(self.kind == index, jnp.asarray(other, like.dtype), selected)
        return selected
