"""Line 7 of Algorithm 1: back onto the manifolds."""

from typing import Any

import jax
import optax
from jaxtyping import Array, Float

from ..groups import Batch, Plan, Stacked, automatic, batches, buckets, figures, from_paths, kinds_of
from ..linalg import largest
from ..manifolds import Mixture
from ._links import constrained, constrained_leaves, held, wider
from ._normalize import zeros
from ._share_out import displace
from ._states import RetractState


def retract(plan: Plan, share_out: jax.sharding.Mesh | None = None) -> optax.GradientTransformationExtraArgs:
    """Turns tangent vectors into displacements that end on the manifolds.

    The update v of a matrix ω becomes φ_ω(v) - ω with the retraction φ of its manifold, at the radius of ω as given.

    Args:
      plan: the plan of the parameters.
      share_out: a mesh over all of whose devices the retraction of large matrices is shared out, each device with its
        part of them, where every device holds the whole weights (data-parallel training). It costs a gather of the
        displacements. None to have every device do all of it.

    Returns:
      A transformation whose `update` needs `params`, to put behind the learning rate. Only `rescale` may follow it:
      anything else that changes a displacement takes the weights off their manifolds.

    Raises:
      ValueError: in `init` and `update`, for parameters that are not those of the plan, or none.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, Algorithm 1, line 7.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"w": jnp.array([[1.0], [0.0]])}
      >>> plan = fg.plan(params, [("w", fg.Whole(fg.Sphere(), view="i o -> 1 1 i o"))])
      >>> tx = fg.retract(plan)
      >>> updates, _ = tx.update({"w": jnp.array([[0.0], [0.75]])}, tx.init(params), params)
      >>> [round(x, 6) for x in (params["w"] + updates["w"]).ravel().tolist()]  # (1, ¾) / 1.25
      [0.8, 0.6]
    """
    layout = buckets(plan)
    joined = batches(plan, layout)

    def init(params: Any) -> Any:
        leaves = constrained_leaves(params, plan, "parameters", "fg.retract")
        return RetractState(kinds_of(plan, layout), zeros(layout, leaves))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        points = constrained_leaves(params, plan, "parameters", "fg.retract")
        state, leaves = held(state, constrained_leaves(updates, plan, "updates", "fg.retract"), plan)
        like = constrained(plan, points), state.step_ratio
        displacements, ratio = automatic(retracted, points, leaves, state, like=like)
        return from_paths(leaves | displacements, updates), RetractState(state.kinds, ratio)

    def retracted(points: dict[str, Array], leaves: dict[str, Array], state: Any) -> tuple[dict[str, Array], Stacked]:
        displacements, ratios = {}, []
        for batch in joined:
            x, v = batch.stack(points), batch.stack(leaves)
            mixture = Mixture(batch.kinds, batch.flat(batch.own(state.kinds.values)))
            mixture = mixture.at(mixture.radius_of(x))
            displacement, ratio = displace(batch, mixture, x, v, None, True, share_out)
            displacements |= batch.unstack(displacement, wider(points, leaves))
            ratios.append((batch, largest_by_layer(batch, ratio)))
        return displacements, figures(state.step_ratio, ratios)

    return optax.GradientTransformationExtraArgs(init, update)


def largest_by_layer(batch: Batch, values: Float[Array, "*batch"]) -> list[Float[Array, "layers"]]:
    """The largest value of each layer, by bucket."""
    return [largest(grid, (1, 2)) for grid in batch.grids(values)]
