"""One value for each matrix, of several layers of one grid: stacked, and by layer again."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from ._by_platform import is_shared
from ._cpu_chunks import offsets


def stack(parts: Sequence[Shaped[Array, "*grid"]]) -> Shaped[Array, "parts *grid"]:
    """The values of all parts as one array."""
    if is_shared():
        # Axes that may be shared out over devices stay as they are.
        return jnp.stack(parts)
    # Of parts of one array that lie side by side XLA makes one slice, if they are flat.
    return jnp.concatenate([part.ravel() for part in parts]).reshape(len(parts), *parts[0].shape)


def unstack(stacked: Shaped[Array, "parts *grid"], restacked: bool = False) -> list[Shaped[Array, "*grid"]]:
    """Undoes `stack`; `restacked` says that the parts are only stacked or joined again."""
    count, grid = len(stacked), stacked.shape[1:]
    if is_shared() or count == 1:
        return list(stacked)
    flat, size = stacked.ravel(), math.prod(grid)

    def at_known_places(flat: Array) -> list[Array]:
        return [lax.slice_in_dim(flat, part * size, (part + 1) * size).reshape(grid) for part in range(count)]

    def at_places_of_run_time(flat: Array) -> list[Array]:
        return [lax.dynamic_slice_in_dim(flat, start, size).reshape(grid) for start in offsets([size] * count)]

    if restacked:
        return at_known_places(flat)
    return lax.platform_dependent(flat, cpu=at_places_of_run_time, default=at_known_places)
