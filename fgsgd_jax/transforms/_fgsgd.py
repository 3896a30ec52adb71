"""FG-SGD as one transformation."""

from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ..groups import Plan, automatic, batches, buckets, figures, from_paths, groups_of, kinds_of
from ..manifolds import Euclidean, compute_dtype
from ._links import (
    check_on_manifold,
    check_still_on_manifold,
    constrained,
    constrained_leaves,
    held,
    mixtures_of,
    wider,
)
from ._normalize import normalized_groups, zeros
from ._refuse import counted, finite_matrices, finite_others, none_refused
from ._retract import largest_by_layer
from ._scale import Scale
from ._share_out import displace
from ._states import FgsgdState
from ._zeta import Scalar, check_options


class Kept(NamedTuple):
    """Directions: leaves without a collection by path, and the matrices of every batch as it keeps them."""

    others: dict[str, Array]
    batches: tuple[Any, ...]


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
    share_out: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fine-grained SGD: SGD on collections of products of manifolds.

    The chain `project`, `normalize_by_zeta`, momentum, `project`, learning rate, `retract`, `rescale`, with the
    weights' matrices stacked once per step instead of once per link. Leaves without a collection get `optax.sgd`. A
    leaf whose gradient has no finite squared norm is refused, as in `project`.

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
      share_out: a mesh over all of whose devices the retraction of large matrices is shared out, each device with its
        part of them, where every device holds the whole weights (data-parallel training). It costs a gather of the
        displacements. None to have every device do all of it.

    Returns:
      A transformation whose `update` needs `params` and takes `feature_moments`.

    Raises:
      ValueError: outside jit, if parameters are off their manifolds; for options that make no sense.

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
    joined = batches(plan, layout)
    scale = Scale(plan, layout, every, lambda_floor, max_change, warmup, radii)
    rate = optax.scale_by_learning_rate(learning_rate)
    trace = None if momentum is None else optax.trace(momentum, nesterov)

    def init(params: Any) -> Any:
        leaves = constrained_leaves(params, plan, "parameters", "fg.fgsgd")
        check_on_manifold(params, plan, "fg.fgsgd", radii)
        kinds = kinds_of(plan, layout)
        started = scale.init(kinds, leaves)
        # By path, so that a checkpoint can be read where the weights are shared out in another way.
        kept = in_compute_dtype(leaves)
        return FgsgdState(
            kinds=kinds,
            groups=groups_of(plan, layout),
            radii=started.radii,
            lambdas=started.lambdas,
            inner=rate.init(kept) if trace is None else (trace.init(kept), rate.init(kept)),
            zeta_share=zeros(layout, leaves),
            grad_norm=zeros(layout, leaves),
            step_ratio=zeros(layout, leaves),
            refused=none_refused(plan, layout),
        )

    def in_compute_dtype(leaves: dict[str, Array]) -> dict[str, Array]:
        """The leaves as the momentum buffer has them: constraint arithmetic is never rounded to bfloat16."""
        return {path: x.astype(compute_dtype(x.dtype)) if path in plan.collections else x for path, x in leaves.items()}

    def as_kept(leaves: dict[str, Array]) -> Kept:
        """The leaves as the retraction takes them."""
        others = {path: x for path, x in leaves.items() if path not in plan.collections}
        return Kept(others, tuple(batch.kept_leaves(leaves) for batch in joined))

    def as_leaves(kept: Kept, like: dict[str, Array]) -> dict[str, Array]:
        """Undoes `as_kept`."""
        found = dict(kept.others)
        for batch, own in zip(joined, kept.batches, strict=True):
            found |= batch.unkept_leaves(own, like)
        return found

    def decayed(g: Array, x: Array) -> Array:
        return g + jnp.asarray(weight_decay, g.dtype) * x.astype(g.dtype)

    def update(updates: Any, state: Any, params: Any = None, *, feature_moments: Any = None, **extra_args: Any) -> Any:
        del extra_args
        points = constrained_leaves(params, plan, "parameters", "fg.fgsgd")
        check_still_on_manifold(params, plan, "fg.fgsgd", state.scale)
        gradients = constrained_leaves(updates, plan, "updates", "fg.fgsgd")
        own, gradients = held(state._replace(inner=None), gradients, plan)
        whole = constrained(plan, points)
        like = (as_kept(points).batches, state.zeta_share, state.grad_norm, state.refused)
        steps, shares, norms, refused = automatic(normalized, points, gradients, own, rho, curvature, like=like)
        others, refused = finite_others(gradients, plan, refused)
        free = {path: g for path, g in (gradients | others).items() if path not in plan.collections}
        free = {path: decayed(g, points[path]) for path, g in free.items()}
        moved: Any = Kept(free, steps)
        rated, traced = cast(Any, (state.inner, ()))
        stepped: Any
        if trace is not None:
            traced, rated = state.inner
            # By path: adding to the momentum and taking it apart is one pass. A leaf without a gradient keeps its own.
            directions, before = as_leaves(moved, traced.trace), traced.trace
            present = traced._replace(trace={path: before[path] for path in directions})
            followed, present = cast(Any, trace.update(directions, present))
            traced = traced._replace(trace=before | present.trace)
            moved = as_kept(followed)
        # Of the rate what it makes of one: matrices are multiplied by it where they are read anyway.
        ones = tuple(jnp.ones((), batch.dtype(points)) for batch in joined)
        stepped, rated = rate.update(Kept(moved.others, ones), rated)
        displacements, rescaled, ratios = automatic(
            displaced,
            points,
            gradients,
            moved.batches,
            stepped.batches,
            own,
            feature_moments,
            like=(whole, state.scale, state.step_ratio),
        )
        state = state._replace(
            radii=rescaled.radii,
            lambdas=rescaled.lambdas,
            inner=rated if trace is None else (traced, rated),
            zeta_share=shares,
            grad_norm=norms,
            step_ratio=ratios,
            refused=refused,
        )
        return from_paths(stepped.others | displacements, updates), state

    def normalized(points: Any, gradients: Any, state: Any, rho: Scalar, curvature: Scalar) -> Any:
        like, steps, shares, norms, refused = in_compute_dtype(gradients), [], [], [], []
        for batch, mixture in zip(joined, mixtures_of(joined, state.kinds, state.radii), strict=True):
            x = batch.stack(points)
            measured = mixture.measured_projection(x, batch.stack(gradients))
            t, squares, flags = finite_matrices(batch, *measured)
            t, share, norm = normalized_groups(batch, state.groups, t, squares, rho, curvature)
            if all(isinstance(kind, Euclidean) for kind in batch.kinds):
                t = decayed(t, x)
            steps.append(batch.keep(t, like))
            shares.append((batch, share))
            norms.append((batch, norm))
            refused.append((batch, flags))
        shares, norms = figures(state.zeta_share, shares), figures(state.grad_norm, norms)
        return tuple(steps), shares, norms, counted(state.refused, refused)

    def displaced(points: Any, gradients: Any, moved: Any, factors: Any, state: Any, feature_moments: Any) -> Any:
        rescaled, displacements, ratios = scale.advance(state.scale, state.kinds, feature_moments), {}, []
        mixtures = mixtures_of(joined, state.kinds, state.radii)
        for batch, mixture, own, factor in zip(joined, mixtures, moved, factors, strict=True):
            radius = batch.flat(batch.own(rescaled.radii.values)) if scale.measures else None
            x, v, tangent = batch.stack(points), batch.kept(own), trace is None
            displacement, ratio = displace(batch, mixture, x, v, radius, tangent, share_out, factor)
            displacements |= batch.unstack(displacement, wider(points, gradients))
            ratios.append((batch, largest_by_layer(batch, ratio)))
        return displacements, rescaled, figures(state.step_ratio, ratios)

    return optax.GradientTransformationExtraArgs(init, update)
