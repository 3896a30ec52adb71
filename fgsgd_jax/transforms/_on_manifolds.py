"""Any Optax optimizer on the manifolds of a plan."""

from typing import Any, Literal

import optax

from ..groups import Plan, batches, buckets, figures, from_paths, kinds_of
from ._links import check_on_manifold, constrained_leaves, mixtures_of, wider
from ._normalize import zeros
from ._retract import largest
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
    joined = batches(plan, layout)
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
        xs = [batch.stack(points) for batch in joined]
        mixtures = mixtures_of(joined, state.kinds, state.radii)
        for batch, mixture, x in zip(joined, mixtures, xs, strict=True):
            leaves |= batch.unstack(mixture.project(x, batch.stack(leaves)), leaves)
        steps, inner_state = inner.update(from_paths(leaves, updates), state.inner, params, **extra_args)
        leaves = constrained_leaves(steps, plan, "updates of the inner optimizer", "fg.on_manifolds")
        rescaled = scale.advance(state.scale, state.kinds, feature_moments)
        ratios = []
        for batch, mixture, x in zip(joined, mixtures, xs, strict=True):
            radius = None if every is None else batch.flat(batch.own(rescaled.radii.values))
            displacement, ratio = mixture.displace(x, batch.stack(leaves), radius)
            leaves |= batch.unstack(displacement, wider(points, leaves))
            ratios.append((batch, largest(batch, ratio)))
        step_ratio = figures(state.step_ratio, ratios)
        return from_paths(leaves, steps), OnManifoldsState(state.kinds, *rescaled, inner_state, step_ratio)

    return optax.GradientTransformationExtraArgs(init, update)
