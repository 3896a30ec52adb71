"""CPU: many small matrices, entry by entry.

Entry (i, j) of all matrices of all layers is one vector, so that a convolution kernel `[n, p, C, D]` is joined with the
others as it lies in memory. Products of matrices are sums of outer products of slices, which XLA on CPU compiles to
one loop without branches.

On the Euclidean space, the sphere, the oblique and the Stiefel manifold alike the projection is `g - x C(xᵀg)/s²` and
the retraction is `s y C(yᵀy)` with `y = (x + v)/s`; only the p×p matrix C depends on the manifold. So one pass serves
all of them.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ..manifolds import Euclidean, Manifold, Oblique, Sphere, Stiefel
from ._cpu_chunks import by_chunks, fusion_barrier, offsets
from ._layers import Layer, Results, by_polar, unpacked

# Up to so many multiplications a product costs little beside moving its operands: 9×9 matrices.
_MULTIPLICATIONS = 768
# Taller matrices take longer to compile than they gain.
_LONGEST = 32
# So many entries of matrices are handled at a time, which stay in a core's L2 cache, in steps of so many matrices.
_ENTRIES, _LANES = 2**15, 16
# From the smallest singular value that float32 tells from 0 (eps of the largest) the iteration takes 20 turns.
_MOST_TURNS = 40
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


def tangent(manifolds: tuple[Manifold, ...], layers: Sequence[Layer]) -> Results:
    """See `_reference.tangent`."""

    def of_chunk(layer: Layer) -> tuple[Array, Array]:
        t = _Members(manifolds, layer.kind).apart(_Members.tangent, layer.x, layer.w, 1 / layer.radius)
        return t, _sum(jnp.square(t))

    return _by_chunks(of_chunk, layers)


def step(
    manifolds: tuple[Manifold, ...], layers: Sequence[Layer], factor: Float[Array, ""], is_tangent: bool
) -> Results:
    """See `_reference.step`."""

    def of_chunk(layer: Layer) -> tuple[Array, Array]:
        on, inverse = _Members(manifolds, layer.kind), 1 / layer.radius
        v = layer.w if is_tangent else on.tangent(layer.x, layer.w, inverse)
        ratio, y = on.apart(_Members.ambient, layer.x, v, factor, inverse)
        growth = jnp.ones_like(inverse) if layer.new_radius is None else layer.new_radius * inverse
        displacement = on.displacement(layer.x, y, layer.radius, growth)
        return displacement, jnp.where(on.of(Euclidean), 0, ratio)

    return _by_chunks(of_chunk, layers)


def _by_chunks(of_chunk: Callable[[Layer], tuple[Array, Array]], layers: Sequence[Layer]) -> Results:
    # Layers of one shape side by side.
    order = sorted(range(len(layers)), key=lambda place: layers[place].x.shape)
    joined, size = _join([layers[place] for place in order])
    pairs = _split(*by_chunks(of_chunk, joined, size, axis=-1), [layers[place] for place in order])
    found = dict(zip(order, pairs, strict=True))
    return unpacked([found[place] for place in range(len(layers))])


class _Members:
    """The arithmetic on matrices `[n, p, count]`, of which `kind` says on which of the manifolds they lie.

    Values of one number for each matrix are `[1, 1, count]`, or of that rank.
    """

    def __init__(self, manifolds: tuple[Manifold, ...], kind: Array | None):
        self.manifolds, self.kind = manifolds, kind
        self.has_stiefel = any(type(manifold) is Stiefel for manifold in manifolds)

    def apart(self, function: Callable[..., Any], *args: Array) -> Any:
        """`function(self, *args)` behind a fusion barrier."""
        if self.kind is None:
            return fusion_barrier(functools.partial(function, self), *args)
        # `kind` is an argument: what a barrier returns differs between devices where any of its arguments does.
        return fusion_barrier(lambda kind, *args: function(_Members(self.manifolds, kind), *args), self.kind, *args)

    def of(self, cls: type[Manifold]) -> Bool[Array, "1 1 #count"]:
        """Which matrices are of this class."""
        found = [type(manifold) is cls for manifold in self.manifolds]
        if all(found) or not any(found):
            return jnp.full((1, 1, 1), found[0])
        return functools.reduce(operator.or_, (self.kind == index for index, is_cls in enumerate(found) if is_cls))

    def tangent(self, x: Array, g: Array, inverse: Array) -> Array:
        """`g - x C(xᵀg)/s²`."""
        if not self.has_stiefel:
            return g - x * (self._lengths(x * g, 0.0) * jnp.square(inverse))
        return g - matmul(x, self.apart(_Members._core, x, g, inverse))

    def _core(self, x: Array, g: Array, inverse: Array) -> Float[Array, "p p count"]:
        products = gram(x, g)
        diagonal = identity(products) * self._lengths(x * g, 0.0)
        symmetric = (products + jnp.swapaxes(products, 0, 1)) / 2
        return jnp.where(self.of(Stiefel), symmetric, diagonal) * jnp.square(inverse)

    def ambient(self, x: Array, v: Array, factor: Array, inverse: Array) -> tuple[Array, Array]:
        """‖v‖/s of `factor` times v, and `y = (x + factor v)/s`."""
        ratio = jnp.sqrt(_sum(jnp.square(v * (factor * inverse))))
        # The iteration of the polar factor converges from a Gram matrix of norm 2.
        shrink = jnp.where(self.of(Stiefel) & (ratio > 0.4), 1 / (1 + ratio), 1)
        return ratio, (x + factor * v) * jnp.where(self.of(Euclidean), 1, inverse * shrink)

    def displacement(self, x: Array, y: Array, radius: Array, growth: Array) -> Array:
        """`s y C(yᵀy) - x`, the first term times `growth`; no step where y is zero, overflows or is not a number."""
        usable, radius = jnp.ones((1, 1, 1), bool), jnp.where(self.of(Euclidean), 1, radius)
        if self.has_stiefel:
            y, usable = self._polar(y)
        squares = self.apart(lambda on, y: on._lengths(jnp.square(y), 1.0), y)
        # Sphere and oblique: a tangent step gives at least 1.
        info = jnp.finfo(x.dtype)
        fine = (squares > info.tiny / info.eps) & jnp.isfinite(squares) & usable
        scale = radius * growth / jnp.sqrt(jnp.where(fine, squares, 1))
        return lax.cond(
            jnp.all(fine),
            lambda: y * scale - x,
            lambda: jnp.where(fine, y * scale, self._point(x / radius) * (radius * growth)) - x,
        )

    def _point(self, x: Array) -> Array:
        """`x`, or some point where it is none by its length."""
        n, p = x.shape[:2]
        lengths = self._lengths(jnp.square(x), 1.0)
        lengths = jnp.where(self.of(Stiefel), _sum(jnp.square(x)) / p, lengths)
        origin = jnp.where(self.of(Sphere), (n * p) ** -0.5, n**-0.5)
        origin = jnp.where(self.of(Stiefel), jnp.eye(n, p, dtype=x.dtype)[:, :, None], origin.astype(x.dtype))
        return jnp.where(jnp.abs(lengths - 1) < 0.1, x, origin)

    def _polar(self, y: Array) -> tuple[Array, Bool[Array, "1 1 count"]]:
        """`y` with the polar factors of its Stiefel matrices, and which converged: see `linalg.orthonormalize`.

        A turn here is the Taylor polynomial of order 4 of (I + e)^-½ where that of `linalg` is of order 1. It is exact
        to round-off up to this e: its error is e⁵/4.
        """
        enough = float(jnp.finfo(y.dtype).eps) ** 0.2

        def unfinished(carry):
            _, bound, turns = carry
            return jnp.any(bound > enough) & (turns < _MOST_TURNS)

        def turn(carry):
            y, _, turns = carry
            e = fusion_barrier(lambda y: gram(y, y) - identity(y[: y.shape[1]]), y)
            square = fusion_barrier(matmul, e, e)
            root, bound = self.apart(_Members._inverse_root, e, square)
            return fusion_barrier(lambda y, root: y + matmul(y, root), y, root), bound, turns + 1

        # Made of y, so that in `shard_map` it differs between devices where y does.
        start = jnp.inf + 0 * y[:1, :1]
        y, bound, _ = lax.while_loop(unfinished, turn, (y, start, 0))
        return y, bound <= enough

    def _inverse_root(self, e: Array, square: Array) -> tuple[Array, Array]:
        """The polynomial less I, and a bound of ‖e‖₂; no change of matrices that are not Stiefel."""
        root = 0.375 * square - 0.5 * e + matmul(square, 0.2734375 * square - 0.3125 * e)
        bound = jnp.sqrt(jnp.sqrt(_sum(jnp.square(square))))
        return jnp.where(self.of(Stiefel), root, 0), jnp.where(self.of(Stiefel), bound, 0)

    def _lengths(self, entries: Array, otherwise: float) -> Float[Array, "1 p count"]:
        """Sums over the columns of oblique matrices, over all of those on spheres, and `otherwise`."""
        columns = _over(operator.add, entries, 0)
        total = _over(operator.add, columns, 1)
        return jnp.where(self.of(Sphere), total, jnp.where(self.of(Oblique), columns, otherwise))


def _over(pair: Callable[[Array, Array], Array], x: Array, axis: int) -> Array:
    """The slices along an axis combined by pairs: XLA on CPU reduces over leading axes far slower."""
    return functools.reduce(pair, jnp.split(x, x.shape[axis], axis=axis))


def _sum(x: Float[Array, "n p count"]) -> Float[Array, "1 1 count"]:
    return _over(operator.add, _over(operator.add, x, 0), 1)


def matmul(a: Float[Array, "n k count"], b: Float[Array, "k p count"]) -> Float[Array, "n p count"]:
    """`a @ b` as a sum of outer products."""
    return functools.reduce(operator.add, (a[:, k, None] * b[None, k] for k in range(a.shape[1])))


def gram(a: Float[Array, "n p count"], b: Float[Array, "n q count"]) -> Float[Array, "p q count"]:
    """`aᵀb` as a sum of outer products."""
    return functools.reduce(operator.add, (a[k, :, None] * b[k, None] for k in range(a.shape[0])))


def identity(x: Float[Array, "p p count"]) -> Float[Array, "p p 1"]:
    """An identity matrix that broadcasts against those of `x`."""
    return jnp.eye(x.shape[0], dtype=x.dtype)[:, :, None]


def _join(layers: Sequence[Layer]) -> tuple[Layer, int]:
    """All layers as one, matrices `[n, p, count]` and values `[1, 1, count]`, and how many matrices make a chunk."""
    n, p = layers[0].x.shape[-2:]
    flat = [_flat(layer) for layer in layers]
    count, largest = sum(layer.radius.size for layer in flat), max(flat, key=lambda layer: layer.radius.size)
    chunks = -(-count // max(_LANES, _ENTRIES // (n * p)))
    size = -(-count // (chunks * _LANES)) * _LANES
    missing = chunks * size - count
    if chunks == 1 or missing > largest.radius.size:
        size = count
    elif missing:
        # The last chunk is filled up with matrices of the largest layer.
        flat.append(jax.tree.map(lambda a: a[..., :missing], largest))

    def join(*parts: Array) -> Array:
        whole = jnp.concatenate(parts, axis=-1)
        # Of values that lie side by side in one array XLA makes one slice. Fused with what follows, a concatenation
        # asks of every entry in which of the parts it is.
        return whole if whole.ndim == 3 else fusion_barrier(lambda whole: whole, whole)[None, None]

    return jax.tree.map(join, *flat), size


def _flat(layer: Layer) -> Layer:
    """Matrices `[n, p, count]` and values `[count]`."""

    def flat(a: Array) -> Array:
        is_value = a.ndim == layer.radius.ndim
        return a.ravel() if is_value else jnp.moveaxis(a, (-2, -1), (0, 1)).reshape(*a.shape[-2:], -1)

    return jax.tree.map(flat, layer)


def _split(
    matrices: Float[Array, "n p count"], values: Float[Array, "1 1 count"], layers: Sequence[Layer]
) -> list[tuple[Array, Array]]:
    """The layers' parts: undoes `_join`."""
    sizes = [layer.radius.size for layer in layers]
    pairs, flat, place = [], values.ravel(), 0
    for layer, size, start in zip(layers, sizes, offsets(sizes), strict=True):
        part = lax.dynamic_slice_in_dim(matrices, start, size, axis=-1)
        part = part.reshape(*matrices.shape[:-1], *layer.radius.shape)
        # Values are joined again soon: slices of one array vanish if XLA knows that they are adjacent.
        value = lax.slice_in_dim(flat, place, place + size).reshape(layer.radius.shape)
        place += size
        pairs.append((jnp.moveaxis(part, (0, 1), (-2, -1)), value))
    return pairs
