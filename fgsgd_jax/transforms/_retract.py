"""Line 7 of Algorithm 1: back onto the manifolds."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..groups import Plan, Stacked, buckets, from_paths, kinds_of
from ..linalg import norm
from ..manifolds import Mixture
from ._links import constrained_leaves
from ._normalize import zeros
from ._states import RetractState


def retract(plan: Plan) -> optax.GradientTransformationExtraArgs:
    """Turns tangent vectors into displacements that end on the manifolds.

    The update v of a matrix ω becomes φ_ω(v) - ω with the retraction φ of its manifold, at the radius of ω as given.

    Args:
      plan: the plan of the parameters.

    Returns:
      A transformation whose `update` needs `params`, to put behind the learning rate. Only `rescale` may follow it:
      anything else that changes a displacement takes the weights off their manifolds.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, Algorithm 1, line 7.
    """
    layout = buckets(plan)

    def init(params: Any) -> Any:
        leaves = constrained_leaves(params, plan, "parameters", "fg.retract")
        return RetractState(kinds_of(plan, layout), zeros(layout, leaves))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        points = constrained_leaves(params, plan, "parameters", "fg.retract")
        leaves = constrained_leaves(updates, plan, "updates", "fg.retract")
        ratios = []
        for bucket, kind in zip(layout, state.kinds.values, strict=True):
            x, v = bucket.stack(points), bucket.stack(leaves)
            mixture = Mixture(bucket.kinds, kind)
            mixture = mixture.at(mixture.radius_of(x))
            leaves = leaves | bucket.unstack(mixture.retract(x, v) - x, leaves)
            ratios.append(largest_step(mixture, v))
        return from_paths(leaves, updates), RetractState(state.kinds, Stacked(tuple(ratios), state.kinds.paths))

    return optax.GradientTransformationExtraArgs(init, update)


def largest_step(mixture: Mixture, v: Array) -> Float[Array, "layers"]:
    """Largest ‖v‖_F/s of the constrained matrices of each layer."""
    ratio = norm(v, (-2, -1)) / mixture.radius
    return jnp.max(mixture.constrained(ratio), axis=(1, 2))
