"""Moments of features, merged without loss of precision."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..linalg import compute_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureMoments:
    """Count, mean and centred second moment Σ(x - mean)² of the features that enter a weight, per input channel.

    The arrays have one shape: that of the weight's axes `axes`, in this order. For the kernels of convolutions and
    Dense layers that is the input channels [C], for a grouped convolution those of all groups; for an attention's
    output projection [heads, head_dim]. Of a stack of layers they begin with the axes of the stack, which `axes` may
    leave out: moments [layers, C] with `axes` (-2,) and with (0, -2) mean the same.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> count, mean = jnp.array([4.0, 4.0]), jnp.zeros(2)
      >>> fg.FeatureMoments(count, mean, m2=jnp.array([4.0, 36.0])).std.tolist()  # λ of two channels
      [1.0, 3.0]
    """

    # A pytree's leaves may be anything while it is transformed, so their types are not checked here.
    count: Any
    mean: Any
    m2: Any
    axes: tuple[int, ...] = dataclasses.field(default=(-2,), metadata={"static": True})

    @property
    def std(self) -> Float[Array, "*channels"]:
        """Standard deviation λ of the whole population; 0 without data."""
        return jnp.sqrt(self.m2 / jnp.maximum(self.count, 1))


def batch_moments(
    x: Float[Array, "..."], channel_axes: tuple[int, ...], axes: tuple[int, ...] = (-2,)
) -> FeatureMoments:
    """Moments of a batch `x` over all axes but `channel_axes`, in float32 at least; no gradient flows through them.

    Args:
      x: features.
      channel_axes: the axes of `x` that are input channels of the weight.
      axes: the axes of the weight that they meet.
    """
    x = lax.stop_gradient(x).astype(compute_dtype(x.dtype))
    kept = tuple(axis % x.ndim for axis in channel_axes)
    reduced = tuple(axis for axis in range(x.ndim) if axis not in kept)
    count = math.prod(x.shape[axis] for axis in reduced)
    # One pass over the features, centred on the first of them so that no digits cancel: a second pass, on the mean,
    # would keep the features alive for longer.
    first = tuple(slice(None) if axis in kept else slice(0, 1) for axis in range(x.ndim))
    shift = x[first]
    centred = x - shift
    total, squares = jnp.sum(centred, axis=reduced), jnp.sum(jnp.square(centred), axis=reduced)
    mean = jnp.squeeze(shift, axis=reduced) + total / max(count, 1)
    m2 = jnp.maximum(0, squares - jnp.square(total) / max(count, 1))
    # Reductions keep the order of the axes of x; the moments have that of `channel_axes`.
    order = tuple(sorted(kept).index(axis) for axis in kept)
    return FeatureMoments(jnp.full_like(mean, count).transpose(order), mean.transpose(order), m2.transpose(order), axes)


def merge_moments(a: FeatureMoments, b: FeatureMoments) -> FeatureMoments:
    """Moments of the union of two populations (Chan, Golub & LeVeque 1983)."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    delta = b.mean - a.mean
    return FeatureMoments(count, a.mean + share * delta, a.m2 + b.m2 + jnp.square(delta) * share * a.count, a.axes)


def merge_over(moments: FeatureMoments, axis: int | tuple[int, ...]) -> FeatureMoments:
    """Moments of the union of the populations along `axis`."""
    merged = _union(moments, functools.partial(jnp.sum, axis=axis, keepdims=True))
    return jax.tree.map(lambda x: jnp.squeeze(x, axis=axis), merged)


def _union(moments: FeatureMoments, total: Callable[[Array], Array]) -> FeatureMoments:
    """Moments of the union of the populations over which `total` sums."""
    count = total(moments.count)
    mean = total(moments.count * moments.mean) / jnp.maximum(count, 1)
    m2 = total(moments.m2 + moments.count * jnp.square(moments.mean - mean))
    return FeatureMoments(count, mean, m2, moments.axes)


def psum_moments(moments: Any, axis_name: Any) -> Any:
    """Adds up the `FeatureMoments` of a tree over all devices of a mapped axis, in `shard_map` or `pmap`.

    Under `jit` with sharded arrays nothing is needed: there the features are those of the global batch.

    Args:
      moments: of this device's share of the batch.
      axis_name: of the mapped axis, or a tuple of names.

    Returns:
      A tree of the same structure, the same on all devices.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> halves = fg.FeatureMoments(jnp.full((2, 1), 5.0), jnp.array([[-1.0], [1.0]]), jnp.zeros((2, 1)))
      >>> whole = jax.vmap(lambda part: fg.psum_moments(part, "half"), axis_name="half")(halves)
      >>> whole.std.tolist()  # constants -1 and 1: σ = 1 over both
      [[1.0], [1.0]]
    """
    total = functools.partial(lax.psum, axis_name=axis_name)
    return jax.tree.map(lambda part: _union(part, total), moments, is_leaf=is_moments)


def is_moments(node: Any) -> bool:
    """Whether a node of a tree is a `FeatureMoments`."""
    return isinstance(node, FeatureMoments)
