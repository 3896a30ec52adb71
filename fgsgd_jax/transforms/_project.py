"""Line 5 of Algorithm 1: gradients onto the tangent spaces."""

from typing import Any

import jax.numpy as jnp
import optax

from ..groups import Stacks, as_rules, kinds_of, names_of
from . import _algorithm as algorithm
from ._algorithm import Tensors
from ._call import PlanOrRules, called, started
from ._states import ProjectState


def project(plan: PlanOrRules) -> optax.GradientTransformationExtraArgs:
    """Projects updates onto the tangent spaces of the manifolds at the parameters.

    Each matrix's update becomes Π_ω(g) at its weight ω. The radius is that of the weight as given.

    A leaf without a finite squared norm (it holds NaN or infinity, or is longer than 10¹⁹ in float32, where ζ leaves
    nothing of a step) is refused, constrained or not: it becomes zero in this step, and `fg.refused` counts it. No such
    number reaches a weight or the state of a later link. All other leaves are projected, or pass through.

    Args:
      plan: the plan of the parameters, or its rules.

    Returns:
      A transformation whose `update` needs `params`.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, Algorithm 1, line 5.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"w": jnp.array([[1.0], [0.0]])}
      >>> plan = fg.plan(params, [("w", fg.Whole(fg.Sphere(), view="i o -> 1 1 i o"))])
      >>> tx = fg.project(plan)
      >>> updates, _ = tx.update({"w": jnp.array([[3.0], [2.0]])}, tx.init(params), params)
      >>> updates["w"].ravel().tolist()
      [0.0, 2.0]
    """
    return refuse("fg.project", plan, projects=True)


def refuse(link: str, plan: PlanOrRules, projects: bool = False) -> optax.GradientTransformationExtraArgs:
    """What `project` refuses becomes zero and is counted; all else passes as it is, or projected, in `link`."""
    plan = as_rules(plan)

    def init(params: Any) -> Any:
        start = started(link, plan, params)
        own = start.plan
        return start.beside(ProjectState(names_of(own), kinds_of(own), algorithm.none_refused(own)))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        call = called(link, plan, updates, params)

        def line_5(points: Tensors, gradients: Tensors, kinds: Stacks) -> Any:
            if projects:
                return algorithm.projected(call.plan, kinds, None, points, gradients)
            squares, refused = algorithm.refuse(algorithm.squared_norms(call.plan, gradients))
            return algorithm.without_refused(call.plan, gradients, squares), refused

        trees, counts = (call.points, call.leaves), state.refused.constrained
        passed, refused = algorithm.on_buckets(line_5, call.plan, trees, state.kinds, like=(counts,))
        free, counts = algorithm.without_refused_free(state.refused, call.free)
        counts = counts._replace(constrained=counts.constrained + refused.astype(jnp.int32))
        return call.answer(free | passed), state._replace(refused=counts)

    return optax.GradientTransformationExtraArgs(init, update)
