"""Arithmetic on many matrices, on a few of them at a time."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ..linalg import chunks_of, layout_for
from ._manifold import compute_dtype


def by_chunks(
    function: Callable,
    x: Array,
    w: Array,
    kind: Array | None,
    radius: float | Array,
    *radii: Array | None,
    scalars: tuple[float | Array, ...] = (),
) -> tuple[Array, Array]:
    """`function(layout, x, w, kind, radius, 1/radius, *(radii/radius), *scalars)`, whose arrays are in the layout.

    It answers with an array like `w` and a figure for each matrix. On CPU it is given chunks, so that the intermediate
    results stay in the cache. Those of a whole network would be new to the process at every call, and the page faults
    cost as much as the arithmetic.
    """
    chunks = chunks_of(x.shape)
    batch, layout, widest = x.shape[:-2], layout_for(x.shape), max(x.dtype, w.dtype, key=lambda dtype: dtype.itemsize)
    dtype = compute_dtype(widest)
    radius = jnp.broadcast_to(jnp.asarray(radius, dtype), batch)
    # Divided once, not for every entry.
    values = [kind, radius, 1 / radius, *(each if each is None else each.astype(dtype) / radius for each in radii)]
    scalars = tuple(jnp.asarray(each, dtype) for each in scalars)
    # What goes into a loop or a branch is shaped as it is in memory, or it would be copied at every turn.
    x, w = layout.keep(x.astype(dtype)), layout.keep(w.astype(dtype))

    def whole(scalars, x, w, *values):
        x, w = (layout.apart(layout.take_kept, each) for each in (x, w))
        result, figure = function(layout, x, w, *(v if v is None else layout.take_values(v) for v in values), *scalars)
        return layout.apart(layout.keep_given, result), layout.give_values(figure)

    def chunked(scalars, x, w, *values):
        size = batch[0] // chunks
        own_layout = layout.of_part(size)

        def chunk(index, carry):
            (w, figures), start = carry, index * size
            own = (v if v is None else own_layout.take_values(lax.dynamic_slice_in_dim(v, start, size)) for v in values)
            result, figure = function(own_layout, *(layout.take_part(a, start, size) for a in (x, w)), *own, *scalars)
            # The result takes the place of what it is made from.
            figures = lax.dynamic_update_slice_in_dim(figures, own_layout.give_values(figure), start, 0)
            return layout.put_part(w, result, start), figures

        # In `shard_map` the results differ between devices where any of the arguments do.
        nothing = sum(jnp.zeros_like(a, dtype, shape=()) for a in (x, w, *values, *scalars) if a is not None)
        return lax.fori_loop(0, chunks, chunk, (w + nothing, jnp.zeros(batch, dtype) + nothing))

    results, figures = lax.platform_dependent(
        scalars, x, w, *values, cpu=chunked if chunks > 1 else whole, default=whole
    )
    return layout.kept(results).astype(widest), figures
