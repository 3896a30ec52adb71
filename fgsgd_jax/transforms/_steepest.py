"""The direction of steepest descent in the norm that suits each manifold."""

from typing import Any

import optax

from ..groups import Stacks, as_rules, kinds_of, names_of
from ..manifolds import Steepest, check_steepest
from . import _algorithm as algorithm
from ._algorithm import Tensors
from ._call import PlanOrRules, called, started
from ._states import SteepestState


def steepest(
    plan: PlanOrRules, method: Steepest = "polar", *, tangent: bool = True, coarse: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Replaces updates by unit directions of steepest descent, each in the norm of its manifold.

    A matrix's update g (a gradient or a momentum, projected or not) becomes the vector u of norm s with the largest
    ⟨g, u⟩, where s is the radius of the weight as given. The learning rate turns its sign and counts radii. With
    t = Π_ω(g) = U Σ Vᵀ, and u = 0 where t = 0,

    | manifold | norm | u / s |
    |---|---|---|
    | Stiefel, `"polar"` | spectral | U sign(Σ) Vᵀ = msign(t) |
    | Stiefel, `"dual"` | spectral | the largest ⟨t, u⟩ of all tangent u with ‖u‖₂ ≤ 1 |
    | sphere, and manifolds of your own | Frobenius | t/‖t‖ |
    | oblique | largest column | t_j/‖t_j‖ by columns |
    | Euclidean, s = 1 | spectral | msign(g), as Muon |

    The norm of a POM is the largest norm of its matrices: each gets a direction of its own, and the groups of the plan
    do not matter. A link right before this one that scales whole matrices does nothing: ζ of `normalize_by_zeta` is
    divided out again. (With momentum between them, ζ weighs the steps against each other.) The views choose the
    matrices: heads, slices, tiles. Leaves without a collection pass through.

    msign(t) is steeper than all tangent vectors and not tangent itself (for n ≠ p). `retract` takes it as it is: the
    polar retraction goes to the point nearest to ω - ru, which exists for r < 1 and agrees with that of the tangent
    part to first order. `"dual"` is tangent and costs tens to hundreds of times the products.

    Args:
      plan: the plan of the parameters, or its rules.
      method: `"polar"` or `"dual"`; they differ on Stiefel alone, and there not for square matrices.
      tangent: whether to project first. False gives the direction of g itself; not for `"dual"`.
      coarse: whether msign and its projection take JAX's default precision (bfloat16 on TPU, TF32 on GPU) and five
        turns instead of eight; not for `"dual"`. Singular values above 1e-3 of the Frobenius norm end within 15 % of 1.
        Weights stay exactly on their manifolds. On a TPU an exact product takes six passes, a coarse one a single one.

    Returns:
      A transformation whose `update` needs `params`, to put behind the momentum and before the learning rate.

    Raises:
      ValueError: for invalid options.

    References:
      Yang & Lai, Manifold Constrained Steepest Descent, 2026 (`"polar"`, SPEL).
      Bernstein, Modular Manifolds, 2025 (`"dual"`, manifold Muon).
      Large, Liu, Huh, Bahng, Isola & Bernstein, Scalable Optimization in the Modular Norm, 2024 (norms of products).

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"w": jnp.array([[2.0], [0.0]])}
      >>> plan = fg.plan(params, [("w", fg.Whole(fg.Sphere(radius=2.0), view="i o -> 1 1 i o"))])
      >>> tx = fg.steepest(plan)
      >>> updates, _ = tx.update({"w": jnp.array([[3.0], [0.5]])}, tx.init(params), params)
      >>> updates["w"].ravel().tolist()
      [0.0, 2.0]
    """
    check_steepest(method, tangent, coarse)
    plan = as_rules(plan)

    def init(params: Any) -> Any:
        start = started("fg.steepest", plan, params)
        return start.beside(SteepestState(names_of(start.plan), kinds_of(start.plan)))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        call = called("fg.steepest", plan, updates, params)

        def directions(points: Tensors, vectors: Tensors, kinds: Stacks) -> Any:
            return (algorithm.steepest(call.plan, kinds, points, vectors, method, tangent, coarse),)

        trees = call.points, call.leaves
        (found,) = algorithm.on_buckets(directions, call.plan, trees, state.kinds, like=())
        return call.answer(found), state

    return optax.GradientTransformationExtraArgs(init, update)
