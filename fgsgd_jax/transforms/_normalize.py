"""Line 6 of Algorithm 1: steps of bounded length."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from ..groups import Bucket, Plan, Stacked, buckets, from_paths, groups_of
from ._links import constrained_leaves
from ._states import NormalizeState
from ._zeta import Scalar, check_options, group_norms, of_matrices, reciprocal_zeta


def normalize_by_zeta(plan: Plan, rho: Scalar = 1.0, curvature: Scalar = 0.0) -> optax.GradientTransformationExtraArgs:
    """Divides every group's projected gradient by its ζ.

    With R the norm of the gradient over the group (eq. 6), ζ = max{1, R²Γ}^½ and Γ = max{(2ρ+R)², 1+c(ρ+R)}. At the
    defaults that is eq. 7: ζ = 1 up to R = √2 - 1, and R/ζ = 1/(2+R) above. Groups on a Euclidean member are
    normalized like any other; leaves without a collection pass through.

    Args:
      plan: the plan of the parameters.
      rho: ρ, the geodesic distance to the minimum, in the weights' units.
      curvature: c, the sectional curvature of the product manifold.

    Returns:
      A transformation to put behind `project` and before any momentum.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, eqs. 3 to 7.
    """
    check_options(rho, curvature)
    layout = buckets(plan)

    def init(params: Any) -> Any:
        leaves = constrained_leaves(params, plan, "parameters", "fg.normalize_by_zeta")
        return NormalizeState(groups_of(plan, layout), zeros(layout, leaves), zeros(layout, leaves))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del params, extra_args
        leaves = constrained_leaves(updates, plan, "updates", "fg.normalize_by_zeta")
        shares, norms = [], []
        for bucket, group in zip(layout, state.groups.values, strict=True):
            normalized, share, norm = normalized_groups(bucket, group, bucket.stack(leaves), rho, curvature)
            leaves = leaves | bucket.unstack(normalized, leaves)
            shares.append(share)
            norms.append(norm)
        paths = state.groups.paths
        state = NormalizeState(state.groups, Stacked(tuple(shares), paths), Stacked(tuple(norms), paths))
        return from_paths(leaves, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def normalized_groups(bucket: Bucket, group: Array | None, t: Array, rho: Scalar, curvature: Scalar):
    """The matrices `t` divided by their groups' ζ, and per layer the share of ζ > 1 and the largest R."""
    r = group_norms(t, group, bucket.num_groups)
    reciprocal = reciprocal_zeta(r, rho, curvature)
    scale = of_matrices(reciprocal, group, bucket.view.grid[:2])[..., None, None]
    share = jnp.mean((reciprocal < 1).astype(t.dtype), axis=1)
    return scale * t, share, jnp.max(r, axis=1)


def zeros(layout: tuple[Bucket, ...], leaves: dict[str, Any]) -> Stacked:
    """A figure per layer, none measured yet."""
    values = tuple(jnp.zeros(len(bucket.paths), bucket.dtype(leaves)) for bucket in layout)
    return Stacked(values, tuple(bucket.paths for bucket in layout))
