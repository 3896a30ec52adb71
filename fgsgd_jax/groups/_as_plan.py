"""A plan, or the rules that make one."""

from typing import Any

import jax

from ._plan import Plan, plan as plan_of

_MADE: dict[tuple, tuple[Any, Plan]] = {}


def as_plan(plan: Any, params: Any) -> Plan:
    """A plan as it is; of rules the plan of these parameters, made once for parameters of one structure."""
    if isinstance(plan, Plan):
        return plan
    leaves, structure = jax.tree.flatten(params)
    key = (id(plan), structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    if key not in _MADE:
        _MADE[key] = (plan, plan_of(params, plan))
    return _MADE[key][1]
