"""Any Optax optimizer on the manifolds of a plan."""

from typing import Any, Literal

import optax

from ..groups import Plan, Stacked, buckets, from_paths, kinds_of
from ..manifolds import Mixture
from ._links import check_on_manifold, constrained_leaves
from ._normalize import zeros
from ._retract import largest_step
from ._scale import Scale
from ._states import OnManifoldsState


def on_manifolds(
    inner: optax.GradientTransformation,
    plan: Plan,
    every: int | None = None,
    lambda_floor: float | None = None,
    max_change: float | Literal["auto"] | None = "auto",
    warmup: tuple[int, int] | None = None,
    radii: Literal["gamma", "fitted"] = "gamma",
) -> optax.GradientTransformationExtraArgs:
    """Runs any Optax optimizer with its weights on their manifolds.

    `inner` is given the gradients projected onto the tangent spaces. Its update, whatever it was made of, is projected
    at the current point (which carries momentum buffers there), retracted, and set to the radius ℜ. Unconstrained
    leaves get the update of `inner`. Weight decay inside `inner` does nothing on a manifold of fixed norm.

    Args:
      inner: the optimizer, learning rate included: its updates are meant to be added to the weights.
      plan: the plan of the parameters.
      every: applied updates in an epoch, for λ; this and the remaining arguments are those of `rescale`.
      lambda_floor: smallest λ used.
      max_change: largest factor by which radii change at once.
      warmup: (updates, until), a shorter period at first.
      radii: of the first epoch.

    Returns:
      A transformation whose `update` needs `params` and takes `feature_moments`; other extra arguments go to `inner`.

    Raises:
      ValueError: in `init` outside jit, if parameters are off their manifolds; for options that make no sense.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}
      >>> plan = fg.plan(params, [("kernel", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")), ("*", None)])
      >>> params = fg.initialize(jax.random.key(0), params, plan)
      >>> tx = fg.on_manifolds(optax.sgd(1e-2, momentum=0.9), plan)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(fg.violation(params, plan)["kernel"] < 1e-6)
      True
    """
    layout = buckets(plan)
    scale = Scale(plan, layout, every, lambda_floor, max_change, warmup, radii)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        leaves = constrained_leaves(params, plan, "parameters", "fg.on_manifolds")
        check_on_manifold(params, plan, "fg.on_manifolds", radii)
        kinds = kinds_of(plan, layout)
        return OnManifoldsState(kinds, *scale.init(kinds, leaves), inner.init(params), zeros(layout, leaves))

    def update(updates: Any, state: Any, params: Any = None, *, feature_moments: Any = None, **extra_args: Any) -> Any:
        points = constrained_leaves(params, plan, "parameters", "fg.on_manifolds")
        leaves = constrained_leaves(updates, plan, "updates", "fg.on_manifolds")
        xs = [bucket.stack(points) for bucket in layout]
        mixtures = [
            Mixture(bucket.kinds, kind, radius)
            for bucket, kind, radius in zip(layout, state.kinds.values, state.radii.values, strict=True)
        ]
        for bucket, mixture, x in zip(layout, mixtures, xs, strict=True):
            leaves |= bucket.unstack(mixture.project(x, bucket.stack(leaves)), leaves)
        steps, inner_state = inner.update(from_paths(leaves, updates), state.inner, params, **extra_args)
        leaves = constrained_leaves(steps, plan, "updates of the inner optimizer", "fg.on_manifolds")
        rescaled = scale.advance(state.scale, state.kinds, feature_moments)
        ratios = []
        for bucket, mixture, x, radius in zip(layout, mixtures, xs, rescaled.radii.values, strict=True):
            v = mixture.project(x, bucket.stack(leaves))
            y = mixture.retract(x, v)
            if every is not None:
                y = y * (radius / mixture.radius)[..., None, None]
            leaves |= bucket.unstack(y - x, leaves)
            ratios.append(largest_step(mixture, v))
        step_ratio = Stacked(tuple(ratios), state.kinds.paths)
        return from_paths(leaves, steps), OnManifoldsState(state.kinds, *rescaled, inner_state, step_ratio)

    return optax.GradientTransformationExtraArgs(init, update)
