"""Momentum along directions of steepest descent: SPEL and manifold Muon."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ..groups import as_plan, as_rules, by_path, unboxed
from ._algorithm import Scalar
from ._call import PlanOrRules
from ._project import refuse
from ._rescale import rescaled
from ._rescaling import InitialRadii, Rescaling, options
from ._retract import retract
from ._steepest import steepest


def spel(
    learning_rate: optax.ScalarOrSchedule,
    plan: PlanOrRules,
    momentum: Scalar = 0.95,
    *,
    nesterov: bool = False,
    coarse: bool = False,
    free: optax.GradientTransformation | None = None,
    weight_decay: Scalar | None = None,
    rescaling: Rescaling | None = None,
    initial_radii: InitialRadii = "gamma",
    share_out: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SPEL: steepest descent in the spectral norm on Stiefel manifolds, with momentum.

    With g the gradient at ω, on a manifold of radius s, one update of a matrix is

      m ← μ m + g,   ω ← φ_ω(-r s msign(Π_ω(m))),

    where φ goes to the nearest point. It is the chain `optax.trace`, `steepest`, learning rate, `retract`, `rescale`.

    Differences from the source:

    * Other manifolds of the plan get the direction in their own norm (see `steepest`). So a tensor may mix them, and a
      view may cut it into heads, slices or tiles.
    * There is a radius s, and r is relative to it, so that one rate serves matrices of every width.
    * Weights start on their manifolds and stay there to round-off.
    * A gradient without a finite squared norm is refused, as in `project`.

    Args:
      learning_rate: r, in radii: a number below 1 or a schedule.
      plan: the plan of the parameters, or its rules.
      momentum: μ.
      nesterov: whether to look ahead, as in `optax.trace`.
      coarse: directions by coarser products, as Muon's are on TPU and GPU; see `steepest`.
      free: the optimizer of the leaves without a collection, with its own learning rate; None for
        `optax.adam(learning_rate)`.
      weight_decay: refused: on a manifold of fixed norm it is normal to the manifold and does nothing. Give it to
        `free`, as in `free=optax.adamw(3e-4, weight_decay=0.1)`.
      rescaling: the options of λ; None for λ = 1.
      initial_radii: of the first epoch; see `rescale`.
      share_out: see `retract`.

    Returns:
      A transformation whose `update` needs `params` and takes `feature_moments`.

    Raises:
      ValueError: outside jit, if parameters are off their manifolds; for invalid options.

    References:
      Yang & Lai, Manifold Constrained Steepest Descent, 2026, arXiv 2601.21487.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}
      >>> rules = [("kernel", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")), ("*", None)]
      >>> params = fg.initialize(jax.random.key(0), params, rules)
      >>> tx = fg.spel(0.05, rules, free=optax.sgd(1e-3))
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(fg.violation(params, rules)["kernel"] < 1e-6)
      True
    """
    plan = as_rules(plan)
    rest = free, weight_decay, rescaling, initial_radii, share_out
    return _descent("fg.spel", plan, steepest(plan, coarse=coarse), learning_rate, momentum, nesterov, *rest)


def manifold_muon(
    learning_rate: optax.ScalarOrSchedule,
    plan: PlanOrRules,
    momentum: Scalar = 0.95,
    *,
    nesterov: bool = False,
    free: optax.GradientTransformation | None = None,
    weight_decay: Scalar | None = None,
    rescaling: Rescaling | None = None,
    initial_radii: InitialRadii = "gamma",
    share_out: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Manifold Muon: steepest descent in the spectral norm among the tangent vectors of Stiefel manifolds.

    With g the gradient at ω, on a manifold of radius s, one update of a matrix is

      m ← μ m + g,   a = argmax {⟨m, a⟩ : ‖a‖₂ ≤ 1, ωᵀa + aᵀω = 0},   ω ← φ_ω(-r s a).

    It is the chain of `spel` with `steepest(plan, "dual")`.

    Differences from the source, beside those of `spel`:

    * The dual is solved to 1e-4 of the maximum instead of by a fixed number of ascent steps, and also where
      a = msign(m + 2ωΛ) has no tangent solution (n < 2p, as a rule).
    * There is momentum.

    Args:
      learning_rate: r, in radii: a number or a schedule.
      plan: the plan of the parameters, or its rules.
      momentum: μ; 0 for the source's update.
      nesterov: whether to look ahead, as in `optax.trace`.
      free: the optimizer of the leaves without a collection; see `spel`.
      weight_decay: refused; see `spel`.
      rescaling: the options of λ; None for λ = 1.
      initial_radii: of the first epoch; see `rescale`.
      share_out: see `retract`.

    Returns:
      A transformation whose `update` needs `params` and takes `feature_moments`.

    Raises:
      ValueError: outside jit, if parameters are off their manifolds; for invalid options.

    References:
      Bernstein, Modular Manifolds, Thinking Machines Lab: Connectionism, 2025.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": jnp.zeros((6, 4))}
      >>> rules = [("kernel", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o"))]
      >>> params = fg.initialize(jax.random.key(0), params, rules)
      >>> tx = fg.manifold_muon(0.05, rules, free=optax.sgd(1e-3))
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(fg.violation(params, rules)["kernel"] < 1e-6)
      True
    """
    plan = as_rules(plan)
    rest = free, weight_decay, rescaling, initial_radii, share_out
    return _descent("fg.manifold_muon", plan, steepest(plan, "dual"), learning_rate, momentum, nesterov, *rest)


def _descent(
    link: str,
    plan: PlanOrRules,
    direction: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar,
    nesterov: bool,
    free: optax.GradientTransformation | None,
    weight_decay: Scalar | None,
    rescaling: Rescaling | None,
    initial_radii: InitialRadii,
    share_out: jax.sharding.Mesh | None,
) -> optax.GradientTransformationExtraArgs:
    if weight_decay is not None and not (isinstance(weight_decay, (int, float)) and weight_decay == 0):
        raise ValueError(
            f"{link}(weight_decay={weight_decay}): on a manifold of fixed norm the decay of a weight is normal to the "
            "manifold, and the way back undoes it. Give it to the optimizer of the other leaves, as in "
            f"{link}(..., free=optax.adamw(3e-4, weight_decay=0.1))"
        )
    return optax.chain(
        refuse(link, plan),
        optax.masked(optax.adam(learning_rate) if free is None else free, in_plan(plan, False)),
        optax.masked(optax.trace(momentum, nesterov), in_plan(plan)),
        direction,
        optax.masked(optax.scale_by_learning_rate(learning_rate), in_plan(plan)),
        retract(plan, share_out=share_out),
        rescaled(link, plan, *options(link, rescaling, initial_radii, {})),
    )


def in_plan(plan: PlanOrRules, collected: bool = True) -> Callable[[Any], Any]:
    """A mask, as a function of a tree, of the leaves that have a collection, or of those that have none."""

    def mask(tree: Any) -> Any:
        collections = as_plan(plan, tree).collections
        return unboxed({path: (path in collections) == collected for path in by_path(tree)}, tree)

    return mask
