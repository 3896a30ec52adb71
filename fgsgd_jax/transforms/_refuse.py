"""Gradients that no step can be taken along: refused leaf by leaf, and counted."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ..groups import Batch, Bucket, Plan, Stacked
from ..manifolds import compute_dtype

# The rule everywhere: a leaf whose squared norm is not finite (NaN, infinite, or a norm above 10¹⁹ in float32, after
# which ζ leaves nothing of a step and no second moment is a number) counts as zero. So nothing that is not finite
# reaches a weight, a momentum buffer or a moment, and all other leaves move as if nothing had happened.


def none_refused(plan: Plan, layout: tuple[Bucket, ...]) -> Stacked:
    """The counts of refused gradients before the first step: of the layers by bucket, then of all other leaves."""
    paths = [bucket.paths for bucket in layout]
    if others := tuple(path for path in plan if path not in plan.collections):
        paths.append(others)
    return Stacked(tuple(jnp.zeros(len(names), jnp.int32) for names in paths), tuple(paths))


def finite_matrices(
    batch: Batch, t: Array, squares: Float[Array, "*batch"]
) -> tuple[Array, Float[Array, "*batch"], list[Bool[Array, "layers"]]]:
    """The matrices `t`, zero in layers that are refused; their squared norms; and by bucket which layers those are."""
    grids = batch.grids(squares)
    usable = [jnp.isfinite(jnp.sum(grid, axis=(1, 2), keepdims=True)) for grid in grids]
    on = batch.flat([jnp.broadcast_to(layers, grid.shape) for layers, grid in zip(usable, grids, strict=True)])
    return jnp.where(on[..., None, None], t, 0), jnp.where(on, squares, 0), [~layers[:, 0, 0] for layers in usable]


def counted(before: Stacked, parts: Sequence[tuple[Batch, list[Bool[Array, "_"]]]]) -> Stacked:
    """The counts with one more for each layer that is refused."""
    values = list(before.values)
    for batch, refused in parts:
        for place, flags in zip(batch.places, refused, strict=True):
            values[place] += flags.astype(jnp.int32)
    return Stacked(tuple(values), before.paths)


def finite_others(leaves: dict[str, Any], plan: Plan, before: Stacked) -> tuple[dict[str, Any], Stacked]:
    """The leaves without a collection, zero where they are refused, and the counts with one more for each."""
    kept, refused = {}, {}
    for path, g in leaves.items():
        if path in plan.collections or not jnp.issubdtype(g.dtype, jnp.inexact):
            continue
        size = jnp.abs(g)
        usable = jnp.isfinite(jnp.sum(jnp.square(size.astype(compute_dtype(size.dtype)))))
        kept[path], refused[path] = lax.select(usable, g, jnp.zeros_like(g)), ~usable
    if not kept:
        return kept, before
    flags = jnp.stack([refused.get(path, jnp.zeros((), bool)) for path in before.paths[-1]])
    return kept, Stacked((*before.values[:-1], before.values[-1] + flags.astype(jnp.int32)), before.paths)
