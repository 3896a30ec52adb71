"""Line 5 of Algorithm 1: gradients onto the tangent spaces."""

from typing import Any

import optax
from jaxtyping import Array

from ..groups import Plan, Stacked, automatic, batches, buckets, from_paths, kinds_of
from ..manifolds import Mixture
from ._links import constrained, constrained_leaves, held
from ._refuse import counted, finite_matrices, finite_others, none_refused
from ._states import ProjectState


def project(plan: Plan) -> optax.GradientTransformationExtraArgs:
    """Projects updates onto the tangent spaces of the manifolds at the parameters.

    Each matrix's update becomes Π_ω(g) at its weight ω. The radius is that of the weight as given.

    A leaf without a finite squared norm (it holds NaN or infinity, or is longer than 10¹⁹ in float32, where ζ leaves
    nothing of a step) is refused, be it constrained or not: it becomes zero in this step, and `fg.refused` counts it.
    So no such number reaches a weight or the state of any link behind. All other leaves are projected, or pass through.

    Args:
      plan: the plan of the parameters.

    Returns:
      A transformation whose `update` needs `params`.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, Algorithm 1, line 5.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"w": jnp.array([[1.0], [0.0]])}
      >>> plan = fg.plan(params, [("w", fg.Whole(fg.Sphere(), view="i o -> 1 1 i o"))])
      >>> tx = fg.project(plan)
      >>> updates, _ = tx.update({"w": jnp.array([[3.0], [2.0]])}, tx.init(params), params)
      >>> updates["w"].ravel().tolist()
      [0.0, 2.0]
    """
    layout = buckets(plan)
    joined = batches(plan, layout)

    def init(params: Any) -> Any:
        constrained_leaves(params, plan, "parameters", "fg.project")
        return ProjectState(kinds_of(plan, layout), none_refused(plan, layout))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        points = constrained_leaves(params, plan, "parameters", "fg.project")
        state, leaves = held(state, constrained_leaves(updates, plan, "updates", "fg.project"), plan)
        like = constrained(plan, points), state.refused
        tangents, refused = automatic(projected, points, leaves, state, like=like)
        others, refused = finite_others(leaves, plan, refused)
        return from_paths(leaves | others | tangents, updates), ProjectState(state.kinds, refused)

    def projected(points: dict[str, Array], leaves: dict[str, Array], state: Any) -> tuple[dict[str, Array], Stacked]:
        tangents, refused = {}, []
        for batch in joined:
            x, mixture = batch.stack(points), Mixture(batch.kinds, batch.flat(batch.own(state.kinds.values)))
            measured = mixture.at(mixture.radius_of(x)).measured_projection(x, batch.stack(leaves))
            tangent, _, flags = finite_matrices(batch, *measured)
            tangents |= batch.unstack(tangent, leaves)
            refused.append((batch, flags))
        return tangents, counted(state.refused, refused)

    return optax.GradientTransformationExtraArgs(init, update)
