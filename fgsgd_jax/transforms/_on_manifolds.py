"""Any Optax optimizer on the manifolds of a plan."""

from typing import Any, Literal

import jax
import optax
from jaxtyping import Array

from ..groups import Plan, Stacked, automatic, batches, buckets, figures, from_paths, kinds_of
from ._links import (
    check_on_manifold,
    check_still_on_manifold,
    constrained,
    constrained_leaves,
    held,
    mixtures_of,
    wider,
)
from ._normalize import zeros
from ._refuse import counted, finite_matrices, finite_others, none_refused
from ._retract import largest_by_layer
from ._scale import Scale
from ._share_out import displace
from ._states import OnManifoldsState


def on_manifolds(
    inner: optax.GradientTransformation,
    plan: Plan,
    every: int | None = None,
    lambda_floor: float | None = None,
    max_change: float | Literal["auto"] | None = "auto",
    warmup: tuple[int, int] | None = None,
    radii: Literal["gamma", "fitted"] = "gamma",
    share_out: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs any Optax optimizer with its weights on their manifolds.

    `inner` is given the gradients projected onto the tangent spaces. Its update, whatever it was made of, is projected
    at the current point (which carries momentum buffers there), retracted, and set to the radius ℜ. Unconstrained
    leaves get the update of `inner`. Weight decay inside `inner` does nothing on a manifold of fixed norm. A leaf whose
    gradient has no finite squared norm is refused, as in `project`: `inner` is given zeros.

    Args:
      inner: the optimizer, learning rate included: its updates are meant to be added to the weights.
      plan: the plan of the parameters.
      every: applied updates in an epoch, for λ; this and the remaining arguments are those of `rescale`.
      lambda_floor: smallest λ used.
      max_change: largest factor by which radii change at once.
      warmup: (updates, until), a shorter period at first.
      radii: of the first epoch.
      share_out: a mesh over all of whose devices the retraction of large matrices is shared out, each device with its
        part of them, where every device holds the whole weights (data-parallel training). It costs a gather of the
        displacements. None to have every device do all of it.

    Returns:
      A transformation whose `update` needs `params` and takes `feature_moments`; other extra arguments go to `inner`.

    Raises:
      ValueError: outside jit, if parameters are off their manifolds; for options that make no sense.

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
        started = inner.init(params)
        if any(_is_lookahead(node) for node in jax.tree.leaves(started, is_leaf=_is_lookahead)):
            raise TypeError(
                "fg.on_manifolds: optax.lookahead has parameters of its own, which no plan describes. Leave it out: "
                "average the weights in the training loop and bring them back with fg.nearest(params, plan)"
            )
        refused = none_refused(plan, layout)
        return OnManifoldsState(kinds, *scale.init(kinds, leaves), started, zeros(layout, leaves), refused)

    def update(updates: Any, state: Any, params: Any = None, *, feature_moments: Any = None, **extra_args: Any) -> Any:
        points = constrained_leaves(params, plan, "parameters", "fg.on_manifolds")
        check_still_on_manifold(params, plan, "fg.on_manifolds", state.scale)
        leaves = constrained_leaves(updates, plan, "updates", "fg.on_manifolds")
        whole = constrained(plan, points)
        own, leaves = held(state._replace(inner=None), leaves, plan)
        tangents, refused = automatic(projected, points, leaves, own, like=(whole, state.refused))
        others, refused = finite_others(leaves, plan, refused)
        leaves |= others | tangents
        steps, inner_state = inner.update(from_paths(leaves, updates), state.inner, params, **extra_args)
        leaves = constrained_leaves(steps, plan, "updates of the inner optimizer", "fg.on_manifolds")
        like = whole, state.scale, state.step_ratio
        displacements, rescaled, ratio = automatic(displaced, points, leaves, own, feature_moments, like=like)
        state = state._replace(
            radii=rescaled.radii, lambdas=rescaled.lambdas, inner=inner_state, step_ratio=ratio, refused=refused
        )
        return from_paths(leaves | displacements, steps), state

    def projected(points: Any, leaves: Any, state: Any) -> tuple[dict[str, Array], Stacked]:
        tangents, refused = {}, []
        for batch, mixture in zip(joined, mixtures_of(joined, state.kinds, state.radii), strict=True):
            measured = mixture.measured_projection(batch.stack(points), batch.stack(leaves))
            tangent, _, flags = finite_matrices(batch, *measured)
            tangents |= batch.unstack(tangent, leaves)
            refused.append((batch, flags))
        return tangents, counted(state.refused, refused)

    def displaced(points: Any, leaves: Any, state: Any, feature_moments: Any) -> tuple[dict, Any, Stacked]:
        rescaled, displacements, ratios = scale.advance(state.scale, state.kinds, feature_moments), {}, []
        for batch, mixture in zip(joined, mixtures_of(joined, state.kinds, state.radii), strict=True):
            radius = batch.flat(batch.own(rescaled.radii.values)) if scale.measures else None
            x, v = batch.stack(points), batch.stack(leaves)
            displacement, ratio = displace(batch, mixture, x, v, radius, False, share_out)
            displacements |= batch.unstack(displacement, wider(points, leaves))
            ratios.append((batch, largest_by_layer(batch, ratio)))
        return displacements, rescaled, figures(state.step_ratio, ratios)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_lookahead(node: Any) -> bool:
    return isinstance(node, optax.LookaheadState)
