"""The collection of POMs of one parameter."""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Int

from ..manifolds import Euclidean, Manifold
from ._views import View


@dataclasses.dataclass(frozen=True, eq=False)
class Collection:
    """The partition of one parameter's grid of matrices into products of manifolds.

    `member` and `group` are integer arrays over the grid (inputs × outputs): the index in `manifolds` and the number of
    the group of each matrix. `gamma` is γ of eq. 2: a number, or an array over the grid where it varies. For a stack of
    layers, `layers` holds the lengths of the stacking axes, `view` is the view of one layer, the arrays have the shape
    [*layers, inputs, outputs], and group numbers continue from layer to layer.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> rules = [("kernel", fg.PO([fg.Sphere(), fg.Stiefel()]))]
      >>> collection = fg.plan({"kernel": jnp.ones((3, 3, 4, 6))}, rules)["kernel"]
      >>> collection.view.grid, collection.member.shape, collection.num_groups
      ((4, 6, 3, 3), (4, 6), 12)
      >>> round(collection.gamma, 4)  # (3·3·4 + 3·3·6)^-½
      0.1054
    """

    view: View
    scheme: str
    manifolds: tuple[Manifold, ...]
    member: Int[np.ndarray, "*layers inputs outputs"]
    group: Int[np.ndarray, "*layers inputs outputs"]
    gamma: float | np.ndarray
    layers: tuple[int, ...] = ()

    @functools.cached_property
    def num_groups(self) -> int:
        """Number of groups."""
        return int(self.group.max()) + 1

    @functools.cached_property
    def kinds(self) -> tuple[Manifold, ...]:
        """The distinct manifolds, whatever their radii, at radius 1: a pytree's static part."""
        return tuple(dict.fromkeys(manifold.with_radius(1.0) for manifold in self.manifolds))

    @property
    def kind(self) -> Int[np.ndarray, "*layers inputs outputs"]:
        """The index in `kinds` of each matrix."""
        table = np.array([self.kinds.index(manifold.with_radius(1.0)) for manifold in self.manifolds], np.int8)
        return table[self.member]

    @property
    def constrained(self) -> bool:
        """Whether any matrix lies on a manifold other than the Euclidean."""
        return any(not isinstance(kind, Euclidean) for kind in self.kinds)

    def describe(self) -> dict[str, Any]:
        """What a plan compares and writes: every field but the large arrays."""
        return {
            "view": self.view.pattern,
            "sizes": dict(self.view.sizes),
            # A plan without stacks is written as it was before there were any.
            **({"layers": list(self.layers)} if self.layers else {}),
            "scheme": self.scheme,
            "manifolds": [_describe_manifold(manifold) for manifold in self.manifolds],
            "groups": self.num_groups,
        }


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the plan says of one parameter: its shape and its collection (None: unconstrained)."""

    shape: tuple[int, ...]
    collection: Collection | None
    notes: tuple[str, ...] = ()


def _describe_manifold(manifold: Manifold) -> dict[str, Any]:
    """Name and static fields of a manifold (not the radius: that is γ)."""
    fields = {field.name: getattr(manifold, field.name) for field in dataclasses.fields(manifold)}
    del fields["radius"]
    return {"name": type(manifold).__name__, **fields}
