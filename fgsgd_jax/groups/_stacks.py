"""What belongs to the matrices of a plan, by bucket: their kinds, groups and γ."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..linalg import compute_dtype
from ._buckets import Bucket
from ._collection import Collection
from ._plan import Plan

# What belongs to the matrices of each bucket: an array [paths, *layers, inputs, outputs], or () where none is needed.
Stacks = tuple[Any, ...]


def names_of(plan: Plan) -> tuple[dict[str, tuple[()]], ...]:
    """The paths of every bucket, as keys: a pytree without leaves, so that a state knows its parameters by name."""
    return tuple(dict.fromkeys(bucket.paths, ()) for bucket in plan.buckets)


def kinds_of(plan: Plan, layout: Iterable[Bucket] | None = None) -> Stacks:
    """The index in `kinds` of every matrix; () in a bucket of one kind. `layout`: other buckets than the plan's."""
    return _stacks(plan, lambda bucket, collection: collection.kind if len(bucket.kinds) > 1 else None, layout)


def groups_of(plan: Plan) -> Stacks:
    """What tells the group of every matrix from its place: see `Bucket.grouping`.

    Its member where groups are rows or columns; where they are either, the members of column groups count from
    `members` on. The number of its group where groups are any; () where the place is enough.
    """

    def of(bucket: Bucket, collection: Collection) -> np.ndarray | None:
        match bucket.grouping:
            case "layer" | "matrix":
                return None
            case "custom":
                return collection.group
            case "row or column":
                # The groups of PIO's columns come first in each layer.
                outputs = collection.group.shape[-1]
                first = collection.group - collection.group.min(axis=(-2, -1), keepdims=True)
                dtype = np.int8 if 2 * bucket.members < 128 else np.int16
                return (collection.member + bucket.members * (first < outputs)).astype(dtype)
        return collection.member

    return _stacks(plan, of)


def gammas(plan: Plan, leaves: dict[str, Any], layout: Iterable[Bucket] | None = None) -> Stacks:
    """γ of every matrix, in the dtype of constraint arithmetic; float32 if there are no leaves."""

    @functools.cache
    def dtype_of(bucket: Bucket) -> jnp.dtype:
        return compute_dtype(*{leaves[path].dtype for path in bucket.paths if path in leaves})

    def of(bucket: Bucket, collection: Collection) -> np.ndarray:
        return np.broadcast_to(np.asarray(collection.gamma, dtype_of(bucket)), collection.member.shape)

    return _stacks(plan, of, layout)


def _stacks(
    plan: Plan,
    of: Callable[[Bucket, Collection], np.ndarray | None],
    layout: Iterable[Bucket] | None = None,
) -> Stacks:
    stacks = []
    for bucket in plan.buckets if layout is None else layout:
        parts = [part for path in bucket.paths if (part := of(bucket, plan.collections[path])) is not None]
        stacks.append(jnp.asarray(np.stack(parts)) if parts else ())
    return tuple(stacks)
