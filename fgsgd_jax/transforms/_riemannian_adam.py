"""Adam with one second moment for every point."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from ..groups import Stacks, as_rules, by_path, from_paths, kinds_of
from ..linalg import compute_dtype, squared_norm
from ..manifolds import Mixture
from . import _algorithm as algorithm
from ._algorithm import Scalar, Tensors
from ._call import PlanOrRules, called, started
from ._on_manifolds import wrapped
from ._rescaling import InitialRadii, Rescaling, options


class RiemannianAdamState(NamedTuple):
    """The number of applied updates, the moments in the tree of the parameters, and the kinds of manifold.

    `mu` is a tangent vector at the point of the last update. `nu` holds the second moment of a point in each of its
    entries, so that it is sharded, masked and saved as the parameters are.
    """

    applied: Int[Array, ""]
    mu: Any
    nu: Any
    kinds: Stacks


def riemannian_adam(
    learning_rate: optax.ScalarOrSchedule,
    plan: PlanOrRules,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    rescaling: Rescaling | None = None,
    initial_radii: InitialRadii = "gamma",
    share_out: jax.sharding.Mesh | None = None,
    **old: Any,
) -> optax.GradientTransformationExtraArgs:
    """Riemannian Adam: one second moment for every matrix, the first moment carried to each new point.

    With g the gradient on the manifold at ω, one update of a matrix is

      m ← b1 Π_ω(m) + (1 - b1) g,   v ← b2 v + (1 - b2) ‖g‖_F²,   ω ← φ_ω(-r m̂ / (√v̂ + eps)),

    with m̂ = m / (1 - b1^t) and v̂ = v / (1 - b2^t). Because v is one number for a point, m̂ / √v̂ stays tangent and
    the update does not depend on coordinates. Euclidean matrices and unconstrained leaves get `optax.adam`.

    Args:
      learning_rate: r, a number or a schedule.
      plan: the plan of the parameters, or its rules.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
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
      Bécigneul & Ganea, Riemannian Adaptive Optimization Methods, 2019, section 4.2, with Adam's bias correction, a
      retraction in place of the exponential map and projection in place of parallel transport.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}
      >>> plan = fg.plan(params, [("kernel", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")), ("*", None)])
      >>> params = fg.initialize(jax.random.key(0), params, plan)
      >>> tx = fg.riemannian_adam(1e-2, plan)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(fg.violation(params, plan)["kernel"] < 1e-6)
      True
    """
    plan = as_rules(plan)
    rescaling, initial_radii = options("fg.riemannian_adam", rescaling, initial_radii, old)
    inner = optax.chain(_scale_by_riemannian_adam(plan, b1, b2, eps), optax.scale_by_learning_rate(learning_rate))
    return wrapped("fg.riemannian_adam", inner, plan, rescaling, initial_radii, share_out)


def _scale_by_riemannian_adam(
    plan: PlanOrRules, b1: Scalar, b2: Scalar, eps: Scalar
) -> optax.GradientTransformationExtraArgs:
    def init(params: Any) -> Any:
        own, _ = started("fg.riemannian_adam", plan, params)
        # Moments of bfloat16 would lose every gradient below 1/256 of them.
        mu, nu = (jax.tree.map(lambda x: jnp.zeros_like(x, compute_dtype(x.dtype)), params) for _ in range(2))
        return RiemannianAdamState(jnp.zeros((), jnp.int32), mu, nu, kinds_of(own))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        call = called("fg.riemannian_adam", plan, updates, params)
        mu, nu = by_path(state.mu), by_path(state.nu)

        def carried(points: Tensors, moments: Tensors, kinds: Stacks) -> Any:
            radii = algorithm.radii_of(call.plan, kinds, points)
            return (algorithm.project(call.plan, kinds, radii, points, moments).tangents,)

        def in_entries(mixture: Mixture, g: Array) -> Array:
            """‖g‖_F² in every entry of a constrained matrix, g² in those of a Euclidean one."""
            total = squared_norm(g)
            on = mixture.constrained(jnp.ones_like(total)) > 0
            return jnp.where(on[..., None, None], total[..., None, None], jnp.square(g))

        def of_matrices(gradients: Tensors, kinds: Stacks) -> Any:
            own = algorithm.mixtures(call.plan, kinds)
            return (algorithm.on_matrices(in_entries, call.plan, own, gradients),)

        (carried_mu,) = algorithm.on_buckets(carried, call.plan, (call.points, mu), state.kinds, like=())
        before = mu | carried_mu
        gradients = {path: g.astype(mu[path].dtype) for path, g in call.leaves.items()}
        (of_constrained,) = algorithm.on_buckets(of_matrices, call.plan, [gradients], state.kinds, like=())
        squares = {path: jnp.square(g) for path, g in gradients.items()} | of_constrained
        count = state.applied + 1

        def decayed(decay: Scalar, moment: Array, new: Array) -> Array:
            decay = jnp.asarray(decay, moment.dtype)
            return decay * moment + (1 - decay) * new

        def direction(m: Array, v: Array, g: Array) -> Array:
            t = count.astype(m.dtype)
            m_hat, v_hat = (moment / (1 - jnp.asarray(decay, m.dtype) ** t) for moment, decay in ((m, b1), (v, b2)))
            return (m_hat / (jnp.sqrt(v_hat) + jnp.asarray(eps, m.dtype))).astype(g.dtype)

        mu |= {path: decayed(b1, before[path], g) for path, g in gradients.items()}
        nu |= {path: decayed(b2, nu[path], square) for path, square in squares.items()}
        directions = {path: direction(mu[path], nu[path], g) for path, g in call.leaves.items()}
        state = RiemannianAdamState(count, from_paths(mu, state.mu), from_paths(nu, state.nu), state.kinds)
        return call.answer(directions), state

    return optax.GradientTransformationExtraArgs(init, update)
