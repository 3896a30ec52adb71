"""The rescaling of weights by ℜ = γ/λ."""

from typing import Any

import optax

from ..groups import Stacks, as_rules, kinds_of, names_of
from . import _algorithm as algorithm
from ._algorithm import Tensors
from ._call import PlanOrRules, called, check_on_manifold, started
from ._rescaling import InitialRadii, Rescaling, options
from ._scale import Scale, ScaleState
from ._states import RescaleState


def rescale(
    plan: PlanOrRules,
    rescaling: Rescaling | None = None,
    *,
    initial_radii: InitialRadii = "gamma",
    **old: Any,
) -> optax.GradientTransformationExtraArgs:
    """Sets the matrices at which the displacements end to exactly their radius ℜ = γ/λ.

    It is the last link of every chain. Its state holds the radii; weights do not carry them from step to step, because
    round-off would let them drift. `rescaling` says how λ changes them; see `Rescaling`.

    Updates are added to the weights. A matrix whose radius falls by a factor c keeps, until the next step, the
    round-off of its old radius: c times as much relative to the new one.

    Args:
      plan: the plan of the parameters, or its rules.
      rescaling: the options of λ; None for λ = 1.
      initial_radii: of the first epoch: `"gamma"`, or `"fitted"` for those of the parameters that `init` is given, as
        `fg.nearest(..., radii="fitted")` leaves them; they then take the place of γ.
      **old: keywords of version 0.1, which warn: `every`, `lambda_floor`, `max_change`, `warmup`, `radii`.

    Returns:
      A transformation whose `update` needs `params`, takes `feature_moments`, and expects displacements, as `retract`
      makes them.

    Raises:
      ValueError: outside jit, if parameters are off their manifolds; for invalid options.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, section 4 and eq. 2.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"w": jnp.array([[1.0], [0.0]])}
      >>> plan = fg.plan(params, [("w", fg.Whole(fg.Sphere(), view="i o -> 1 1 i o"))])
      >>> tx = fg.rescale(plan, fg.Rescaling(every=1))
      >>> count, mean = jnp.full(2, 10.0), jnp.zeros(2)
      >>> moments = {"w": fg.FeatureMoments(count, mean, m2=2.25 * count)}  # λ = 1.5
      >>> still = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(still, tx.init(params), params, feature_moments=moments)
      >>> [round(x, 6) for x in (params["w"] + updates["w"]).ravel().tolist()]  # ℜ = 1/1.5
      [0.666667, 0.0]
      >>> round(float(fg.radii(state)["w"][0, 0]), 6)
      0.666667
    """
    return rescaled("fg.rescale", plan, *options("fg.rescale", rescaling, initial_radii, old))


def rescaled(
    link: str, plan: PlanOrRules, rescaling: Rescaling, initial_radii: InitialRadii
) -> optax.GradientTransformationExtraArgs:
    """`rescale` by the name that its errors give."""
    plan = as_rules(plan)

    def init(params: Any) -> Any:
        start = started(link, plan, params)
        check_on_manifold(link, start, params, initial_radii)
        kinds = kinds_of(start.plan)
        scale = Scale(start.plan, rescaling, initial_radii).init(kinds, start.leaves)
        return start.beside(RescaleState(names_of(start.plan), kinds, *scale))

    def update(updates: Any, state: Any, params: Any = None, *, feature_moments: Any = None, **extra_args: Any) -> Any:
        del extra_args
        before = ScaleState(state.radii, state.lambdas)
        call = called(link, plan, updates, params, scale=before)
        scale = Scale(call.plan, rescaling, initial_radii)

        def line_8(points: Tensors, moves: Tensors, kinds: Stacks, before: ScaleState, feature_moments: Any) -> Any:
            after = before if before.lambdas is None else scale.advance(before, kinds, feature_moments)
            return algorithm.rescale(call.plan, kinds, points, moves, after.radii), after

        trees = call.points, call.leaves
        displacements, after = algorithm.on_buckets(
            line_8, call.plan, trees, state.kinds, before, feature_moments, like=(before,), moves=True
        )
        return call.answer(displacements), state._replace(radii=after.radii, lambdas=after.lambdas)

    return optax.GradientTransformationExtraArgs(init, update)
