"""Any Optax optimizer on the manifolds of a plan."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..groups import as_rules, kinds_of, names_of
from . import _algorithm as algorithm
from ._algorithm import Tensors
from ._call import PlanOrRules, called, check_on_manifold, started
from ._rescaling import InitialRadii, Rescaling, options
from ._scale import Scale, ScaleState
from ._states import OnManifoldsState


def on_manifolds(
    inner: optax.GradientTransformation,
    plan: PlanOrRules,
    *,
    rescaling: Rescaling | None = None,
    initial_radii: InitialRadii = "gamma",
    share_out: jax.sharding.Mesh | None = None,
    **old: Any,
) -> optax.GradientTransformationExtraArgs:
    """Runs any Optax optimizer with its weights on their manifolds.

    `inner` is given the gradients projected onto the tangent spaces. Its update, whatever it was made of, is projected
    at the current point (which carries momentum buffers there), retracted, and set to the radius ℜ. Unconstrained
    leaves get the update of `inner`. Weight decay inside `inner` does nothing on a manifold of fixed norm. A leaf whose
    gradient has no finite squared norm is refused, as in `project`: `inner` is given zeros.

    Args:
      inner: the optimizer, learning rate included: its updates are meant to be added to the weights. Even where they
        are zero, constrained weights move by round-off, because every step sets them to their radius.
      plan: the plan of the parameters, or its rules.
      rescaling: the options of λ; None for λ = 1.
      initial_radii: of the first epoch; see `rescale`.
      share_out: a mesh whose devices divide the retractions of large matrices among them, for data-parallel training,
        where every device holds all weights. It costs a gather of the displacements. None: every device retracts all of
        them.
      **old: keywords of version 0.1, which warn; see `rescale`.

    Returns:
      A transformation whose `update` needs `params` and takes `feature_moments`; other extra arguments go to `inner`.

    Raises:
      ValueError: outside jit, if parameters are off their manifolds; for invalid options.

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
    rescaling, initial_radii = options("fg.on_manifolds", rescaling, initial_radii, old)
    return wrapped("fg.on_manifolds", inner, plan, rescaling, initial_radii, share_out)


def wrapped(
    link: str,
    inner: optax.GradientTransformation,
    plan: PlanOrRules,
    rescaling: Rescaling,
    initial_radii: InitialRadii,
    share_out: jax.sharding.Mesh | None,
) -> optax.GradientTransformationExtraArgs:
    """`on_manifolds` by the name that its errors give."""
    plan, inner = as_rules(plan), optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        start = started(link, plan, params)
        check_on_manifold(link, start, params, initial_radii)
        kinds = kinds_of(start.plan)
        scale = Scale(start.plan, rescaling, initial_radii).init(kinds, start.leaves)
        inner_state = inner.init(params)
        if any(_is_lookahead(node) for node in jax.tree.leaves(inner_state, is_leaf=_is_lookahead)):
            raise TypeError(
                f"{link}: optax.lookahead has parameters of its own, which no plan describes. Leave it out: "
                "average the weights in the training loop and bring them back with fg.nearest(params, plan)"
            )
        figure, refused = algorithm.no_figure(start.plan, start.leaves), algorithm.none_refused(start.plan)
        return start.beside(OnManifoldsState(names_of(start.plan), kinds, *scale, inner_state, figure, refused))

    def update(updates: Any, state: Any, params: Any = None, *, feature_moments: Any = None, **extra_args: Any) -> Any:
        before = ScaleState(state.radii, state.lambdas)
        call = called(link, plan, updates, params, scale=before)
        scale = Scale(call.plan, rescaling, initial_radii)

        def line_5(points: Tensors, gradients: Tensors, state: Any) -> Any:
            return algorithm.projected(call.plan, state.kinds, state.radii, points, gradients)

        def lines_7_and_8(points: Tensors, directions: Tensors, state: Any, feature_moments: Any) -> Any:
            before = ScaleState(state.radii, state.lambdas)
            after = before if before.lambdas is None else scale.advance(before, state.kinds, feature_moments)
            displacements, ratio = algorithm.retract(
                call.plan,
                state.kinds,
                state.radii,
                points,
                directions,
                new_radii=None if after.lambdas is None else after.radii,
                share_out=share_out,
            )
            return displacements, after, ratio.astype(state.step_ratio.dtype)

        own = state._replace(inner=None)
        tangents, refused = algorithm.on_buckets(
            line_5, call.plan, (call.points, call.leaves), own, like=(state.refused.constrained,)
        )
        free, counts = algorithm.without_refused_free(state.refused, call.free)
        directions, inner_state = inner.update(call.answer(free | tangents), state.inner, params, **extra_args)
        follow = called(f"{link}(inner)", call.plan, directions, params)
        trees, like = (call.points, follow.leaves), (before, state.step_ratio)
        displacements, after, ratio = algorithm.on_buckets(
            lines_7_and_8, call.plan, trees, own, feature_moments, like=like, moves=True
        )
        return follow.answer(displacements), state._replace(
            radii=after.radii,
            lambdas=after.lambdas,
            inner=inner_state,
            step_ratio=ratio,
            refused=counts._replace(constrained=counts.constrained + refused.astype(jnp.int32)),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _is_lookahead(node: Any) -> bool:
    return isinstance(node, optax.LookaheadState)
