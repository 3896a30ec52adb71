"""Line 5 of Algorithm 1: gradients onto the tangent spaces."""

from typing import Any

import optax
from jaxtyping import Array

from ..groups import Plan, Stacked, automatic, batches, buckets, from_paths, kinds_of
from ..manifolds import Mixture
from ._links import constrained, constrained_leaves
from ._states import ProjectState


def project(plan: Plan) -> optax.GradientTransformationExtraArgs:
    """Projects updates onto the tangent spaces of the manifolds at the parameters.

    Each matrix's update becomes Π_ω(g) at its weight ω. The radius is that of the weight as given.

    Args:
      plan: the plan of the parameters.

    Returns:
      A transformation whose `update` needs `params`. Unconstrained leaves pass through.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, Algorithm 1, line 5.
    """
    layout = buckets(plan)
    joined = batches(plan, layout)

    def init(params: Any) -> Any:
        constrained_leaves(params, plan, "parameters", "fg.project")
        return ProjectState(kinds_of(plan, layout))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        points = constrained_leaves(params, plan, "parameters", "fg.project")
        leaves = constrained_leaves(updates, plan, "updates", "fg.project")
        tangents = automatic(projected, points, leaves, state.kinds, like=constrained(plan, points))
        return from_paths(leaves | tangents, updates), state

    def projected(points: dict[str, Array], leaves: dict[str, Array], kinds: Stacked) -> dict[str, Array]:
        tangents = {}
        for batch in joined:
            x, mixture = batch.stack(points), Mixture(batch.kinds, batch.flat(batch.own(kinds.values)))
            tangent = mixture.at(mixture.radius_of(x)).project(x, batch.stack(leaves))
            tangents |= batch.unstack(tangent, leaves)
        return tangents

    return optax.GradientTransformationExtraArgs(init, update)
