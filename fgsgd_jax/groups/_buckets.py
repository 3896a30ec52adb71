"""Buckets and batches: the parameters of a plan, stacked and handled together.

Arithmetic on them is compiled once for each sort of matrix; what grows with the number of layers is to join them and to
take them apart.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ..linalg import filled_up, layout_for, repeated
from ..manifolds import Manifold, compute_dtype
from ._collection import Collection
from ._plan import Plan
from ._views import View

Grouping = Literal["layer", "matrix", "row", "column", "row or column", "custom"]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Parameters of one shape, view and structure of groups: the static part of their collections.

    `grouping` says what the groups are: the whole layer, one matrix each, the matrices of one row (input) or column
    (output) of the grid on one of the `members`, either as the row says, or any.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    view: View
    kinds: tuple[Manifold, ...]
    num_groups: int
    grouping: Grouping
    members: int

    def stack(self, leaves: dict[str, Array]) -> Float[Array, "layers inputs outputs rows cols"]:
        """The matrices of all parameters of the bucket, in the dtype of constraint arithmetic."""
        dtype = self.dtype(leaves)
        return self.view.split(jnp.stack([leaves[path].astype(dtype) for path in self.paths]))

    def unstack(
        self, matrices: Float[Array, "layers inputs outputs rows cols"], like: dict[str, Array]
    ) -> dict[str, Array]:
        """The tensors of the bucket by path, in the dtypes of `like`."""
        tensors = self.view.merge(matrices)
        return {path: tensors[layer].astype(like[path].dtype) for layer, path in enumerate(self.paths)}

    def dtype(self, leaves: dict[str, Any]) -> jnp.dtype:
        """The widest dtype of constraint arithmetic among the leaves of the bucket."""
        return max((compute_dtype(leaves[path].dtype) for path in self.paths), key=lambda dtype: dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Buckets whose matrices have one shape and one set of manifolds: their arithmetic runs together.

    Joined, the matrices of all layers follow each other along one axis, and after them the first ones again where
    arithmetic likes another number. A bucket of sharded parameters is a batch of its own and keeps its axes (layers,
    inputs, outputs), so that nothing has to move between devices. `places` are the buckets' positions in the plan's.
    """

    buckets: tuple[Bucket, ...]
    places: tuple[int, ...]
    joined: bool

    @property
    def kinds(self) -> tuple[Manifold, ...]:
        """The manifolds of the matrices."""
        return self.buckets[0].kinds

    def dtype(self, leaves: dict[str, Any]) -> jnp.dtype:
        """The widest dtype of constraint arithmetic among the leaves."""
        return max((bucket.dtype(leaves) for bucket in self.buckets), key=lambda dtype: dtype.itemsize)

    def stack(self, leaves: dict[str, Array]) -> Float[Array, "*batch rows cols"]:
        """The matrices of all parameters, in the dtype of constraint arithmetic."""
        if not self.joined:
            return self.buckets[0].stack(leaves)
        dtype, layout = self.dtype(leaves), layout_for(self._shape)
        parts = [bucket.view.split(leaves[path].astype(dtype)) for bucket in self.buckets for path in bucket.paths]
        return layout.join(parts)

    def unstack(self, matrices: Float[Array, "*batch rows cols"], like: dict[str, Array]) -> dict[str, Array]:
        """The tensors by path, in the dtypes of `like`."""
        if not self.joined:
            return self.buckets[0].unstack(matrices, like)
        layout = layout_for(self._shape)
        owners = [(path, bucket.view) for bucket in self.buckets for path in bucket.paths]
        parts = layout.split(matrices, [view.grid[:2] for _, view in owners])
        return {
            path: view.merge(part).astype(like[path].dtype) for (path, view), part in zip(owners, parts, strict=True)
        }

    def keep(self, matrices: Float[Array, "*batch rows cols"], like: dict[str, Array]) -> Any:
        """The matrices as an update keeps them, at no cost: joined as they are in memory, else as tensors by path."""
        return layout_for(self._shape).keep(matrices) if self.joined else self.unstack(matrices, like)

    def kept(self, matrices: Any) -> Float[Array, "*batch rows cols"]:
        """Undoes `keep`."""
        return layout_for(self._shape).kept(matrices) if self.joined else self.stack(matrices)

    def kept_leaves(self, leaves: dict[str, Array]) -> Any:
        """The leaves' matrices as `keep` has them, with the shardings of the leaves."""
        return self.keep(self.stack(leaves), leaves) if self.joined else {path: leaves[path] for path in self.paths}

    def unkept_leaves(self, kept: Any, like: dict[str, Array]) -> dict[str, Array]:
        """Undoes `kept_leaves`: tensors by path, in the dtypes of `like`."""
        if self.joined:
            return self.unstack(self.kept(kept), like)
        return {path: x.astype(like[path].dtype) for path, x in kept.items()}

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters, in the order of their matrices."""
        return tuple(path for bucket in self.buckets for path in bucket.paths)

    def own(self, values: Sequence[Any]) -> list[Any]:
        """The part of this batch of one value for every bucket of the plan."""
        return [values[place] for place in self.places]

    def flat(self, values: Sequence[Any]) -> Any:
        """A value for each matrix of each of the batch's buckets [layers, inputs, outputs], as one array [*batch].

        The first values again for the matrices that follow again. None if they are None.
        """
        if values[0] is None or not self.joined:
            return values[0]
        dtype = max((value.dtype for value in values), key=lambda dtype: dtype.itemsize)
        flat = [value.reshape(-1).astype(dtype) for value in values]
        layout = layout_for(self._shape)
        return layout.apart(lambda *flat: jnp.concatenate([*flat, *repeated(flat, self._shape[0])]), *flat)

    def grids(self, values: Shaped[Array, "*batch"]) -> list[Shaped[Array, "layers inputs outputs"]]:
        """The values of the batch's matrices by bucket: undoes `flat`."""
        if not self.joined:
            return [values]
        shapes = [(len(bucket.paths), *bucket.view.grid[:2]) for bucket in self.buckets]
        parts = jnp.split(values, np.cumsum([np.prod(shape) for shape in shapes]))
        return [part.reshape(shape) for part, shape in zip(parts[: len(shapes)], shapes, strict=True)]

    @property
    def _shape(self) -> tuple[int, int, int]:
        count = sum(len(bucket.paths) * bucket.view.grid[0] * bucket.view.grid[1] for bucket in self.buckets)
        rows, cols = self.buckets[0].view.grid[2:]
        return filled_up((count, rows, cols)), rows, cols


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """Arrays of all buckets, the layers along their first axis; `paths` names the layers. None where none is needed."""

    values: tuple[Any, ...]
    paths: tuple[tuple[str, ...], ...] = dataclasses.field(metadata={"static": True})

    def by_path(self) -> dict[str, Array]:
        """The layers' parts by path."""
        return {
            path: value[layer]
            for paths, value in zip(self.paths, self.values, strict=True)
            if value is not None
            for layer, path in enumerate(paths)
        }


def buckets(plan: Plan) -> tuple[Bucket, ...]:
    """The buckets of a plan's collections. Static: the same for all seeds."""
    found: dict[tuple, list[str]] = {}
    for path, collection in plan.collections.items():
        key = (
            plan.entries[path].shape,
            collection.view,
            collection.kinds,
            collection.num_groups,
            _grouping(collection),
            len(collection.manifolds),
        )
        found.setdefault(key, []).append(path)
    return tuple(Bucket(tuple(paths), *key) for key, paths in found.items())


def batches(plan: Plan, layout: Sequence[Bucket]) -> tuple[Batch, ...]:
    """The batches of a plan's buckets."""
    found: dict[tuple, list[int]] = {}
    for place, bucket in enumerate(layout):
        sharded = not plan.sharded.isdisjoint(bucket.paths)
        found.setdefault((bucket.kinds, bucket.view.grid[2:], place if sharded else None), []).append(place)
    return tuple(
        Batch(tuple(layout[place] for place in places), tuple(places), joined=alone is None)
        for (_, _, alone), places in found.items()
    )


def figures(like: Stacked, parts: Iterable[tuple[Batch, Sequence[Array]]]) -> Stacked:
    """What each batch found for the layers of its buckets, as a `Stacked` with the dtypes of `like`."""
    values = list(like.values)
    for batch, own in parts:
        for place, value in zip(batch.places, own, strict=True):
            values[place] = value.astype(like.values[place].dtype)
    return Stacked(tuple(values), like.paths)


def stacked(plan: Plan, layout: Iterable[Bucket], of: Callable[[Bucket, Collection], np.ndarray | None]) -> Stacked:
    """`of(bucket, collection)` of every parameter, stacked over each bucket; None where it is None."""
    values = []
    for bucket in layout:
        layers = [layer for path in bucket.paths if (layer := of(bucket, plan.collections[path])) is not None]
        values.append(jnp.asarray(np.stack(layers)) if layers else None)
    return Stacked(tuple(values), tuple(bucket.paths for bucket in layout))


def kinds_of(plan: Plan, layout: Iterable[Bucket]) -> Stacked:
    """The index in `kinds` of every matrix [layers, inputs, outputs]; None in a bucket of one kind."""
    return stacked(plan, layout, lambda bucket, collection: collection.kind if len(bucket.kinds) > 1 else None)


def groups_of(plan: Plan, layout: Iterable[Bucket]) -> Stacked:
    """What tells the group of every matrix [layers, inputs, outputs] from its place: see `Bucket.grouping`.

    Its member where groups are rows or columns; where they are either, the members of column groups count from
    `members` on. The number of its group where groups are any; None where the place is enough.
    """

    def of(bucket: Bucket, collection: Collection) -> np.ndarray | None:
        match bucket.grouping:
            case "layer" | "matrix":
                return None
            case "custom":
                return collection.group
            case "row or column":
                # The groups of PIO's columns come first.
                return (collection.member + bucket.members * (collection.group < collection.group.shape[1])).astype(
                    np.int8 if 2 * bucket.members < 128 else np.int16
                )
        return collection.member

    return stacked(plan, layout, of)


def _grouping(collection: Collection) -> Grouping:
    if collection.num_groups == 1:
        return "layer"
    if collection.num_groups == collection.group.size:
        return "matrix"
    inputs = collection.group.shape[0]
    schemes: dict[str, Grouping] = {"PI": "row", "PO": "column", "PIO": "row or column" if inputs > 1 else "row"}
    return schemes.get(collection.scheme, "custom")
