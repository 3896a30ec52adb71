"""CPU: what keeps a step in the cache, and what keeps XLA from computing things twice."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._layers import Layer


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
