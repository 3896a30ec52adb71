"""Buckets: parameters of one shape and structure of groups, whose figures are computed together."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from ..manifolds import Euclidean, Manifold, compute_dtype
from ._collection import Collection
from ._plan import Plan
from ._views import View

Grouping = Literal["layer", "matrix", "row", "column", "row or column", "custom"]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Parameters of one shape, view and structure of groups: the static part of their collections.

    `grouping` says what the groups are: the whole layer, one matrix each, the matrices of one row (input) or column
    (output) of the grid on one of the `members`, either as the row says, or any. `layers` are the axes of a parameter
    that stack layers; a stack over the bucket runs over all layers of all parameters.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    layers: tuple[int, ...]
    view: View
    kinds: tuple[Manifold, ...]
    num_groups: int
    grouping: Grouping
    members: int

    @property
    def grid(self) -> tuple[int, ...]:
        """Of one parameter: layers, inputs, outputs."""
        return (*self.layers, *self.view.grid[:2])

    @property
    def is_euclidean(self) -> bool:
        """Whether all matrices are Euclidean."""
        return all(isinstance(kind, Euclidean) for kind in self.kinds)

    def layer_names(self, path: str) -> list[str]:
        """The names by which the layers of a parameter are drawn: its path, and the place in a stack."""
        return ["/".join((path, *map(str, index))) for index in np.ndindex(*self.layers)]

    def grid_spec(self, spec: PartitionSpec) -> PartitionSpec | None:
        """How values [*layers, inputs, outputs] lie on a mesh if tensors lie as `spec` says.

        None if a matrix is on several devices, or several axes of a tensor make up one of the grid.
        """
        axes, (inputs, outputs, *_) = self.view.axes
        parts = (*spec, *(None,) * (len(self.shape) - len(spec)))
        depth = len(self.layers)
        shared = {tuple(axis): part for axis, part in zip(axes, parts[depth:], strict=True) if part is not None}
        if any(list(axis) not in (inputs, outputs) for axis in shared):
            return None
        return PartitionSpec(*parts[:depth], shared.get(tuple(inputs)), shared.get(tuple(outputs)))

    def flat(self, stacked: Shaped[Array, "paths *layers inputs outputs"]) -> Shaped[Array, "all inputs outputs"]:
        """Values of the matrices of all layers of all parameters."""
        return stacked.reshape(-1, *self.view.grid[:2])

    def unflat(self, values: Shaped[Array, "all inputs outputs"]) -> Shaped[Array, "paths *layers inputs outputs"]:
        """Undoes `flat`."""
        return values.reshape(len(self.paths), *self.grid)

    def by_path(self, values: Shaped[Array, "all *rest"]) -> Shaped[Array, "paths depth"]:
        """Values of all layers, by parameter."""
        return values.reshape(len(self.paths), -1)

    def own(self, leaves: Mapping[str, Array]) -> tuple[Array, ...]:
        """The tensors of the bucket's parameters."""
        return tuple(leaves[path] for path in self.paths)

    def as_one(self, tensors: Sequence[Array]) -> bool:
        """Whether these are one tensor [paths, *shape] of all parameters, not one of each."""
        return len(tensors) < len(self.paths)

    def matrices(self, tensors: Sequence[Array]) -> Float[Array, "paths *layers inputs outputs rows cols"]:
        """The matrices of all parameters, in the widest dtype of constraint arithmetic among the tensors."""
        dtype = widest(compute_dtype(tensor.dtype) for tensor in tensors)
        tensors = [tensor.astype(dtype) for tensor in tensors]
        return self.view.split(tensors[0] if self.as_one(tensors) else jnp.stack(tensors))

    def tensors(
        self, matrices: Float[Array, "paths *layers inputs outputs rows cols"], like: Sequence[Array]
    ) -> tuple[Array, ...]:
        """Undoes `matrices`: tensors in the dtypes of `like`, each parameter's own or one of all as these are."""
        merged = self.view.merge(matrices)
        parts = [merged] if self.as_one(like) else merged
        return tuple(part.astype(tensor.dtype) for part, tensor in zip(parts, like, strict=True))


def buckets(plan: Plan) -> tuple[Bucket, ...]:
    """The buckets of a plan's collections. Static: the same for all seeds."""
    if plan._buckets is not None:
        return plan._buckets
    found: dict[tuple, list[str]] = {}
    for path, collection in plan.collections.items():
        key = (
            plan.entries[path].shape,
            collection.layers,
            collection.view,
            collection.kinds,
            collection.num_groups,
            _grouping(collection),
            len(collection.manifolds),
        )
        found.setdefault(key, []).append(path)
    plan._buckets = tuple(Bucket(tuple(sorted(paths)), *key) for key, paths in found.items())
    return plan._buckets


def widest(dtypes: Iterable[jnp.dtype]) -> jnp.dtype:
    """The dtype of the most bits."""
    return max(dtypes, key=lambda dtype: dtype.itemsize)


# What belongs to the matrices of each bucket: an array [paths, *layers, inputs, outputs], or () where none is needed.
Stacks = tuple[Any, ...]


def names_of(plan: Plan) -> tuple[dict[str, tuple[()]], ...]:
    """The paths of every bucket, as keys: a pytree without leaves, so that a state knows its parameters by name."""
    return tuple(dict.fromkeys(bucket.paths, ()) for bucket in buckets(plan))


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
        dtypes = {leaves[path].dtype for path in bucket.paths if path in leaves}
        return widest([*map(compute_dtype, dtypes), jnp.dtype(jnp.float32)])

    def of(bucket: Bucket, collection: Collection) -> np.ndarray:
        return np.broadcast_to(np.asarray(collection.gamma, dtype_of(bucket)), collection.member.shape)

    return _stacks(plan, of, layout)


def _stacks(
    plan: Plan,
    of: Callable[[Bucket, Collection], np.ndarray | None],
    layout: Iterable[Bucket] | None = None,
) -> Stacks:
    stacks = []
    for bucket in buckets(plan) if layout is None else layout:
        parts = [part for path in bucket.paths if (part := of(bucket, plan.collections[path])) is not None]
        stacks.append(jnp.asarray(np.stack(parts)) if parts else ())
    return tuple(stacks)


def _grouping(collection: Collection) -> Grouping:
    *layers, inputs, _ = collection.group.shape
    if collection.num_groups == math.prod(layers):
        return "layer"
    if collection.num_groups == collection.group.size:
        return "matrix"
    schemes: dict[str, Grouping] = {"PI": "row", "PO": "column", "PIO": "row or column" if inputs > 1 else "row"}
    return schemes.get(collection.scheme, "custom")
