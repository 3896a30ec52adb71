"""Rules in the place of a plan: the plan is made from the parameters, once for each of their structures."""

from collections.abc import Iterable
from typing import Any

from ._paths import Pattern, array_leaves
from ._plan import Plan, checked_rules, plan
from ._schemes import Scheme

Rules = Iterable[tuple[Pattern, Scheme | None]]

# The oldest first. As many as a program has optimizers, models and parts of them; a plan holds a few bytes for each
# matrix.
_plans: dict[Any, tuple[Any, Plan]] = {}
_MOST = 64


def as_rules(rules: Plan | Rules) -> Plan | Rules:
    """Returns a plan as it is, and rules as a checked tuple: for a factory, which must read an iterator only once."""
    return rules if isinstance(rules, Plan) else tuple(checked_rules(rules))


def as_plan(rules: Plan | Rules, params: Any) -> Plan:
    """Returns a plan as it is, and makes one of rules: `plan(params, rules)`.

    Plans are kept by the rules, as objects, and by the paths, shapes and dtypes of the parameters, so that steps
    outside jit do not make them again. A predicate must look at nothing else.

    Args:
      rules: a plan, or the rules of one.
      params: the parameters.

    Raises:
      ValueError: what `plan` raises for these rules and parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> from fgsgd_jax.groups import as_plan
      >>> params, rules = {"kernel": jnp.ones((8, 4))}, [("kernel", fg.Whole(fg.Stiefel()))]
      >>> as_plan(rules, params) is as_plan(rules, params)
      True
    """
    if isinstance(rules, Plan):
        return rules
    rules = checked_rules(rules)
    leaves = array_leaves(params)
    key = (
        tuple((pattern if isinstance(pattern, str) else id(pattern), id(scheme)) for pattern, scheme in rules),
        tuple((path, tuple(leaf.shape), leaf.dtype) for path, leaf in leaves.items()),
    )
    if key not in _plans:
        # With its rules: as long as they live, no other object has their ids.
        _plans[key] = rules, plan(params, rules)
        if len(_plans) > _MOST:
            del _plans[next(iter(_plans))]
    return _plans[key][1]
