"""Buckets: parameters of one shape and structure of groups, whose figures are computed together."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ..linalg import compute_dtype
from ..manifolds import Manifold
from ._collection import Collection, Entry
from ._views import View

Grouping = Literal["layer", "matrix", "row", "column", "row or column", "custom"]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Parameters of one shape, view and structure of groups: the static part of their collections.

    `grouping` says what the groups are: the whole layer, one matrix each, the matrices of one row (input) or column
    (output) of the grid on one of the `members`, either as the row says, or any. `layers` are the axes of a parameter
    that stack layers. `is_euclidean` says that all matrices are.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    layers: tuple[int, ...]
    view: View
    kinds: tuple[Manifold, ...]
    num_groups: int
    grouping: Grouping
    members: int
    is_euclidean: bool

    @functools.cached_property
    def grid(self) -> tuple[int, ...]:
        """Of one parameter: layers, inputs, outputs."""
        return (*self.layers, *self.view.grid[:2])

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

    def matrices(self, tensors: Sequence[Array]) -> Float[Array, "paths *layers inputs outputs rows cols"]:
        """The matrices of all parameters, in the widest dtype of constraint arithmetic among the tensors."""
        dtype = compute_dtype(*(tensor.dtype for tensor in tensors))
        return self.view.split(jnp.stack([tensor.astype(dtype) for tensor in tensors]))

    def tensors(
        self, matrices: Float[Array, "paths *layers inputs outputs rows cols"], like: Sequence[Array]
    ) -> tuple[Array, ...]:
        """Undoes `matrices`: tensors in the dtypes of `like`."""
        pairs = zip(self.view.merge(matrices), like, strict=True)
        return tuple(part.astype(tensor.dtype) for part, tensor in pairs)


def buckets_of(entries: dict[str, Entry]) -> tuple[Bucket, ...]:
    """The buckets of a plan's collections. Static: the same for all seeds."""
    found: dict[tuple, list[str]] = {}
    for path, entry in entries.items():
        if (collection := entry.collection) is None:
            continue
        key = (
            entry.shape,
            collection.layers,
            collection.view,
            collection.kinds,
            collection.num_groups,
            _grouping(collection),
            len(collection.manifolds),
            not collection.constrained,
        )
        found.setdefault(key, []).append(path)
    return tuple(Bucket(tuple(sorted(paths)), *key) for key, paths in found.items())


def _grouping(collection: Collection) -> Grouping:
    *layers, inputs, _ = collection.group.shape
    if collection.num_groups == math.prod(layers):
        return "layer"
    if collection.num_groups == collection.group.size:
        return "matrix"
    schemes: dict[str, Grouping] = {"PI": "row", "PO": "column", "PIO": "row or column" if inputs > 1 else "row"}
    return schemes.get(collection.scheme, "custom")
