"""FG-SGD as one transformation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ..groups import Plan, as_rules, automatic, buckets, by_path, from_paths, groups_of, kinds_of, names_of, widest
from ..manifolds import Euclidean, compute_dtype
from . import _algorithm as algorithm
from ._call import PlanOrRules, called, check_on_manifold, check_still_on_manifold, started
from ._rescaling import InitialRadii, Rescaling, options
from ._scale import Scale, ScaleState
from ._states import ByPath, FgsgdState
from ._zeta import Scalar, check_options


def fgsgd(
    learning_rate: optax.ScalarOrSchedule,
    plan: PlanOrRules,
    momentum: Scalar | None = None,
    *,
    nesterov: bool = False,
    rho: Scalar = 1.0,
    curvature: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    rescaling: Rescaling | None = None,
    initial_radii: InitialRadii = "gamma",
    share_out: jax.sharding.Mesh | None = None,
    **old: Any,
) -> optax.GradientTransformationExtraArgs:
    """Fine-grained SGD: SGD on collections of products of manifolds.

    The chain `project`, `normalize_by_zeta`, momentum, `project`, learning rate, `retract`, `rescale` in one. Leaves
    without a collection get `optax.sgd`. A leaf whose gradient has no finite squared norm is refused, as in `project`.

    Args:
      learning_rate: r_t of eq. 3, a number or a schedule. Even at rate 0 constrained weights move by round-off, because
        every step sets them to their radius. To keep them, put `optax.freeze` after the optimizer.
      plan: the plan of the parameters, or its rules.
      momentum: decay of the buffer that accumulates the normalized tangent vectors; None for no buffer. The buffer is
        stored as it is, in the tree of the parameters, and projected at the current point on use.
      nesterov: whether to look ahead, as in `optax.trace`.
      rho: ρ of eq. 5.
      curvature: c of eq. 5.
      weight_decay: L2 penalty on unconstrained leaves and on leaves whose matrices are all Euclidean, added to their
        gradients as by `optax.add_decayed_weights` before `optax.sgd`. On a manifold of fixed norm it would do nothing.
      rescaling: the options of λ; None for λ = 1.
      initial_radii: of the first epoch; see `rescale`.
      share_out: a mesh whose devices divide the retractions of large matrices among them, for data-parallel training,
        where every device holds all weights. It costs a gather of the displacements. None: every device retracts all of
        them.
      **old: keywords of version 0.1, which warn; see `rescale`.

    Returns:
      A transformation whose `update` needs `params` and takes `feature_moments`.

    Raises:
      ValueError: outside jit, if parameters are off their manifolds; for invalid options.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, Algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)}
      >>> rules = [("kernel", fg.PIO([fg.Sphere(), fg.Stiefel()])), ("*", None)]
      >>> params = fg.initialize(jax.random.key(0), params, rules)
      >>> tx = fg.fgsgd(0.1, rules, momentum=0.9)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(fg.violation(params, rules)["kernel"] < 1e-6)
      True
    """
    plan = as_rules(plan)
    check_options(rho, curvature)
    rescaling, initial_radii = options("fg.fgsgd", rescaling, initial_radii, old)
    rate = optax.scale_by_learning_rate(learning_rate)
    trace = optax.identity() if momentum is None else optax.trace(momentum, nesterov)

    def init(params: Any) -> Any:
        start = started("fg.fgsgd", plan, params)
        check_on_manifold("fg.fgsgd", start, params, initial_radii)
        kinds = kinds_of(start.plan)
        scale = Scale(start.plan, rescaling, initial_radii).init(kinds, start.leaves)
        state = FgsgdState(
            momentum=trace.init(as_momentum(start.plan, params)),
            rate=rate.init(params),
            paths=names_of(start.plan),
            kinds=kinds,
            groups=groups_of(start.plan),
            radii=scale.radii,
            lambdas=scale.lambdas,
            zeta_share=algorithm.no_figure(start.plan, start.leaves),
            grad_norm=algorithm.no_figure(start.plan, start.leaves),
            step_ratio=algorithm.no_figure(start.plan, start.leaves),
            refused=algorithm.none_refused(start.plan),
        )
        return start.beside(state)

    def update(updates: Any, state: Any, params: Any = None, *, feature_moments: Any = None, **extra_args: Any) -> Any:
        del extra_args
        call = called("fg.fgsgd", plan, updates, params)
        before = ScaleState(state.radii, state.lambdas)
        check_still_on_manifold("fg.fgsgd", call, params, before)
        scale = Scale(call.plan, rescaling, initial_radii)

        def lines_5_and_6(points: ByPath, gradients: ByPath, state: Any, rho: Scalar, curvature: Scalar) -> Any:
            points, gradients = algorithm.packed(call.plan, points, gradients)
            found = algorithm.project(call.plan, state.kinds, state.radii, points, gradients)
            zeta = algorithm.normalize(call.plan, state.groups, found.squares, rho, curvature)
            steps = algorithm.scaled(call.plan, found.tangents, zeta.inverse_zeta)
            steps = {path: step.astype(compute_dtype(points[path].dtype)) for path, step in steps.items()}
            for bucket in buckets(call.plan):
                if all(isinstance(kind, Euclidean) for kind in bucket.kinds):
                    own = algorithm.names(bucket, steps)
                    steps |= {name: decayed(steps[name], points[name]) for name in own}
            figures = (x.astype(state.zeta_share.dtype) for x in (zeta.zeta_share, zeta.grad_norm))
            return algorithm.apart(call.plan, steps), *figures, found.refused

        def lines_7_and_8(points: ByPath, directions: ByPath, factor: Array, state: Any, feature_moments: Any) -> Any:
            after = scale.advance(ScaleState(state.radii, state.lambdas), state.kinds, feature_moments)
            points, directions = algorithm.packed(call.plan, points, directions)
            displacements, ratio = algorithm.retract(
                call.plan,
                state.kinds,
                state.radii,
                points,
                directions,
                new_radii=after.radii if rescaling.measures else None,
                factor=factor,
                is_tangent=momentum is None,
                share_out=share_out,
            )
            return algorithm.apart(call.plan, displacements), after, ratio.astype(state.step_ratio.dtype)

        own = state._replace(momentum=None, rate=None)
        points, gradients = call.constrained, {path: call.leaves[path] for path in call.plan.collections}
        like = points, state.zeta_share, state.grad_norm, state.refused.constrained
        steps, share, norm, refused = automatic(lines_5_and_6, points, gradients, own, rho, curvature, like=like)

        free, refused = algorithm.without_refused_free(call.free, state.refused, refused)
        free = {path: decayed(g, call.points[path]) for path, g in free.items()}
        directions, traced = accumulated(free | steps, state.momentum)

        # The matrices are multiplied by the rate where they are read anyway: here it is that of a one.
        one = jnp.ones((), state.step_ratio.dtype)
        rated: Any = rate.update(({path: directions[path] for path in free}, one), state.rate)
        (moved, factor), rate_state = rated
        like = points, before, state.step_ratio
        displacements, after, ratio = automatic(
            lines_7_and_8, points, {path: directions[path] for path in steps}, factor, own, feature_moments, like=like
        )
        # As Optax's optimizers do: an update is no wider than its weight or its gradient.
        dtypes = {path: widest((points[path].dtype, gradients[path].dtype)) for path in displacements}
        displacements = {path: move.astype(dtypes[path]) for path, move in displacements.items()}
        return call.answer(moved | displacements), state._replace(
            momentum=traced,
            rate=rate_state,
            radii=after.radii,
            lambdas=after.lambdas,
            zeta_share=share,
            grad_norm=norm,
            step_ratio=ratio,
            refused=refused,
        )

    def as_momentum(plan: Plan, params: Any) -> Any:
        """The parameters as the momentum buffer has them: constraint arithmetic is never rounded to bfloat16."""
        leaves = by_path(params)
        wide = {path: of_dtype(leaves[path], compute_dtype(leaves[path].dtype)) for path in plan.collections if leaves}
        return from_paths(leaves | wide, params)

    def of_dtype(leaf: Any, dtype: Any) -> Any:
        # Shapes alone are enough to begin with zeros.
        return leaf.update(dtype=dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.astype(dtype)

    def accumulated(steps: ByPath, state: Any) -> tuple[ByPath, Any]:
        """The directions and the new momentum; a leaf without a gradient keeps its own."""
        if momentum is None:
            return steps, state
        before = by_path(state.trace)
        updated: Any = trace.update(steps, state._replace(trace={path: before[path] for path in steps}))
        directions, after = updated
        return directions, state._replace(trace=from_paths(before | after.trace, state.trace))

    def decayed(g: Array, x: Array) -> Array:
        return g + jnp.asarray(weight_decay, g.dtype) * x.astype(g.dtype)

    return optax.GradientTransformationExtraArgs(init, update)
