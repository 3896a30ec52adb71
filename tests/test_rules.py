"""Rules in the place of a plan: the plan that they make of the parameters."""

import jax
import jax.numpy as jnp
import optax
import pytest

import fgsgd_jax as fg
from fgsgd_jax.groups import _as_plan, as_plan, as_rules

PARAMS = {"conv": {"kernel": jnp.zeros((3, 3, 4, 6)), "bias": jnp.zeros(6)}}
RULES = [("kernel", fg.PIO([fg.Sphere(), fg.Stiefel()])), ("*", None)]


def test_a_plan_is_itself():
    plan = fg.plan(PARAMS, RULES, seed=3)
    assert as_plan(plan, {"other": jnp.zeros(3)}) is plan
    assert as_rules(plan) is plan


def test_rules_make_the_plan_of_the_parameters():
    assert as_plan(RULES, PARAMS) == fg.plan(PARAMS, RULES)
    other = {"kernel": jnp.zeros((3, 3, 2, 2))}
    assert as_plan(RULES[:1], other) == fg.plan(other, RULES[:1])


def test_a_plan_is_made_once_for_each_structure():
    """Also for other values, inside jit, and for rules that were put into another list."""
    plan = as_plan(RULES, PARAMS)
    assert as_plan(RULES, jax.tree.map(lambda x: x + 1, PARAMS)) is plan
    assert as_plan(tuple(RULES), jax.eval_shape(lambda: PARAMS)) is plan
    found = []
    jax.jit(lambda params: found.append(as_plan(RULES, params)))(PARAMS)
    assert found == [plan]
    assert found[0] is plan
    assert as_plan(RULES, jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)) is not plan
    assert as_plan([RULES[0], ("bias", None)], PARAMS) is not plan
    # An equal scheme is another rule: it may differ in what cannot be seen.
    assert as_plan([("kernel", fg.PIO([fg.Sphere(), fg.Stiefel()])), ("*", None)], PARAMS) is not plan


def test_rules_that_changed_make_another_plan():
    rules = list(RULES)
    before = as_plan(rules, PARAMS)
    rules[0] = ("kernel", fg.Each(fg.Sphere()))
    assert as_plan(rules, PARAMS) == fg.plan(PARAMS, rules)
    assert as_plan(rules, PARAMS) != before


def test_an_iterator_is_read_once():
    rules = as_rules(rule for rule in RULES)
    assert as_plan(rules, PARAMS) is as_plan(rules, PARAMS)
    assert as_plan(rules, PARAMS) == fg.plan(PARAMS, RULES)


FACTORIES = {
    "project": fg.project,
    "normalize_by_zeta": fg.normalize_by_zeta,
    "steepest": fg.steepest,
    "retract": fg.retract,
    "rescale": fg.rescale,
    "fgsgd": lambda rules: fg.fgsgd(0.1, rules, momentum=0.9),
    "on_manifolds": lambda rules: fg.on_manifolds(optax.adam(0.1), rules),
    "riemannian_adam": lambda rules: fg.riemannian_adam(0.1, rules),
    "spel": lambda rules: fg.spel(0.1, rules),
    "manifold_muon": lambda rules: fg.manifold_muon(0.1, rules),
    "hyperball": lambda rules: fg.hyperball(optax.adam(0.1), rules),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_every_factory_reads_an_iterator_once(name, lenient_promotion):
    tx = FACTORIES[name](rule for rule in RULES)
    state = jax.eval_shape(tx.init, PARAMS)
    updates, _ = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)


def test_rules_may_be_predicates_without_a_hash():
    class Kernels:
        def __call__(self, path, leaf):
            return path.endswith("kernel")

        def __eq__(self, other):
            return True

        __hash__ = None

    rules = [(Kernels(), fg.Each(fg.Sphere())), ("*", None)]
    assert as_plan(rules, PARAMS) is as_plan(rules, PARAMS)
    assert as_plan([(lambda path, leaf: True, None)], PARAMS) != as_plan(rules, PARAMS)


def test_not_too_many_are_kept(monkeypatch):
    monkeypatch.setattr(_as_plan, "_plans", {})
    monkeypatch.setattr(_as_plan, "_MOST", 2)
    first, second, third = ({"kernel": jnp.zeros((3, 3, 4, n))} for n in (1, 2, 3))
    kept = as_plan(RULES[:1], second)
    before = as_plan(RULES[:1], first)
    assert as_plan(RULES[:1], second) is kept
    as_plan(RULES[:1], third)
    assert as_plan(RULES[:1], first) is before
    assert as_plan(RULES[:1], second) is not kept
    assert len(_as_plan._plans) == 2


@pytest.mark.parametrize("rules", [[("kernel",)], ["kernel"], [("kernel", fg.Sphere())], [(3, None)]], ids=str)
def test_what_are_no_rules(rules):
    with pytest.raises(TypeError, match="rule"):
        as_rules(rules)
