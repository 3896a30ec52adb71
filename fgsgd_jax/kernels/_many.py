"""Many small arrays of one shape as one array, and apart again.

On CPU every slice of an array at a place of its own is a kernel, and so is every array that is stacked with others:
compiling took longer than all the rest of a step. In calls that XLA does not inline a few are stacked and sliced at a
time, so that all of these are the same kernels. A call has half the instructions of a `fusion_barrier`, on which much
of the time to compile thousands of leaves was spent.
"""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Shaped

from ._by_platform import is_shared
from ._cpu_chunks import offsets

# Fewer compile in no time. Larger ones are not worth a copy.
_FEWEST, _LARGEST = 64, 2**12
# XLA on CPU fuses a concatenation of up to so many parts, and recognizes equal fusions.
_STACKED, _SLICED = 8, 32


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
