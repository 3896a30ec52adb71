"""FG-SGD as one transformation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..groups import Plan, as_rules, automatic, by_path, from_paths, groups_of, kinds_of, names_of
from ..kernels import PALLAS, by_platform
from ..linalg import compute_dtype
from . import _algorithm as algorithm
from ._algorithm import Descent, Options, Scalar, Step, check_options
from ._at_once import AtOnce, Kernels, check_kernels, stated_shardings, without_kernels
from ._call import PlanOrRules, called, check_on_manifold, started
from ._rescaling import InitialRadii, Rescaling, options
from ._scale import Scale, ScaleState
from ._states import FgsgdState


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
    share_out: Mesh | None = None,
    kernels: Kernels = "auto",
    shardings: Any = None,
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
        gradients (of the latter, to those divided by ζ) as by `optax.add_decayed_weights` before `optax.sgd`. On a
        manifold of fixed norm it would do nothing.
      rescaling: the options of λ; None for λ = 1.
      initial_radii: of the first epoch; see `rescale`.
      share_out: a mesh whose devices divide the retractions of large matrices among them, for data-parallel training,
        where every device holds all weights. It costs a gather of the displacements. None: every device retracts all of
        them.
      kernels: `"auto"` takes lines 5 to 7 of small matrices (up to 64 entries; on GPU 32, or 12 with a Stiefel
        manifold) by Pallas kernels where the program is compiled for a TPU or an NVIDIA GPU; `"xla"` takes none;
        `"pallas"` raises an error, with path and reason, for a constrained leaf that has none. Under `jax.vmap` and for
        derivatives there are none.
      shardings: how the constrained leaves lie on a mesh whose axes are not of type Explicit, which the kernels have to
        know in a program for several devices: one `NamedSharding` for all of them, or a tree of them like the
        parameters, as in `jax.jit(..., in_shardings=...)`. Without it, or `share_out`, such a program has no kernels.
      **old: keywords of version 0.1, which warn; see `rescale`.

    Returns:
      A transformation whose `update` needs `params` and takes `feature_moments`.

    Raises:
      ValueError: outside jit, if parameters are off their manifolds; for invalid options; in `update`, for `shardings`
        that are not those of the parameters; where the program is lowered, for a leaf without the kernels that
        `kernels="pallas"` asks for.

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
    check_kernels(kernels)
    rescaling, initial_radii = options("fg.fgsgd", rescaling, initial_radii, old)
    rate = optax.scale_by_learning_rate(learning_rate)
    trace = optax.identity() if momentum is None else optax.trace(momentum, nesterov)
    stated = shardings
    if stated is None and share_out is not None:
        stated = NamedSharding(share_out, PartitionSpec())

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
        before = ScaleState(state.radii, state.lambdas)
        call = called("fg.fgsgd", plan, updates, params, scale=before)
        dtype = state.step_ratio.dtype

        def lines_5_to_7(plan: Plan, step: Step) -> Descent:
            trees = [step.points, step.gradients] + ([] if step.momentum is None else [step.momentum])
            points, gradients, *buffers = algorithm.to_buckets(plan, *trees)
            tangents, squares, refused = algorithm.project(
                plan, step.kinds, step.radii, points, gradients, is_exact=False
            )
            zeta = algorithm.normalize(plan, step.groups, squares, step.options.rho, step.options.curvature)
            tangents = tuple(
                decayed(own, at, step.options.weight_decay) if bucket.is_euclidean else own
                for bucket, own, at in zip(
                    plan.buckets, algorithm.scaled(plan, tangents, zeta.inverse_zeta), points, strict=True
                )
            )
            directions, momenta = tangents, ()
            if buffers:
                follow = optax.trace(step.options.momentum, nesterov).update
                followed: Any = follow(tangents, optax.TraceState(buffers[0]))
                directions, (momenta,) = followed
            displacements, ratio = algorithm.retract(
                plan,
                step.kinds,
                step.radii,
                points,
                directions,
                new_radii=step.new_radii,
                factor=step.options.factor,
                is_tangent=step.momentum is None,
                share_out=share_out,
            )
            moves = algorithm.from_buckets(plan, displacements, step.points, step.gradients)
            buffer = step.momentum and algorithm.from_buckets(plan, momenta, step.momentum)
            share, norm, ratio = (figure.astype(dtype) for figure in (zeta.zeta_share, zeta.grad_norm, ratio))
            return Descent(moves, buffer, share, norm, ratio, refused)

        after = before
        if before.lambdas is not None:
            after = Scale(call.plan, rescaling, initial_radii).advance(before, state.kinds, feature_moments)

        free, refused = algorithm.without_refused_free(state.refused, call.free)
        free = decayed(free, {path: call.points[path] for path in free}, weight_decay)
        buffers, traced = {}, state.momentum
        if momentum is not None:
            buffers = by_path(state.momentum.trace)
            traced = traced._replace(trace={path: buffers[path] for path in free})
        followed: Any = trace.update(free, traced)
        directions, traced = followed
        # The matrices are multiplied by the rate inside the step. Applied to 1, it gives that factor.
        rated: Any = rate.update((directions, jnp.ones((), dtype)), state.rate)
        (moved, factor), rate_state = rated

        paths = call.plan.collections
        points, gradients = ({path: tree[path] for path in paths} for tree in (call.points, call.leaves))
        buffer = None if momentum is None else {path: buffers[path] for path in paths}
        new_radii = None if after.lambdas is None else after.radii
        numbers = Options(factor, 0.0 if momentum is None else momentum, rho, curvature, weight_decay)
        numbers = jax.tree.map(jnp.asarray, numbers)
        step = Step(points, gradients, buffer, state.kinds, state.groups, state.radii, new_radii, numbers)
        # As Optax's optimizers do: an update is no wider than its weight or its gradient.
        moves = {path: max(x, gradients[path], key=lambda leaf: leaf.dtype.itemsize) for path, x in points.items()}
        figure = state.step_ratio
        like = Descent(moves, buffer, figure, figure, figure, figure.astype(bool))
        types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        # Inside `automatic` the axes of a mesh have no types that tell.
        shown = {path: jax.typeof(x).sharding for path, x in points.items()}
        places = {path: own for path, own in shown.items() if own.mesh.are_all_axes_explicit and not own.mesh.empty}
        if stated is not None:
            places = stated_shardings(call.points, stated) | places
        about = lines_5_to_7, call.plan, types, kernels, nesterov, places
        platforms = PALLAS if paths and kernels != "xla" else ()
        ways = {platform: functools.partial(AtOnce, platform, *about) for platform in platforms}
        default = functools.partial(without_kernels if paths and kernels == "pallas" else lines_5_to_7, call.plan)
        descent = automatic(by_platform, default, ways, types, step, like=like._replace(displacements=points))
        if momentum is not None:
            buffers |= traced.trace | descent.momentum
            traced = traced._replace(trace=from_paths(buffers, state.momentum.trace))
        return call.answer(moved | descent.displacements), state._replace(
            momentum=traced,
            rate=rate_state,
            radii=after.radii,
            lambdas=after.lambdas,
            zeta_share=descent.zeta_share,
            grad_norm=descent.grad_norm,
            step_ratio=descent.step_ratio,
            refused=refused._replace(constrained=refused.constrained + descent.refused.astype(jnp.int32)),
        )

    def as_momentum(plan: Plan, params: Any) -> Any:
        """The parameters as the momentum buffer has them: constraint arithmetic is never rounded to bfloat16."""
        leaves = by_path(params)
        own = {path: leaf for path, leaf in leaves.items() if path in plan.collections}
        wide = {path: jnp.zeros_like(leaf, compute_dtype(leaf.dtype)) for path, leaf in own.items()}
        return from_paths(leaves | wide, params)

    def decayed(gradients: Any, points: Any, decay: Scalar) -> Any:
        return jax.tree.map(lambda g, x: g + jnp.asarray(decay, g.dtype) * x.astype(g.dtype), gradients, points)

    return optax.GradientTransformationExtraArgs(init, update)
