"""CPU: many small matrices, entry by entry.

Entry (i, j) of all matrices of all layers is one vector, so that a convolution kernel `[n, p, C, D]` is joined with the
others as it lies in memory. Products of matrices are sums of outer products of slices, which XLA on CPU compiles to
one loop without branches.

On the Euclidean space, the sphere, the oblique and the Stiefel manifold alike the projection is `g - x C(xᵀg)/s²` and
the retraction is `s y C(yᵀy)` with `y = (x + v)/s`; only the p×p matrix C depends on the manifold. So one pass serves
all of them.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..manifolds import Euclidean, Manifold, Oblique, Sphere, Stiefel
from ._layers import Layer, Layers, Operation, Results, by_chunks, by_polar, fusion_barrier, jitted, offsets

# Up to so many multiplications a product costs little beside moving its operands: 9×9 matrices.
_MULTIPLICATIONS = 768
# Taller matrices take longer to compile than they gain.
_LONGEST = 32
# So many entries of matrices are handled at a time: an array of them fits a core's L1 cache.
_ENTRIES = 3 * 2**11
# A chunk is a multiple of so many matrices.
_LANES = 16
# From the smallest singular value that is told from 0 (eps of the largest) the iteration takes 20 turns in float32, 42
# in float64.
_MOST_TURNS = 50
# Fewer matrices are handled as fast by batched products.
_FEWEST = 256


def serves(manifolds: tuple[Manifold, ...], n: int, p: int, count: int) -> bool:
    """Whether this form serves `count` n×p matrices on these manifolds."""
    small = 0 < p <= n <= _LONGEST and n * p * p <= _MULTIPLICATIONS
    return (
        small
        and count >= _FEWEST
        and all(type(manifold) in (Euclidean, Sphere, Oblique) or by_polar(manifold) for manifold in manifolds)
    )


@jitted
def run(operation: Operation, layers: Sequence[Layers], factor: Float[Array, ""]) -> Results:
    """See `_reference.run`."""

    def of_chunk(layer: Layer) -> tuple[Array, Array]:
        x, w, kind, radius, new_radius = layer
        on, inverse = _On(operation.manifolds, kind), 1 / radius
        if not operation.is_step:
            t = fusion_barrier(_On.tangent, on, x, w, inverse)
            return t, _sum(jnp.square(t))
        v = w if operation.is_tangent else on.tangent(x, w, inverse)
        ratio, y = fusion_barrier(_On.ambient, on, x, v, factor, inverse)
        reached = radius if new_radius is None else new_radius
        # By a quotient, which is exactly 1 of equal radii.
        reached = jnp.where(on.of(Euclidean), reached / radius, reached)
        radius, usable = jnp.where(on.of(Euclidean), 1, radius), jnp.ones((1, 1, 1), bool)
        if Stiefel in map(type, operation.manifolds):
            y, usable = on.polar(y)
        squares = fusion_barrier(lambda on, y: on.lengths(jnp.square(y), 1.0), on, y)
        # Sphere and oblique: a tangent step gives at least 1. No step where y is zero, overflows or is not a number.
        info = jnp.finfo(x.dtype)
        fine = (squares > info.tiny / info.eps) & jnp.isfinite(squares) & usable
        scale = reached / jnp.sqrt(jnp.where(fine, squares, 1))
        displacement = lax.cond(
            jnp.all(fine),
            lambda: y * scale - x,
            lambda: jnp.where(fine, y * scale, on.point(x / radius) * reached) - x,
        )
        return displacement, jnp.where(on.of(Euclidean), 0, ratio)

    joined, size = _join(layers)
    return _split(*by_chunks(of_chunk, joined, size, axis=-1), layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _On:
    """The arithmetic on matrices `[n, p, count]`, of which `kind` says on which of the manifolds they lie.

    Values of one number for each matrix are `[1, 1, count]`, or of that rank.
    """

    manifolds: tuple[Manifold, ...] = dataclasses.field(metadata={"static": True})
    kind: Int[Array, "1 1 count"] | None

    def of(self, cls: type[Manifold]) -> Bool[Array, "1 1 #count"]:
        """Which matrices are of this class."""
        found = [type(manifold) is cls for manifold in self.manifolds]
        if all(found) or not any(found):
            return jnp.full((1, 1, 1), found[0])
        return functools.reduce(operator.or_, (self.kind == index for index, is_cls in enumerate(found) if is_cls))

    def tangent(self, x: Array, g: Array, inverse: Array) -> Array:
        """`g - x C(xᵀg)/s²`."""
        if Stiefel not in map(type, self.manifolds):
            return g - x * (self.lengths(x * g, 0.0) * jnp.square(inverse))
        products = fusion_barrier(functools.partial(matmul, transposed=True), x, g)
        return g - matmul(x, fusion_barrier(_On.core, self, products, inverse))

    def core(self, products: Float[Array, "p p count"], inverse: Array) -> Float[Array, "p p count"]:
        """`C(xᵀg)/s²` of the products `xᵀg`."""
        p = len(products)
        trace = functools.reduce(operator.add, (products[k, k] for k in range(p)))
        diagonal = jnp.eye(p, dtype=products.dtype)[:, :, None] * jnp.where(self.of(Sphere), trace, products)
        symmetric = (products + jnp.swapaxes(products, 0, 1)) / 2
        core = jnp.where(self.of(Stiefel), symmetric, jnp.where(self.of(Euclidean), 0, diagonal))
        return core * jnp.square(inverse)

    def ambient(self, x: Array, v: Array, factor: Array, inverse: Array) -> tuple[Array, Array]:
        """‖v‖/s of `factor` times v, and `y = (x + factor v)/s`."""
        ratio = jnp.sqrt(_sum(jnp.square(v * (factor * inverse))))
        # The iteration of the polar factor converges from a Gram matrix of norm 2.
        shrink = jnp.where(self.of(Stiefel) & (ratio > 0.4), 1 / (1 + ratio), 1)
        return ratio, (x + factor * v) * jnp.where(self.of(Euclidean), 1, inverse * shrink)

    def point(self, x: Array) -> Array:
        """`x` where its length is that of a point, else a fixed point."""
        n, p = x.shape[:2]
        lengths = self.lengths(jnp.square(x), 1.0)
        lengths = jnp.where(self.of(Stiefel), _sum(jnp.square(x)) / p, lengths)
        origin = jnp.where(self.of(Sphere), (n * p) ** -0.5, n**-0.5)
        origin = jnp.where(self.of(Stiefel), jnp.eye(n, p, dtype=x.dtype)[:, :, None], origin.astype(x.dtype))
        return jnp.where(jnp.abs(lengths - 1) < 0.1, x, origin)

    def polar(self, y: Array) -> tuple[Array, Bool[Array, "1 1 count"]]:
        """`y` with the polar factors of its Stiefel matrices, and which converged: see `linalg.orthonormalize`.

        A turn here is the Taylor polynomial of order 4 of (I + e)^-½ where that of `linalg` is of order 1 or 3. It is
        exact to round-off up to this e: its error is e⁵/4.
        """
        enough = float(jnp.finfo(y.dtype).eps) ** 0.2

        eye = jnp.eye(y.shape[1], dtype=y.dtype)[:, :, None]

        def turn(carry):
            y, _, turns = carry
            # Of other matrices it is zero, so that they do not change.
            e = fusion_barrier(lambda on, y: jnp.where(on.of(Stiefel), matmul(y, y, transposed=True) - eye, 0), self, y)
            square = fusion_barrier(matmul, e, e)
            # The polynomial less I, and a bound of ‖e‖₂.
            root, bound = fusion_barrier(
                lambda e, square: (
                    0.375 * square - 0.5 * e + matmul(square, 0.2734375 * square - 0.3125 * e),
                    jnp.sqrt(jnp.sqrt(_sum(jnp.square(square)))),
                ),
                e,
                square,
            )
            return fusion_barrier(lambda y, root: y + matmul(y, root), y, root), bound, turns + 1

        # Like y, since in `shard_map` it differs between devices where y does.
        start = jnp.full_like(y[:1, :1], jnp.inf)
        y, bound, _ = lax.while_loop(
            lambda carry: jnp.any(carry[1] > enough) & (carry[2] < _MOST_TURNS), turn, (y, start, 0)
        )
        return y, bound <= enough

    def lengths(self, entries: Array, otherwise: float) -> Float[Array, "1 #p #count"]:
        """Sums over the columns of oblique matrices, over all of those on spheres, and `otherwise`."""
        columns, lengths = _sum(entries, [0]), jnp.full((1, 1, 1), otherwise, entries.dtype)
        for cls, sums in ((Oblique, columns), (Sphere, _sum(columns, [1]))):
            if cls in map(type, self.manifolds):
                lengths = jnp.where(self.of(cls), sums, lengths)
        return lengths


def _sum(x: Float[Array, "n p count"], axes: Sequence[int] = (0, 1)) -> Float[Array, "1 #p count"]:
    """Sums over leading axes, slice by slice: XLA on CPU reduces over them far slower."""
    for axis in axes:
        x = functools.reduce(operator.add, jnp.split(x, x.shape[axis], axis=axis))
    return x


def matmul(a: Float[Array, "_ _ count"], b: Float[Array, "k p count"], transposed: bool = False) -> Array:
    """`a @ b`, or `aᵀb` with a `transposed`, as a sum of outer products."""
    # A transposed array would be copied.
    columns = [a[k] if transposed else a[:, k] for k in range(len(b))]
    return functools.reduce(operator.add, (column[:, None] * b[k, None] for k, column in enumerate(columns)))


def _join(layers: Sequence[Layers]) -> tuple[Layer, int]:
    """All layers as one, matrices `[n, p, count]` and values `[1, 1, count]`, and how many matrices make a chunk."""
    n, p = layers[0].x[0].shape[-2:]
    flat: list[Layers] = [
        jax.tree.map(
            lambda a, rank=own.radius.ndim: (
                a.ravel() if a.ndim == rank else jnp.moveaxis(a, (-2, -1), (0, 1)).reshape(n, p, -1)
            ),
            own,
        )
        for own in layers
    ]
    count, largest = sum(own.radius.size for own in flat), max(flat, key=lambda own: own.x[0].size)
    chunks = -(-count // max(_LANES, _ENTRIES // (n * p)))
    # An odd multiple: entries a power of two apart would all compete for the same lines of the cache.
    size = (-(-count // (chunks * _LANES)) | 1) * _LANES
    missing = -count % size
    if chunks == 1 or missing > largest.x[0].shape[-1]:
        size = count
    elif missing:
        # The last chunk is filled up with matrices of the largest array.
        first = largest._replace(x=largest.x[:1], w=largest.w[:1])
        flat.append(jax.tree.map(lambda a: a[..., :missing], first))
    x, w, *values = zip(*flat, strict=True)
    matrices = (jnp.concatenate([*itertools.chain(*arrays)], axis=-1) for arrays in (x, w))
    # A fused concatenation would find out for every entry which part it comes from.
    own = (
        None if parts[0] is None else fusion_barrier(lambda whole: whole, jnp.concatenate(parts))[None, None]
        for parts in values
    )
    return Layer(*matrices, *own), size


def _split(matrices: Float[Array, "n p count"], values: Float[Array, "1 1 count"], layers: Sequence[Layers]) -> Results:
    """Undoes `_join`."""
    n, p, _ = matrices.shape
    sizes = [w.size // (n * p) for own in layers for w in own.w]
    starts, flat, place, found = iter(offsets(sizes)), values.ravel(), 0, []
    for own in layers:
        parts = []
        for w in own.w:
            part = lax.dynamic_slice_in_dim(matrices, next(starts), w.size // (n * p), axis=-1)
            parts.append(jnp.moveaxis(part.reshape(n, p, *w.shape[:-2]), (0, 1), (-2, -1)))
        value = lax.slice_in_dim(flat, place, place + own.radius.size).reshape(own.radius.shape)
        place += own.radius.size
        found.append((tuple(parts), value))
    return found
