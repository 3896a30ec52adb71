"""What the links of the chain share: finding the constrained weights in a tree, as stacked matrices."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array

from ..groups import Batch, Plan, Stacked, by_path, violation
from ..manifolds import Mixture
from ._scale import ScaleState

# A forgotten `initialize` violates by about 1, half a displacement by its square, rounding to bfloat16 by a few of its
# eps, float32 by 1e-6; but a radius that falls by a factor leaves that many times the rounding, for one step.
_OFF_MANIFOLD, _OFF_AT_NEW_RADII = 1e-5, 1e-3


def constrained_leaves(tree: Any, plan: Plan, role: str, link: str) -> dict[str, Array]:
    """The leaves by path, if the weights of the plan's collections are among them, in their shapes."""
    if tree is None:
        raise ValueError(f"{link} needs the {role}: call tx.update(grads, state, params)")
    leaves = by_path(tree)
    for path in plan.collections:
        if path not in leaves:
            raise ValueError(
                f"{link}: the {role} lack the leaf {path!r}, which the plan constrains; a wrapper that flattens, "
                "renames or hides weights goes inside, as in fg.on_manifolds(optax.flatten(optimizer), plan). The "
                f"paths are {list(leaves)[:8]}"
            )
        if leaves[path].shape != plan.entries[path].shape:
            raise ValueError(
                f"{link}: {path} has shape {leaves[path].shape} in the {role}, {plan.entries[path].shape} in the plan: "
                + (
                    "gradients by example are aggregated before, as in optax.chain(optax.contrib."
                    f"differentially_private_aggregate(...), {link}(...))"
                    if leaves[path].shape[1:] == plan.entries[path].shape
                    else "make the plan from these parameters"
                )
            )
    return leaves


def constrained(plan: Plan, leaves: dict[str, Array]) -> dict[str, Array]:
    """The leaves that have a collection."""
    return {path: leaves[path] for path in plan.collections}


def held(state: Any, leaves: dict[str, Array], plan: Plan) -> tuple[Any, dict[str, Array]]:
    """The same state and leaves, tied together for the compiler.

    What does not change from step to step (kinds, groups, radii) it would otherwise move out of a loop over steps, and
    round what is left in the loop in another way: a loop inside a program would give other bits than one in Python.
    """
    state, tied = lax.optimization_barrier((state, constrained(plan, leaves)))
    return state, leaves | tied


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
    for path, found in _violations(params, plan, None if radii == "gamma" else "fitted", _OFF_MANIFOLD).items():
        collection = plan.collections[path]
        raise ValueError(
            f"{link}: {path} is off its manifolds ({', '.join(type(kind).__name__ for kind in collection.kinds)}; "
            f"γ = {np.min(collection.gamma):.3g}) by {found:.2g}. Start from "
            "fg.initialize(key, params, plan), or keep these weights with fg.nearest(params, plan); to keep their "
            "scales too, write radii='fitted' in both"
        )


def check_still_on_manifold(params: Any, plan: Plan, link: str, scale: ScaleState) -> None:
    """Raises if concrete parameters have left their manifolds during the training."""
    if any(isinstance(radius, Tracer) for radius in scale.radii.values):
        return
    limit = _OFF_MANIFOLD if scale.lambdas is None else _OFF_AT_NEW_RADII
    for path, found in _violations(params, plan, scale.radii, limit).items():
        raise ValueError(
            f"{link}: {path} has left its manifolds by {found:.2g} since the last step: something around {link} "
            "changes its displacements, or the weights (optax.ema, apply_every, lookahead, reduce_on_plateau, "
            "conditionally_transform, contrib.mechanize, contrib.schedule_free, averages). Put that inside, as in "
            "fg.on_manifolds(optax.chain(optimizer, optax.ema(0.9)), plan), or bring the weights back with "
            "fg.nearest(params, plan, fg.radii(opt_state))"
        )


def _violations(params: Any, plan: Plan, radii: Stacked | Literal["fitted"] | None, limit: float) -> dict[str, float]:
    """Of the parameters that are further off than `limit` and rounding; of none where they cannot be looked at."""
    leaves = by_path(params)
    if any(path not in leaves or isinstance(leaves[path], (Tracer, jax.ShapeDtypeStruct)) for path in plan):
        return {}
    # Inside `lax.cond`, as of optax.conditionally_transform, even what is made of known numbers would be traced.
    with jax.ensure_compile_time_eval():
        own = radii.by_path() if isinstance(radii, Stacked) else radii
        return {
            path: float(found)
            for path, found in violation(params, plan, own).items()
            if not float(found) <= max(limit, 16 * float(jnp.finfo(leaves[path].dtype).eps))
        }
