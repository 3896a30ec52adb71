"""CPU: what keeps a step in the cache, and the form for many large matrices: the reference, a few at a time."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..manifolds import Manifold
from . import _reference
from ._layers import Layer, Results, joined, split

# In each of the arrays of a step so many numbers stay in a core's L2 cache; so few do all together.
_NUMBERS, _FEW_NUMBERS = 2**16, 2**20


def serves(manifolds: tuple[Manifold, ...], n: int, p: int, count: int) -> bool:
    """Whether this form serves `count` n×p matrices on these manifolds."""
    del manifolds
    return count * n * p > _FEW_NUMBERS and _size(n, p, count) < count


def tangent(manifolds: tuple[Manifold, ...], layers: Sequence[Layer]) -> Results:
    """See `_reference.tangent`."""
    return _by_matrices(_reference.tangent_of(manifolds), layers)


def step(
    manifolds: tuple[Manifold, ...], layers: Sequence[Layer], factor: Float[Array, ""], is_tangent: bool
) -> Results:
    """See `_reference.step`."""
    return _by_matrices(_reference.step_of(manifolds, factor, is_tangent), layers)


def _by_matrices(of_chunk: Callable[[Layer], tuple[Array, Array]], layers: Sequence[Layer]) -> Results:
    # Fused with reshapes, a concatenation asks of every entry in which of the parts it is.
    layer = joined(layers, lambda parts: fusion_barrier(lambda *parts: jnp.concatenate(parts), *parts))
    count, n, p = layer.x.shape
    results, figures = by_chunks(of_chunk, layer, _size(n, p, count), axis=0)
    return split(results, layers), split(figures, layers)


def _size(n: int, p: int, count: int) -> int:
    """The matrices of a chunk: as many as fit the cache and divide all."""
    most = max(1, _NUMBERS // (n * p))
    return next(size for size in range(most, 0, -1) if count % size == 0)


def by_chunks(
    of_chunk: Callable[[Layer], tuple[Array, Array]], layer: Layer, size: int, axis: int
) -> tuple[Array, Array]:
    """`of_chunk` of all matrices, so many at a time, in the place of `w`.

    Intermediate results of a whole network would be new to the process at every call, and the page faults cost as much
    as the arithmetic.
    """
    chunks = layer.w.shape[axis] // size
    if chunks == 1:
        return of_chunk(layer)

    def chunk(index, carry):
        results, figures = carry
        start = index * size

        def part(a: Array) -> Array:
            return fusion_barrier(lambda a, start: lax.dynamic_slice_in_dim(a, start, size, axis), a, start)

        result, figure = of_chunk(jax.tree.map(part, layer._replace(w=results)))
        results = lax.dynamic_update_slice_in_dim(results, result, start, axis)
        return results, lax.dynamic_update_slice_in_dim(figures, figure, start, axis)

    return lax.fori_loop(0, chunks, chunk, (layer.w, layer.radius))


def fusion_barrier(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, computed once, whatever uses it.

    XLA on CPU computes a fused operand again for each of its uses. The branch that is always taken, unknown to the
    compiler, is the one boundary that its fusion respects.
    """
    results = jax.eval_shape(function, *args)

    def zeros(*args):
        if not jax.sharding.get_abstract_mesh().manual_axes:
            return jax.tree.map(lambda result: jnp.zeros(result.shape, result.dtype), results)
        # Made of the arguments, so that in `shard_map` they differ between devices where those do.
        nothing = functools.reduce(operator.add, (0 * leaf.ravel()[0].astype(jnp.float32) for leaf in args))
        return jax.tree.map(lambda result: jnp.broadcast_to(nothing.astype(result.dtype), result.shape), results)

    return lax.cond(lax.optimization_barrier(jnp.ones((), bool)), function, zeros, *args)


def offsets(sizes: Sequence[int]) -> list[Array]:
    """Where parts of these sizes begin, one after the other, in numbers that the compiler does not know.

    XLA on CPU compiles a kernel for each slice whose start it knows, and else one for all of a size.
    """
    starts = [jnp.uint32(sum(sizes[:place])) for place in range(len(sizes))]
    return fusion_barrier(lambda *starts: list(starts), *starts)
