"""Buckets: the parameters of one shape and structure, stacked and handled together.

A program over buckets grows with the number of different layers, not with the number of layers.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..manifolds import Manifold, compute_dtype
from ._plan import Plan
from ._views import View


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Parameters of one shape, view, number of groups and set of manifolds: the static part of their collections."""

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    view: View
    kinds: tuple[Manifold, ...]
    num_groups: int

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
        key = (plan.entries[path].shape, collection.view, collection.kinds, collection.num_groups)
        found.setdefault(key, []).append(path)
    return tuple(Bucket(tuple(paths), *key) for key, paths in found.items())


def stacked(plan: Plan, layout: Iterable[Bucket], of: Callable[[Bucket, str], np.ndarray | None]) -> Stacked:
    """`of(bucket, path)` of every parameter, stacked over each bucket; None where it is None."""
    values = []
    for bucket in layout:
        layers = [layer for path in bucket.paths if (layer := of(bucket, path)) is not None]
        values.append(jnp.asarray(np.stack(layers)) if layers else None)
    return Stacked(tuple(values), tuple(bucket.paths for bucket in layout))


def kinds_of(plan: Plan, layout: Iterable[Bucket]) -> Stacked:
    """The index in `kinds` of every matrix [layers, inputs, outputs]; None in a bucket of one kind."""
    return stacked(plan, layout, lambda bucket, path: plan.collections[path].kind if len(bucket.kinds) > 1 else None)


def groups_of(plan: Plan, layout: Iterable[Bucket]) -> Stacked:
    """The number of the group of every matrix [layers, inputs, outputs].

    None where it is plain from the number of groups: one group a layer, or one a matrix.
    """
    return stacked(
        plan,
        layout,
        lambda bucket, path: (
            None if bucket.num_groups in (1, plan.collections[path].group.size) else plan.collections[path].group
        ),
    )
