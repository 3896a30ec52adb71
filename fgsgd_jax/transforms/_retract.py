"""Line 7 of Algorithm 1: back onto the manifolds."""

from typing import Any

import jax
import optax

from ..groups import Stacks, as_rules, kinds_of, names_of
from . import _algorithm as algorithm
from ._algorithm import Tensors
from ._call import PlanOrRules, called, started
from ._states import RetractState


def retract(plan: PlanOrRules, *, share_out: jax.sharding.Mesh | None = None) -> optax.GradientTransformationExtraArgs:
    """Turns updates into displacements that end on the manifolds.

    The update v of a matrix ω becomes φ_ω(v) - ω with the retraction φ of its manifold, at the radius of ω as given.

    v need not be tangent, as the directions of `steepest` are not. It is not projected: the polar retraction of Stiefel
    matrices, spheres and oblique matrices go to the point nearest to ω + v, QR factorizes ω + v. The Cayley transform
    and the exponential, which are defined for tangent vectors alone, take Π_ω(v). Where ω + v has no nearest point, the
    weight stays.

    Args:
      plan: the plan of the parameters, or its rules.
      share_out: a mesh whose devices divide the retractions of large matrices among them, for data-parallel training,
        where every device holds all weights. It costs a gather of the displacements. None: every device retracts all of
        them.

    Returns:
      A transformation whose `update` needs `params`, to put behind the learning rate. Only `rescale` may follow it:
      anything else that changes a displacement takes the weights off their manifolds.

    Raises:
      ValueError: in `init` and `update`, for parameters that are not those of the plan, or none.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, Algorithm 1, line 7.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"w": jnp.array([[1.0], [0.0]])}
      >>> plan = fg.plan(params, [("w", fg.Whole(fg.Sphere(), view="i o -> 1 1 i o"))])
      >>> tx = fg.retract(plan)
      >>> updates, _ = tx.update({"w": jnp.array([[0.0], [0.75]])}, tx.init(params), params)
      >>> [round(x, 6) for x in (params["w"] + updates["w"]).ravel().tolist()]  # (1, ¾) / 1.25
      [0.8, 0.6]
    """
    plan = as_rules(plan)

    def init(params: Any) -> Any:
        start = started("fg.retract", plan, params)
        state = RetractState(names_of(start.plan), kinds_of(start.plan), algorithm.no_figure(*start))
        return start.beside(state)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        call = called("fg.retract", plan, updates, params)

        def line_7(points: Tensors, directions: Tensors, kinds: Stacks) -> Any:
            radii = algorithm.radii_of(call.plan, kinds, points)
            displacements, ratio = algorithm.retract(
                call.plan, kinds, radii, points, directions, is_tangent=True, share_out=share_out
            )
            return displacements, ratio.astype(state.step_ratio.dtype)

        trees, figure = (call.points, call.leaves), state.step_ratio
        displacements, ratio = algorithm.on_buckets(line_7, call.plan, trees, state.kinds, like=(figure,), moves=True)
        return call.answer(displacements), state._replace(step_ratio=ratio)

    return optax.GradientTransformationExtraArgs(init, update)
