"""What a state holds for each parameter has the tree of the parameters, so that rules for parameters apply to it."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest
from chains import chained
from networks import SMALL_RULES, SMALL_SHAPES, flat, gaussians, small_network

import fgsgd_jax as fg

# Beside each the number of arrays that it keeps for a parameter.
OPTIMIZERS = {
    "fgsgd": (lambda plan: fg.fgsgd(0.1, plan), 0),
    "fgsgd with momentum": (lambda plan: fg.fgsgd(0.1, plan, momentum=0.9, rescaling=fg.Rescaling(every=2)), 1),
    "chain": (lambda plan: chained(plan, 0.1, 0.9, rescaling=fg.Rescaling(every=2)), 1),
    "project": (fg.project, 0),
    "on_manifolds": (lambda plan: fg.on_manifolds(optax.adam(0.1), plan), 2),
    "steepest": (fg.steepest, 0),
    "hyperball": (lambda plan: fg.hyperball(optax.adam(0.1), plan), 2),
    "riemannian_adam": (lambda plan: fg.riemannian_adam(0.1, plan), 2),
}
pytestmark = pytest.mark.usefixtures("lenient_promotion")
CASES = pytest.mark.parametrize(("make", "copies"), OPTIMIZERS.values(), ids=OPTIMIZERS)


@functools.cache
def moved(make):
    """An optimizer, parameters and a state in which no array of numbers is zero."""
    params, plan = small_network()
    tx = optax.with_extra_args_support(make(plan))
    _, state = jax.jit(tx.update)(gaussians(SMALL_SHAPES, "float32", 3), tx.init(params), params)
    return tx, params, state


@CASES
def test_what_is_kept_for_parameters_is_mapped(make, copies):
    """As Optax's common test does: nothing of a state is lost, and nothing else is touched."""
    tx, params, state = moved(make)
    chex.assert_trees_all_equal(optax.tree_utils.tree_map_params(tx, lambda leaf: leaf, state), state)

    names = jax.tree_util.tree_map_with_path(lambda path, _: "/".join(k.key for k in path), params)
    seen = []

    def mapped(leaf, name):
        seen.append((name, leaf.shape))
        return 2 * leaf

    doubled = optax.tree_utils.tree_map_params(tx, mapped, state, names)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    # By parameter, in its shape.
    shapes = [(name, np.shape(leaf)) for name, leaf in flat(params).items()]
    assert sorted(seen) == sorted(copies * shapes)
    changed = sum(
        bool(np.any(np.asarray(a) != np.asarray(b)))
        for a, b in zip(jax.tree.leaves(doubled), jax.tree.leaves(state), strict=True)
    )
    assert changed == len(seen)


@CASES
def test_what_is_not_kept_for_parameters_is_told_apart(make, copies):
    """As where shardings are chosen: by the parameter's rule, and one for all else."""
    tx, params, state = moved(make)
    rules = jax.tree.map(lambda leaf: f"like {leaf.shape}", params)
    chosen = optax.tree_utils.tree_map_params(
        tx, lambda _, rule: rule, state, rules, transform_non_params=lambda _: "other"
    )
    leaves = jax.tree.leaves(chosen)
    assert len(leaves) == len(jax.tree.leaves(state))
    for leaf, kept in zip(leaves, jax.tree.leaves(state), strict=True):
        assert leaf in ("other", f"like {kept.shape}")
    assert leaves.count("other") == len(leaves) - copies * len(SMALL_SHAPES)


@CASES
def test_the_state_is_the_same_for_rules_in_the_place_of_a_plan(make, copies):
    params, plan = small_network()
    chex.assert_trees_all_equal(make(plan).init(params), make(SMALL_RULES).init(params))
