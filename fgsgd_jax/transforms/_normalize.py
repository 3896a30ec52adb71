"""Line 6 of Algorithm 1: steps of bounded length."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from ..groups import Batch, Bucket, Plan, Stacked, automatic, batches, buckets, figures, from_paths, groups_of
from ..linalg import largest, squared_norm
from ._links import constrained, constrained_leaves, held
from ._states import NormalizeState
from ._zeta import Scalar, check_options, of_groups, reciprocal_zeta


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

    Raises:
      ValueError: a negative ρ or c; in `init` and `update`, parameters that are not those of the plan.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, eqs. 3 to 7.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"w": jnp.array([[1.0], [0.0]])}
      >>> plan = fg.plan(params, [("w", fg.Whole(fg.Sphere(), view="i o -> 1 1 i o"))])
      >>> tx = fg.normalize_by_zeta(plan)
      >>> updates, _ = tx.update({"w": jnp.array([[0.0], [2.0]])}, tx.init(params), params)
      >>> updates["w"].ravel().tolist()  # R = 2, ζ = R (2 + R) = 8
      [0.0, 0.25]
    """
    check_options(rho, curvature)
    layout = buckets(plan)
    joined = batches(plan, layout)

    def init(params: Any) -> Any:
        leaves = constrained_leaves(params, plan, "parameters", "fg.normalize_by_zeta")
        return NormalizeState(groups_of(plan, layout), zeros(layout, leaves), zeros(layout, leaves))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del params, extra_args
        leaves = constrained_leaves(updates, plan, "updates", "fg.normalize_by_zeta")
        state, leaves = held(state, leaves, plan)
        like = constrained(plan, leaves), state
        steps, state = automatic(normalized, leaves, state, rho, curvature, like=like)
        return from_paths(leaves | steps, updates), state

    def normalized(leaves: dict[str, Array], state: Any, rho: Scalar, curvature: Scalar) -> tuple[dict, Any]:
        steps, shares, norms = {}, [], []
        for batch in joined:
            t = batch.stack(leaves)
            step, share, norm = normalized_groups(batch, state.groups, t, squared_norm(t), rho, curvature)
            steps |= batch.unstack(step, leaves)
            shares.append((batch, share))
            norms.append((batch, norm))
        return steps, NormalizeState(state.groups, figures(state.zeta_share, shares), figures(state.grad_norm, norms))

    return optax.GradientTransformationExtraArgs(init, update)


def normalized_groups(
    batch: Batch, groups: Stacked, t: Array, squares: Array, rho: Scalar, curvature: Scalar
) -> tuple[Array, list[Array], list[Array]]:
    """The matrices `t`, whose squared norms are `squares`, divided by their groups' ζ.

    And for the layers of each bucket the share of ζ > 1, and the largest R.
    """
    scales, shares, norms = [], [], []
    grids = zip(batch.buckets, batch.own(groups.values), batch.grids(squares), strict=True)
    for bucket, group, squares in grids:
        own, tables = of_groups(squares, group, bucket)
        scales.append(jnp.broadcast_to(reciprocal_zeta(jnp.sqrt(own), rho, curvature), squares.shape))
        r = jnp.sqrt(jnp.concatenate(tables, axis=1))
        above = jnp.sum(reciprocal_zeta(r, rho, curvature) < 1, axis=1, dtype=t.dtype)
        shares.append(above / bucket.num_groups)
        norms.append(largest(r, 1))
    scale = batch.flat(scales)
    return scale[..., None, None] * t, shares, norms


def zeros(layout: tuple[Bucket, ...], leaves: dict[str, Any]) -> Stacked:
    """A figure per layer, none measured yet."""
    values = tuple(jnp.zeros(len(bucket.paths), bucket.dtype(leaves)) for bucket in layout)
    return Stacked(values, tuple(bucket.paths for bucket in layout))
