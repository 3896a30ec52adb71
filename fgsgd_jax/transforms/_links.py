"""What the links of the chain share: finding the constrained weights in a tree, as stacked matrices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from ..groups import Batch, Plan, Stacked, by_path, violation
from ..manifolds import Mixture

# A forgotten `initialize` violates by about 1; rounding to bfloat16 by a few of its eps.
_OFF_MANIFOLD = 1e-3


def constrained_leaves(tree: Any, plan: Plan, role: str, link: str) -> dict[str, Array]:
    """The leaves by path, if the weights of the plan's collections are among them, in their shapes."""
    if tree is None:
        raise ValueError(f"{link} needs the {role}: call tx.update(grads, state, params)")
    leaves = by_path(tree)
    for path in plan.collections:
        if path not in leaves:
            raise ValueError(
                f"{link}: the {role} lack the leaf {path!r}, which the plan constrains; a wrapper that flattens, "
                f"renames or masks weights must stay outside the constrained ones. The paths are {list(leaves)[:8]}"
            )
        if leaves[path].shape != plan.entries[path].shape:
            raise ValueError(
                f"{link}: {path} has shape {leaves[path].shape} in the {role}, {plan.entries[path].shape} in the plan: "
                "make the plan from these parameters"
            )
    return leaves


def wider(points: dict[str, Array], updates: dict[str, Array]) -> dict[str, Array]:
    """By path whichever has the wider dtype, the point or its update: gradients may be coarser than the weights."""
    return {
        path: max(points.get(path, update), update, key=lambda leaf: leaf.dtype.itemsize)
        for path, update in updates.items()
    }


def mixtures_of(joined: Sequence[Batch], kinds: Stacked, radii: Stacked) -> list[Mixture]:
    """The manifolds of every batch at the radii ℜ."""
    return [
        Mixture(batch.kinds, batch.flat(batch.own(kinds.values)), batch.flat(batch.own(radii.values)))
        for batch in joined
    ]


def check_on_manifold(params: Any, plan: Plan, link: str, radii: str) -> None:
    """Raises if concrete parameters are off their manifolds; under jit nothing can be said."""
    leaves = by_path(params)
    if any(path not in leaves or isinstance(leaves[path], (Tracer, jax.ShapeDtypeStruct)) for path in plan):
        return
    for path, found in violation(params, plan, radii=None if radii == "gamma" else "fitted").items():
        if not float(found) <= max(_OFF_MANIFOLD, 16 * float(jnp.finfo(leaves[path].dtype).eps)):
            collection = plan.collections[path]
            raise ValueError(
                f"{link}: {path} is off its manifolds ({', '.join(type(kind).__name__ for kind in collection.kinds)}; "
                f"γ = {np.min(collection.gamma):.3g}) by {float(found):.2g}. Start from "
                "fg.initialize(key, params, plan), or keep these weights with fg.nearest(params, plan); to keep their "
                "scales too, write radii='fitted' in both"
            )
