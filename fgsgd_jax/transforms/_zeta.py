"""Line 6 of Algorithm 1: the gradient's squared norm over a group."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..groups import Bucket

Scalar = float | Float[Array, ""]


def check_options(rho: Scalar, curvature: Scalar) -> None:
    """Raises for a negative ρ or c; tracers, as `optax.inject_hyperparams` passes, cannot be looked at."""
    for name, value in (("rho", rho), ("curvature", curvature)):
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{name}={value}: give a number of 0 or more (ρ is a distance, c a bound of |curvature|)")


def of_groups(
    squares: Float[Array, "layers inputs outputs"], group: Int[Array, "layers inputs outputs"] | None, bucket: Bucket
) -> tuple[Float[Array, "layers #inputs #outputs"], list[Float[Array, "_ _"]]]:
    """Sums over groups: for every matrix that of its group, and tables that together hold every group once, or 0.

    Rows and columns are summed by masks, which needs no scattered additions and keeps shardings.
    """
    match bucket.grouping:
        case "matrix":
            return squares, [squares.reshape(len(squares), -1)]
        case "layer":
            total = jnp.sum(squares, axis=(1, 2), keepdims=True)
            return total, [total[:, :, 0]]
        case "custom":
            # The numbers run on over the layers that a parameter stacks.
            count, numbers = len(bucket.paths), bucket.num_groups
            assert group is not None
            keys = bucket.by_path(group) + numbers * jnp.arange(count, dtype=group.dtype)[:, None]
            sums = jax.ops.segment_sum(squares.ravel(), keys.ravel(), count * numbers).reshape(count, numbers)
            own = jnp.take_along_axis(sums, group.reshape(count, -1), axis=1)
            return own.reshape(group.shape), [sums]
    # Members of rows, of columns, or first those of rows and then those of columns: see `groups_of`.
    axes = {"row": (2,), "column": (1,), "row or column": (2, 1)}[bucket.grouping]
    own, tables = jnp.zeros_like(squares), []
    for code, axis in enumerate(axis for axis in axes for _ in range(bucket.members)):
        sums = jnp.sum(jnp.where(group == code, squares, 0), axis=axis, keepdims=True)
        own = jnp.where(group == code, sums, own)
        tables.append(jnp.squeeze(sums, axis))
    return own, tables
