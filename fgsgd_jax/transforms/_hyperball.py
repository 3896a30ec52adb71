"""Any optimizer with weights and updates of fixed norm."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from ..groups import Plan, as_rules, by_path
from ._call import PlanOrRules, started
from ._project import refuse
from ._rescale import rescaled
from ._rescaling import InitialRadii, Rescaling, options
from ._retract import retract
from ._spel import in_plan
from ._states import ByPath
from ._steepest import steepest


def hyperball(
    inner: optax.GradientTransformation,
    plan: PlanOrRules,
    learning_rate: optax.ScalarOrSchedule = 0.01,
    *,
    rescaling: Rescaling | None = None,
    initial_radii: InitialRadii = "gamma",
    share_out: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Hyperball: any Optax optimizer, with weights of fixed norm that move by a fixed part of it.

    With -u the update of `inner` for a weight ω of norm R, one update is

      ω ← R norm(ω - η R norm(u)),   norm(z) = z/‖z‖_F.

    It is the chain `inner`, `steepest(plan, tangent=False)`, η, `retract`, `rescale`, on a plan of spheres: `fg.Whole`
    for one norm a matrix, as in the source; a view by heads or tiles for a norm of each.

    Differences from the source:

    * Other manifolds of the plan norm u in their own way: oblique ones by columns, Stiefel by msign, which is Muon with
      a way back to the manifold.
    * `inner` is a whole optimizer, as in `on_manifolds`. Its learning rate acts on leaves outside the plan; in the
      plan, it is divided out and η takes its place.
    * R is the plan's radius. With `initial_radii="fitted"` it is that of the first weights, as in the source.
    * A gradient without a finite squared norm is refused, as in `project`.

    Args:
      inner: the optimizer, learning rate included: its updates are meant to be added to the weights. Its weight decay
        is refused for leaves in the plan: what it adds to u is normal to the manifold and only shortens the rest.
      plan: the plan of the parameters, or its rules.
      learning_rate: η, in radii: a number below 1 or a schedule.
      rescaling: the options of λ; None for λ = 1.
      initial_radii: of the first epoch; see `rescale`.
      share_out: see `retract`.

    Returns:
      A transformation whose `update` needs `params` and takes `feature_moments`; other extra arguments go to `inner`.

    Raises:
      ValueError: outside jit, if parameters are off their manifolds or `inner` decays them.

    References:
      Wen, Dang, Lyu, Ma & Liang, Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball Optimization,
      2026, arXiv 2606.16899.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> rules = [("kernel", fg.Whole(fg.Sphere(), view="i o -> 1 1 i o")), ("*", None)]
      >>> params = fg.nearest(params, rules, radii="fitted")
      >>> tx = fg.hyperball(optax.sgd(1e-3, 0.9), rules, 0.02, initial_radii="fitted")
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> round(float(jnp.linalg.norm(params["kernel"])), 4)  # √32, as before
      5.6569
    """
    plan = as_rules(plan)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        start = started("fg.hyperball", plan, params)
        # Inside jit, even what is made of known numbers would be traced.
        with jax.ensure_compile_time_eval():
            if start.leaves and not _any_unknown(start.leaves):
                _check_no_decay(inner, start.plan, params)
        return inner.init(params)

    return optax.chain(
        refuse("fg.hyperball", plan),
        optax.GradientTransformationExtraArgs(init, inner.update),
        steepest(plan, tangent=False),
        optax.masked(optax.scale_by_learning_rate(learning_rate, flip_sign=False), in_plan(plan)),
        retract(plan, share_out=share_out),
        rescaled("fg.hyperball", plan, *options("fg.hyperball", rescaling, initial_radii, {})),
    )


def _check_no_decay(inner: optax.GradientTransformationExtraArgs, plan: Plan, params: Any) -> None:
    """Raises if the optimizer inside moves a constrained weight towards zero where there is no gradient."""
    try:
        updates, _ = inner.update(jax.tree.map(jnp.zeros_like, params), inner.init(params), params)
    except TypeError:
        # It needs arguments that only a training step has.
        return
    moved, weights = by_path(updates), by_path(params)
    if _any_unknown(moved):
        return
    for path in (path for path, collection in plan.collections.items() if collection.constrained):
        u, w = (jnp.ravel(tree[path]).astype(jnp.float32) for tree in (moved, weights))
        if float(-u @ w) > 0.99 * float(jnp.linalg.norm(u) * jnp.linalg.norm(w)) > 0:
            raise ValueError(
                f"fg.hyperball: {path} decays in the optimizer inside. Weights keep their norm here, so that decay "
                "only shortens the part of the update that moves them. Leave it to the other leaves, as in "
                "optax.adamw(1e-3, mask=plan.mask)"
            )


def _any_unknown(leaves: ByPath) -> bool:
    return any(isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) for leaf in leaves.values())
