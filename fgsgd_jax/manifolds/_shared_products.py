"""A step of many small matrices on different manifolds, which share the matrix products.

On the Euclidean space, the sphere, the oblique and the Stiefel manifold alike the projection is `g - x C(xᵀg)/s²` and
the retraction is `s y C(yᵀy)` with `y = (x + v)/s`; only the p×p matrix C depends on the manifold. Inside this file
matrices are in the first two axes, `[n, p, *batch]`, and the arithmetic is written out entry by entry.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ..linalg import LARGEST_DEVIATION, MATRICES_FIRST as FIRST, deviation, inverse_root, iterate, largest, layout_for
from ._euclidean import Euclidean
from ._manifold import Manifold
from ._oblique import Oblique
from ._sphere import Sphere
from ._stiefel import Stiefel, shortened

# On CPU the intermediate results of so many matrices stay in the cache, and the program's temporary memory small: that
# of a whole network is new to the process at every call, and the page faults cost more than the arithmetic.
_CHUNK = 8192


def share_products(manifolds: tuple[Manifold, ...], shape: tuple[int, ...]) -> bool:
    """Whether the functions below serve points of `shape` [*batch, n, p] on these manifolds, and are the fastest."""
    return (
        layout_for(shape) is FIRST
        and shape[-2] >= shape[-1]
        and all(isinstance(m, (Euclidean, Sphere, Oblique)) or m == Stiefel(m.radius) for m in manifolds)
    )


def project_together(manifolds, kind: Array | None, radius: float | Array, x: Array, g: Array) -> Array:
    """The projections of `g` onto the tangent spaces at `x`, both [*batch, n, p]; `kind` and `radius` [*batch]."""

    def project(kind, radius, x, g):
        return _project(manifolds, kind, radius, x, g), radius

    return FIRST.give(_in_chunks(project, kind, _over(radius, x), x=FIRST.take(x), w=FIRST.take(g))[0])


def displace_together(
    manifolds, kind: Array | None, radius: float | Array, x: Array, w: Array, new_radius: Array | None, tangent: bool
) -> tuple[Array, Array]:
    """`φ_x(v) - x` with v the tangent part of `w`, and ‖v‖/s; arrays as above, the result at `new_radius` if given."""

    def displace(kind, radius, new_radius, x, w):
        v = w if tangent else _project(manifolds, kind, radius, x, w)
        y = _retract(manifolds, kind, radius, x, v)
        if new_radius is not None:
            y = y * FIRST.over_matrices(new_radius / radius)
        return y - x, jnp.sqrt(FIRST.sum(jnp.square(v / FIRST.over_matrices(radius))))[0, 0]

    displacement, ratio = _in_chunks(displace, kind, _over(radius, x), new_radius, x=FIRST.take(x), w=FIRST.take(w))
    return FIRST.give(displacement), ratio


def _over(radius: float | Array, x: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(radius, x.dtype), x.shape[:-2])


def _in_chunks(function: Callable, kind: Array | None, *radii: Array | None, x: Array, w: Array) -> tuple[Array, Array]:
    """`function(kind, *radii, x, w)`: an array like `w` and a figure for each matrix; chunk by chunk on CPU."""
    number = math.prod(w.shape[2:])
    # More than one batch axis means that the axes may be sharded.
    if w.ndim > 3 or number <= _CHUNK:
        return function(kind, *radii, x, w)
    count = -(-number // _CHUNK)
    size = -(-number // count)

    def whole(w, *others):
        return function(*others, w)

    def chunked(w, *others):
        def chunk(index, carry):
            results, figures = carry
            # The last chunk overlaps the one before it, and finds the same there.
            start = jnp.minimum(index * size, number - size)
            parts = (a if a is None else lax.dynamic_slice_in_dim(a, start, size, a.ndim - 1) for a in (*others, w))
            # In a branch, taken always, the arithmetic cannot be fused with the slicing, with which it takes twice as
            # long.
            result, values = lax.cond(index < count, function, lambda *parts: (parts[-1], figures[:size]), *parts)
            return (
                lax.dynamic_update_slice_in_dim(results, result, start, w.ndim - 1),
                lax.dynamic_update_slice_in_dim(figures, values, start, 0),
            )

        return lax.fori_loop(0, count, chunk, (jnp.zeros_like(w), jnp.zeros(number, w.dtype)))

    return lax.platform_dependent(w, kind, *radii, x, cpu=chunked, default=whole)


def _over_batch(matrix: Array, x: Array) -> Array:
    return matrix.reshape(*matrix.shape, *(1,) * (x.ndim - 2))


def _project(manifolds, kind: Array | None, radius: Array, x: Array, g: Array) -> Array:
    products = FIRST.gram(x, g)
    diagonal = jnp.stack([products[i, i] for i in range(len(products))])

    def row(i: int, j: int) -> Callable[[Manifold], Array | float]:
        def core(manifold: Manifold) -> Array | float:
            match manifold:
                case Stiefel():
                    return (products[i, j] + products[j, i]) / 2
                case Sphere():
                    return jnp.sum(diagonal, axis=0) if i == j else 0.0
                case Oblique():
                    return products[i, i] if i == j else 0.0
            return 0.0

        return core

    core = _symmetric(lambda i, j: _of_kind(manifolds, kind, row(i, j), radius) / jnp.square(radius), x)
    return g - FIRST.matmul(x, core)


def _retract(manifolds, kind: Array | None, radius: Array, x: Array, v: Array) -> Array:
    s = _of_kind(manifolds, kind, lambda m: 1.0 if isinstance(m, Euclidean) else radius, radius)
    s = FIRST.over_matrices(s)
    y = _kept((x + v) / s)
    g = FIRST.gram(y, y)
    if not any(isinstance(manifold, Stiefel) for manifold in manifolds):
        return s * _by_cores(manifolds, kind, x / s, y, g, g)
    stiefel = _of_kind(manifolds, kind, lambda m: isinstance(m, Stiefel), jnp.isnan(radius))
    furthest = largest(jnp.where(stiefel, deviation(g, FIRST)[0, 0], 0))
    stiefel = FIRST.over_matrices(stiefel)

    def by_gram(x, v, y, g):
        del v
        return s * _by_cores(manifolds, kind, x / s, y, g, inverse_root(g, furthest, FIRST))

    def by_iteration(x, v, y, g):
        others = _by_cores(manifolds, kind, x / s, y, g, g)
        origin = jnp.broadcast_to(_over_batch(Stiefel().origin(x.shape[:2], x.dtype), x), x.shape)
        x, v = jnp.where(stiefel, x / s, origin), jnp.where(stiefel, v / s, 0)
        return s * jnp.where(stiefel, iterate(x + shortened(v, FIRST), x, FIRST), others)

    return lax.cond(furthest <= LARGEST_DEVIATION, by_gram, by_iteration, x, v, y, g)


def _by_cores(manifolds, kind: Array | None, x: Array, y: Array, g: Array, root: Array) -> Array:
    """`y C(yᵀy)`, or `x` where there is no step to take because y is zero, overflows or is not a number."""
    columns = [g[j, j] for j in range(len(g))]
    total = functools.reduce(jnp.add, columns)

    def squares(j: int) -> Callable[[Manifold], Array | float]:
        # One where nothing is normalized: the polar factor of a tangent step exists, and Euclidean steps are free.
        return lambda m: total if isinstance(m, Sphere) else columns[j] if isinstance(m, Oblique) else 1.0

    lengths = jnp.stack([_of_kind(manifolds, kind, squares(j), total) for j in range(len(g))])
    usable = (lengths > 0) & jnp.isfinite(lengths)
    normalizing = _kept(1 / jnp.sqrt(jnp.where(usable, lengths, 1)))

    def entry(i: int, j: int) -> Array:
        of_others = normalizing[j] if i == j else 0.0
        return _of_kind(manifolds, kind, lambda m: root[i, j] if isinstance(m, Stiefel) else of_others, total)

    return jnp.where(usable[None], FIRST.matmul(y, _symmetric(entry, y)), x)


def _symmetric(entry: Callable[[int, int], Array], like: Array) -> Array:
    """The symmetric p×p matrices with these entries on and above the diagonal."""
    columns = range(like.shape[1])
    above = {(i, j): entry(i, j) for i in columns for j in columns if i <= j}
    return _kept(jnp.stack([jnp.stack([above[min(i, j), max(i, j)] for j in columns]) for i in columns]))


def _of_kind(manifolds, kind: Array | None, value: Callable[[Manifold], Array | float | bool], like: Array) -> Array:
    """`value(manifold)` for the manifold of each matrix, over the batch."""
    selected = jnp.broadcast_to(jnp.asarray(value(manifolds[0]), like.dtype), like.shape)
    if kind is not None:
        for index, manifold in enumerate(manifolds[1:], start=1):
            selected = jnp.where(kind == index, jnp.asarray(value(manifold), like.dtype), selected)
    return selected


def _kept(x: Array) -> Array:
    # XLA on CPU would evaluate the entries again for each of their uses.
    return lax.optimization_barrier(x)
