"""The rescaling of weights by ℜ = γ/λ."""

from typing import Any

import jax.numpy as jnp
import optax

from ..groups import Plan, Stacked, buckets, from_paths, gammas, kinds_of
from ..manifolds import Mixture
from ._links import check_on_manifold, constrained_leaves
from ._states import RescaleState


def rescale(plan: Plan) -> optax.GradientTransformationExtraArgs:
    """Sets the matrices that the displacements lead to to exactly their radius ℜ = γ/λ.

    It is the last link of every chain. The radii are its state: no radius is carried from step to step by weights,
    where round-off would walk it away. λ = 1 here.

    Args:
      plan: the plan of the parameters.

    Returns:
      A transformation whose `update` needs `params` and takes displacements, as `retract` makes them.

    Raises:
      ValueError: in `init` outside jit, if parameters are off their manifolds of radius γ.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, section 4 and eq. 2.
    """
    layout = buckets(plan)

    def init(params: Any) -> Any:
        leaves = constrained_leaves(params, plan, "parameters", "fg.rescale")
        check_on_manifold(params, plan, "fg.rescale")
        return RescaleState(kinds_of(plan, layout), initial_radii(plan, layout, leaves))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        points = constrained_leaves(params, plan, "parameters", "fg.rescale")
        leaves = constrained_leaves(updates, plan, "updates", "fg.rescale")
        for bucket, kind, radius in zip(layout, state.kinds.values, state.radii.values, strict=True):
            x, mixture = bucket.stack(points), Mixture(bucket.kinds, kind, radius)
            y = mixture.rescale(x + bucket.stack(leaves))
            leaves = leaves | bucket.unstack(y - x, leaves)
        return from_paths(leaves, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def initial_radii(plan: Plan, layout, leaves: dict[str, Any]) -> Stacked:
    """ℜ at λ = 1: γ."""
    values = tuple(jnp.asarray(gammas(plan, bucket, bucket.dtype(leaves))) for bucket in layout)
    return Stacked(values, tuple(bucket.paths for bucket in layout))
