"""Line 6 of Algorithm 1: steps of bounded length."""

from typing import Any

import optax

from ..groups import Stacks, as_rules, groups_of, names_of
from . import _algorithm as algorithm
from ._algorithm import Scalar, Tensors, check_options
from ._call import PlanOrRules, called, started
from ._states import NormalizeState


def normalize_by_zeta(
    plan: PlanOrRules, *, rho: Scalar = 1.0, curvature: Scalar = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Divides every group's projected gradient by its ζ.

    With R the norm of the gradient over the group (eq. 6), ζ = max{1, R²Γ}^½ and Γ = max{(2ρ+R)², 1+c(ρ+R)}. At the
    defaults that is eq. 7: ζ = 1 up to R = √2 - 1, and R/ζ = 1/(2+R) above. Groups on a Euclidean member are
    normalized like any other; leaves without a collection pass through.

    Args:
      plan: the plan of the parameters, or its rules.
      rho: ρ, the geodesic distance to the minimum, in the weights' units.
      curvature: c, the sectional curvature of the product manifold.

    Returns:
      A transformation to put behind `project` and before any momentum.

    Raises:
      ValueError: a negative ρ or c; in `init` and `update`, parameters that are not those of the plan.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, eqs. 3 to 7.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"w": jnp.array([[1.0], [0.0]])}
      >>> plan = fg.plan(params, [("w", fg.Whole(fg.Sphere(), view="i o -> 1 1 i o"))])
      >>> tx = fg.normalize_by_zeta(plan)
      >>> updates, _ = tx.update({"w": jnp.array([[0.0], [2.0]])}, tx.init(params), params)
      >>> updates["w"].ravel().tolist()  # R = 2, ζ = R (2 + R) = 8
      [0.0, 0.25]
    """
    plan = as_rules(plan)
    check_options(rho, curvature)

    def init(params: Any) -> Any:
        start = started("fg.normalize_by_zeta", plan, params)
        figures = (algorithm.no_figure(*start) for _ in range(2))
        return start.beside(NormalizeState(names_of(start.plan), groups_of(start.plan), *figures))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        call = called("fg.normalize_by_zeta", plan, updates, params, needs_params=False)

        def line_6(directions: Tensors, groups: Stacks, rho: Scalar, curvature: Scalar) -> Any:
            squares = algorithm.squared_norms(call.plan, directions)
            found = algorithm.normalize(call.plan, groups, squares, rho, curvature)
            figures = (x.astype(state.zeta_share.dtype) for x in (found.zeta_share, found.grad_norm))
            return algorithm.scaled(call.plan, directions, found.inverse_zeta), *figures

        steps, share, norm = algorithm.on_buckets(
            line_6, call.plan, [call.leaves], state.groups, rho, curvature, like=(state.zeta_share, state.grad_norm)
        )
        return call.answer(steps), state._replace(zeta_share=share, grad_norm=norm)

    return optax.GradientTransformationExtraArgs(init, update)
