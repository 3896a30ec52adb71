"""FG-SGD as one transformation."""

from typing import Any, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array

from ..groups import Plan, Stacked, buckets, from_paths, groups_of, kinds_of
from ..manifolds import Euclidean, Mixture
from ._links import check_on_manifold, constrained_leaves
from ._normalize import normalized_groups, zeros
from ._retract import largest_step
from ._scale import Scale
from ._states import FgsgdState
from ._zeta import Scalar, check_options


def fgsgd(
    learning_rate: optax.ScalarOrSchedule,
    plan: Plan,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    rho: Scalar = 1.0,
    curvature: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    every: int | None = None,
    lambda_floor: float | None = None,
    max_change: float | Literal["auto"] | None = "auto",
    warmup: tuple[int, int] | None = None,
    radii: Literal["gamma", "fitted"] = "gamma",
) -> optax.GradientTransformationExtraArgs:
    """Fine-grained SGD: SGD on collections of products of manifolds.

    The chain `project`, `normalize_by_zeta`, momentum, `project`, learning rate, `retract`, `rescale`, with the
    weights' matrices stacked once per step instead of once per link. Leaves without a collection get `optax.sgd`.

    Args:
      learning_rate: r_t of eq. 3, a number or a schedule.
      plan: the plan of the parameters.
      momentum: decay of the buffer that accumulates the normalized tangent vectors; None for no buffer. The buffer is
        stored as it is and projected at the current point on use.
      nesterov: whether to look ahead, as in `optax.trace`.
      rho: ρ of eq. 5.
      curvature: c of eq. 5.
      weight_decay: L2 penalty on unconstrained leaves and those of Euclidean matrices alone, added to their gradients
        as in `optax.add_decayed_weights` before `optax.sgd`. On a manifold of fixed norm it would do nothing.
      every: applied updates in an epoch, for λ; this and the remaining arguments are those of `rescale`.
      lambda_floor: smallest λ used.
      max_change: largest factor by which a radius changes at once.
      warmup: (updates, until), a shorter period at first.
      radii: of the first epoch.

    Returns:
      A transformation whose `update` needs `params` and takes `feature_moments`.

    Raises:
      ValueError: in `init` outside jit, if parameters are off their manifolds; for options that make no sense.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, Algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)}
      >>> plan = fg.plan(params, [("kernel", fg.PIO([fg.Sphere(), fg.Stiefel()])), ("*", None)])
      >>> params = fg.initialize(jax.random.key(0), params, plan)
      >>> tx = fg.fgsgd(0.1, plan, momentum=0.9)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(fg.violation(params, plan)["kernel"] < 1e-6)
      True
    """
    check_options(rho, curvature)
    layout = buckets(plan)
    paths = tuple(bucket.paths for bucket in layout)
    collected = set(plan.collections)
    scale = Scale(plan, layout, every, lambda_floor, max_change, warmup, radii)
    inner = optax.scale_by_learning_rate(learning_rate)
    if momentum is not None:
        inner = optax.chain(optax.trace(momentum, nesterov), inner)

    def init(params: Any) -> Any:
        leaves = constrained_leaves(params, plan, "parameters", "fg.fgsgd")
        check_on_manifold(params, plan, "fg.fgsgd", radii)
        kinds = kinds_of(plan, layout)
        started = scale.init(kinds, leaves)
        return FgsgdState(
            kinds=kinds,
            groups=groups_of(plan, layout),
            radii=started.radii,
            lambdas=started.lambdas,
            inner=inner.init(working(leaves)),
            zeta_share=zeros(layout, leaves),
            grad_norm=zeros(layout, leaves),
            step_ratio=zeros(layout, leaves),
        )

    def working(leaves: dict[str, Array]) -> tuple[list[Array], dict[str, Array]]:
        """What the inner optimizer sees: the stacked matrices, and the other leaves by path."""
        rest = {path: leaf for path, leaf in leaves.items() if path not in collected}
        return [bucket.stack(leaves) for bucket in layout], rest

    def decay(x: Array) -> Array:
        return jnp.asarray(weight_decay, x.dtype) * x

    def update(updates: Any, state: Any, params: Any = None, *, feature_moments: Any = None, **extra_args: Any) -> Any:
        del extra_args
        points = constrained_leaves(params, plan, "parameters", "fg.fgsgd")
        leaves = constrained_leaves(updates, plan, "updates", "fg.fgsgd")
        xs, _ = working(points)
        gradients, rest = working(leaves)
        mixtures = [
            Mixture(bucket.kinds, kind, radius)
            for bucket, kind, radius in zip(layout, state.kinds.values, state.radii.values, strict=True)
        ]
        directions, shares, norms = [], [], []
        for bucket, mixture, group, x, g in zip(layout, mixtures, state.groups.values, xs, gradients, strict=True):
            t, share, norm = normalized_groups(bucket, group, mixture.project(x, g), rho, curvature)
            directions.append(t + decay(x) if all(isinstance(kind, Euclidean) for kind in bucket.kinds) else t)
            shares.append(share)
            norms.append(norm)
        moved: Any
        moved, inner_state = inner.update(
            (directions, {path: g + decay(points[path]) for path, g in rest.items()}), state.inner
        )
        steps, rest = moved
        rescaled = scale.advance(state.scale, state.kinds, feature_moments)
        leaves, ratios = leaves | rest, []
        for bucket, mixture, x, v, radius in zip(layout, mixtures, xs, steps, rescaled.radii.values, strict=True):
            if momentum is not None:
                v = mixture.project(x, v)
            y = mixture.retract(x, v)
            if every is not None:
                y = y * (radius / mixture.radius)[..., None, None]
            leaves |= bucket.unstack(y - x, leaves)
            ratios.append(largest_step(mixture, v))
        state = state._replace(
            radii=rescaled.radii,
            lambdas=rescaled.lambdas,
            inner=inner_state,
            zeta_share=Stacked(tuple(shares), paths),
            grad_norm=Stacked(tuple(norms), paths),
            step_ratio=Stacked(tuple(ratios), paths),
        )
        return from_paths(leaves, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
