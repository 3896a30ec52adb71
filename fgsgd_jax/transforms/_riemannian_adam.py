"""Adam with one second moment for every point."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..groups import Batch, Plan, Stacked, automatic, batches, buckets, from_paths
from ..linalg import squared_norm
from ..manifolds import Mixture, compute_dtype
from ._links import constrained, constrained_leaves
from ._on_manifolds import on_manifolds
from ._project import project
from ._zeta import Scalar


class RiemannianAdamState(NamedTuple):
    """The number of applied updates, the moments in the parameters' structure, and the kinds of manifold.

    `mu` is a tangent vector at the point of the last update. `nu` holds the second moment of a point in each of its
    entries, so that it is sharded, masked and saved as the parameters are.
    """

    applied: Int[Array, ""]
    mu: Any
    nu: Any
    tangent: Any


def riemannian_adam(
    learning_rate: optax.ScalarOrSchedule,
    plan: Plan,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    every: int | None = None,
    lambda_floor: float | None = None,
    max_change: float | Literal["auto"] | None = "auto",
    warmup: tuple[int, int] | None = None,
    radii: Literal["gamma", "fitted"] = "gamma",
    share_out: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Riemannian Adam: one second moment for every matrix, the first moment carried to each new point.

    With g the gradient on the manifold at ω, one update of a matrix is

      m ← b1 Π_ω(m) + (1 - b1) g,   v ← b2 v + (1 - b2) ‖g‖_F²,   ω ← φ_ω(-r m̂ / (√v̂ + eps)),

    with m̂ = m / (1 - b1^t) and v̂ = v / (1 - b2^t). Because v is one number for a point, m̂ / √v̂ stays tangent and the
    update does not depend on coordinates. Euclidean matrices are products of lines, a point each: they and
    unconstrained leaves get `optax.adam`. No ζ.

    Args:
      learning_rate: r, a number or a schedule.
      plan: the plan of the parameters.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      every: applied updates in an epoch, for λ; this and the remaining arguments are those of `rescale`.
      lambda_floor: smallest λ used.
      max_change: largest factor by which radii change at once.
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
    inner = optax.chain(_scale_by_riemannian_adam(plan, b1, b2, eps), optax.scale_by_learning_rate(learning_rate))
    return on_manifolds(inner, plan, every, lambda_floor, max_change, warmup, radii, share_out)


def _scale_by_riemannian_adam(plan: Plan, b1: Scalar, b2: Scalar, eps: Scalar) -> optax.GradientTransformation:
    layout = buckets(plan)
    joined = batches(plan, layout)
    tangent = project(plan)

    def init(params: Any) -> Any:
        # Moments of bfloat16 would lose every gradient below 1/256 of them.
        mu, nu = (jax.tree.map(lambda x: jnp.zeros_like(x, compute_dtype(x.dtype)), params) for _ in range(2))
        return RiemannianAdamState(jnp.zeros((), jnp.int32), mu, nu, tangent.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        gradients = constrained_leaves(updates, plan, "updates", "fg.riemannian_adam")
        carried, _ = tangent.update(state.mu, state.tangent, params)
        # Else XLA lays the moments of a compiled loop out as the projection likes them, and rounds in another way.
        carried = jax.lax.optimization_barrier(carried)
        moments = constrained_leaves(state.nu, plan, "second moments", "fg.riemannian_adam")
        squares = {path: jnp.square(g.astype(moments[path].dtype)) for path, g in gradients.items()}
        like = constrained(plan, moments)
        squares |= automatic(of_matrices, gradients, moments, state.tangent.kinds, like=like)
        count = state.applied + 1

        def decayed(decay, moment, new):
            decay = jnp.asarray(decay, moment.dtype)
            return decay * moment + (1 - decay) * new.astype(moment.dtype)

        def step(m, v, g):
            t = count.astype(m.dtype)
            m_hat, v_hat = (moment / (1 - jnp.asarray(decay, m.dtype) ** t) for moment, decay in ((m, b1), (v, b2)))
            return (m_hat / (jnp.sqrt(v_hat) + jnp.asarray(eps, m.dtype))).astype(g.dtype)

        mu = jax.tree.map(lambda m, g: decayed(b1, m, g), carried, updates)
        nu = jax.tree.map(lambda v, square: decayed(b2, v, square), state.nu, from_paths(squares, updates))
        return jax.tree.map(step, mu, nu, updates), RiemannianAdamState(count, mu, nu, state.tangent)

    def of_matrices(gradients: dict[str, Array], moments: dict[str, Array], kinds: Stacked) -> dict[str, Array]:
        squares = {}
        for batch in joined:
            kind = batch.flat(batch.own(kinds.values))
            squares |= batch.unstack(_squares(batch, kind, batch.stack(gradients)), moments)
        return squares

    return optax.GradientTransformation(init, update)


def _squares(batch: Batch, kind: Array | None, g: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
    """‖g‖_F² in every entry of a constrained matrix, g² in those of a Euclidean one."""
    total = squared_norm(g)
    on = Mixture(batch.kinds, kind).constrained(jnp.ones_like(total)) > 0
    return jnp.where(on[..., None, None], total[..., None, None], jnp.square(g))
