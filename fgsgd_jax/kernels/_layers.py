"""Matrices of one size on the same manifolds: of several layers together, apart, and a few at a time."""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float, Int, Shaped

from ..linalg import matmul
from ..manifolds import Manifold, Stiefel
from ._by_platform import is_shared

# Fewer arrays compile in no time. Larger ones are not worth a copy.
_FEWEST, _LARGEST = 64, 2**12
# XLA on CPU fuses a concatenation of up to so many parts, and recognizes equal fusions; so many are taken in a slice.
_STACKED, _SLICED = 8, 32


class Operation(NamedTuple):
    """What is to be done with matrices on manifolds: line 5, or (`is_step`) line 7 along a direction.

    `is_tangent` says that the direction is tangent already; `is_exact` that line 5 is wanted to round-off, as not only
    line 7 sees it; `is_shared` is as in `Program`.
    """

    manifolds: tuple[Manifold, ...]
    is_step: bool
    is_tangent: bool = False
    is_exact: bool = False
    is_shared: bool = False


class Layer(NamedTuple):
    """Matrices in one array, in a dtype of at least 32 bits.

    `x` are points, `w` gradients or directions, `kind` and `radius` as in `Mixture`; `new_radius` is that of the point
    to reach (None: the same).
    """

    x: Float[Array, "*b n p"]
    w: Float[Array, "*b n p"]
    kind: Int[Array, "*b"] | None
    radius: Float[Array, "*b"]
    new_radius: Float[Array, "*b"] | None = None


class Layers(NamedTuple):
    """Matrices split over several arrays along the first axis; what belongs to a matrix is in one array of all."""

    x: tuple[Float[Array, "_ *b n p"], ...]
    w: tuple[Float[Array, "_ *b n p"], ...]
    kind: Int[Array, "all *b"] | None
    radius: Float[Array, "all *b"]
    new_radius: Float[Array, "all *b"] | None = None

    def whole(self) -> Layer:
        """The same in one array."""
        return Layer(jnp.concatenate(self.x), jnp.concatenate(self.w), *self[2:])

    def apart(self) -> Iterator[Layer]:
        """Each array with its own values."""
        start = 0
        for x, w in zip(self.x, self.w, strict=True):
            end = start + len(x)
            values: Any = jax.tree.map(lambda a, start=start, end=end: lax.slice_in_dim(a, start, end), self[2:])
            yield Layer(x, w, *values)
            start = end

    def parts(self, whole: Float[Array, "all *b n p"]) -> tuple[Float[Array, "_ *b n p"], ...]:
        """An array of all matrices, split as `x` is."""
        return tuple(jnp.split(whole, [*itertools.accumulate(map(len, self.x))][:-1]))


# Of all `Layers` arrays like their `w`, and a figure for each of their matrices.
Results = list[tuple[tuple[Float[Array, "_ *b n p"], ...], Float[Array, "all *b"]]]


# For the `run` of a form: traced once for all calls of one operation on layers of the same shapes, also outside jit.
jitted = functools.partial(jax.jit, static_argnums=0, inline=True)


def by_polar(manifold: Manifold) -> bool:
    """Whether this is the Stiefel manifold itself, no subclass, with the polar retraction."""
    return type(manifold) is Stiefel and manifold.retraction == "polar"


def is_wide(x: Array) -> bool:
    """Whether matrices have more columns than rows."""
    return x.shape[-2] < x.shape[-1]


def times(x: Array, symmetric: Array, product: Callable[[Array, Array], Array] = matmul) -> Array:
    """`x` by a symmetric matrix, on the side where it fits."""
    return product(symmetric, x) if is_wide(x) else product(x, symmetric)


def one_by_one(of_layer: Callable[[Layer], tuple[Array, Array]], layers: Sequence[Layers]) -> Results:
    """`of_layer` of every array."""
    found = [[of_layer(layer) for layer in own.apart()] for own in layers]
    return [(tuple(x for x, _ in pairs), jnp.concatenate([figures for _, figures in pairs])) for pairs in found]


def joined(layers: Sequence[Layers], concatenate: Callable[[list[Array]], Array] = jnp.concatenate) -> Layer:
    """All matrices of all layers in one row."""

    def row(own: Layers) -> Any:
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[own.radius.ndim :]), own)

    x, w, *values = zip(*map(row, layers), strict=True)
    matrices = (concatenate(list(itertools.chain(*arrays))) for arrays in (x, w))
    return Layer(*matrices, *(None if parts[0] is None else concatenate(list(parts)) for parts in values))


def split(results: Float[Array, "count n p"], figures: Float[Array, "count"], layers: Sequence[Layers]) -> Results:
    """Undoes `joined`."""
    found, start = [], 0
    for own in layers:
        first, parts = start, []
        for w in own.w:
            end = start + math.prod(w.shape[:-2])
            parts.append(lax.slice_in_dim(results, start, end).reshape(w.shape))
            start = end
        found.append((tuple(parts), lax.slice_in_dim(figures, first, start).reshape(own.radius.shape)))
    return found


def by_chunks(
    of_chunk: Callable[[Layer], tuple[Array, Array]], layer: Layer, size: int, axis: int
) -> tuple[Array, Array]:
    """`of_chunk` of `size` matrices at a time. Results take the place of `w`.

    Intermediate results of a whole network would be new to the process at every call, and the page faults cost as much
    as the arithmetic.
    """
    chunks = layer.w.shape[axis] // size
    if chunks == 1:
        return of_chunk(layer)

    def chunk(index, carry):
        results, figures = carry
        start = index * size

        def parts(whole: Layer, start: Array) -> Layer:
            return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, axis), whole)

        result, figure = of_chunk(fusion_barrier(parts, layer._replace(w=results), start))
        results = lax.dynamic_update_slice_in_dim(results, result, start, axis)
        return results, lax.dynamic_update_slice_in_dim(figures, figure, start, axis)

    return lax.fori_loop(0, chunks, chunk, (layer.w, layer.radius))


def fusion_barrier(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, computed once, whatever uses it.

    XLA on CPU computes a fused operand again for each of its uses. It does not fuse across a conditional, so the
    function stands in one that is always taken, which the compiler does not know.
    """
    # Like the results, so that in `shard_map` both branches vary over the same axes of the mesh.
    results = jax.eval_shape(function, *args)
    return lax.cond(
        lax.optimization_barrier(jnp.ones((), bool)),
        lambda: function(*args),
        lambda: jax.tree.map(jnp.zeros_like, results),
    )


def offsets(sizes: Sequence[int]) -> list[Array]:
    """Where consecutive parts of these sizes begin, in numbers that the compiler does not know.

    XLA on CPU compiles a kernel for each slice whose start it knows; all others of one size share a kernel.
    """
    starts = [jnp.uint32(start) for start in itertools.accumulate(sizes[:-1], initial=0)]
    return fusion_barrier(lambda *starts: list(starts), *starts)


def unstack(stacked: Shaped[Array, "parts *grid"]) -> list[Shaped[Array, "*grid"]]:
    """The parts, one by one."""
    count, grid = len(stacked), stacked.shape[1:]
    if is_shared() or count == 1:
        return list(stacked)
    flat, size = stacked.ravel(), math.prod(grid)

    def at_known_places(flat: Array) -> list[Array]:
        return [lax.slice_in_dim(flat, part * size, (part + 1) * size).reshape(grid) for part in range(count)]

    def at_unknown_places(flat: Array) -> list[Array]:
        return [lax.dynamic_slice_in_dim(flat, start, size).reshape(grid) for start in offsets([size] * count)]

    return lax.platform_dependent(flat, cpu=at_unknown_places, default=at_known_places)


# XLA on CPU compiles a kernel for every slice and for every operand of a stack: with thousands of leaves that is most
# of the time to compile a step. Calls that are not inlined, each of a few leaves, share their kernels. A call has half
# the instructions of a `fusion_barrier`.


def are_many(count: int, shape: tuple[int, ...]) -> bool:
    """Whether so many arrays of a shape are better handled as one."""
    # Stacked, they would lose the axes along which they are shared out over devices.
    return not is_shared() and count >= _FEWEST and math.prod(shape) <= _LARGEST


def pack(parts: Sequence[Shaped[Array, "*shape"]]) -> Shaped[Array, "parts *shape"]:
    """Many arrays as one."""

    def on_cpu(*parts: Array) -> Array:
        starts = range(0, len(parts), _STACKED)
        with set_xla_metadata(inlineable="false"):
            stacked = [_stacked(*parts[start : start + _STACKED]) for start in starts]
        return jnp.concatenate(stacked)

    return lax.platform_dependent(*parts, cpu=on_cpu, default=lambda *parts: jnp.stack(parts))


def unpack(packed: Shaped[Array, "parts *shape"]) -> list[Shaped[Array, "*shape"]]:
    """Undoes `pack`."""
    count = len(packed)

    def on_cpu(packed: Array) -> list[Array]:
        size = min(_SLICED, count)
        # The last slice begins early, so that all are of one size.
        starts = [min(start, count - size) for start in range(0, count, size)]
        unknown = offsets([*map(operator.sub, starts[1:], starts), size])
        with set_xla_metadata(inlineable="false"):
            slices = [_sliced(packed, start, size) for start in unknown]
        return [slices[place // size][place - starts[place // size]] for place in range(count)]

    return lax.platform_dependent(packed, cpu=on_cpu, default=list)


# Traced once for all calls.


@jax.jit
def _stacked(*parts: Array) -> Array:
    return jnp.stack(parts)


@functools.partial(jax.jit, static_argnums=2)
def _sliced(packed: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(packed, start, size)
