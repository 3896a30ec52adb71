"""The compiled update: what is a constant in it, what it is compiled for, and how it grows."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import chained
from networks import MIXED, SHAPES, SMALL_SHAPES, flat, gaussians, network, small_network

import fgsgd_jax as fg


def constants(lowered):
    """Element counts of the constants written out in a lowered program; splats, which take no room, left out."""
    sizes = []
    for dims in re.findall(r"stablehlo\.constant dense<(?:\"0x|\[)[^>]*> : tensor<([0-9x]*)x?[a-z]", lowered.as_text()):
        sizes.append(int(np.prod([int(d) for d in dims.split("x") if d] or [1])))
    return sizes


def test_constants_finds_constants():
    table = np.arange(1000)
    lowered = jax.jit(lambda x: x + jnp.asarray(table)).lower(jnp.zeros(1000, int))
    hidden = len(jax.make_jaxpr(lambda x: x + jnp.asarray(table))(jnp.zeros(1000, int)).consts)
    assert max(constants(lowered), default=0) >= 1000 or hidden


@pytest.mark.parametrize("make", [fg.fgsgd, pytest.param(chained, marks=pytest.mark.slow)], ids=["fgsgd", "chain"])
def test_nothing_of_the_plans_size_is_a_constant(make):
    params = {"kernel": jnp.zeros((3, 3, 24, 40), jnp.float32), "other": jnp.zeros((3, 3, 7, 5), jnp.float32)}
    plan = fg.plan(params, [("*", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()]))])
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = make(plan=plan, **{"learning_rate" if make is fg.fgsgd else "rate": 0.1}, momentum=0.9)
    state = tx.init(params)
    # Small tables are fine (a plan has 4 manifolds); 7 x 5 slices are not.
    assert max(constants(jax.jit(tx.update).lower(params, state, params)), default=0) < 35
    closed_over = jax.make_jaxpr(tx.update)(params, state, params).consts
    assert max((np.size(c) for c in closed_over), default=0) < 35
    # The state is where it is instead, and it is all arrays: a checkpoint holds it.
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(state)) >= 24 * 40
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("make", [fg.fgsgd, pytest.param(chained, marks=pytest.mark.slow)], ids=["fgsgd", "chain"])
def test_plans_of_two_seeds_share_a_program(make):
    def setting(seed):
        params, plan = small_network(seed)
        return (
            params,
            plan,
            make(plan=plan, **{"learning_rate" if make is fg.fgsgd else "rate": 0.1}, momentum=0.9),
        )

    grads = gaussians(SMALL_SHAPES, "float32", 3)
    (params_0, plan_0, tx_0), (params_1, plan_1, tx_1) = setting(0), setting(1)
    assert np.any(np.asarray(plan_0["conv/kernel"].member) != np.asarray(plan_1["conv/kernel"].member))
    step = jax.jit(tx_0.update)
    state_0, state_1 = tx_0.init(params_0), tx_1.init(params_1)
    chex.assert_trees_all_equal_structs(state_0, state_1)
    first, _ = step(grads, state_0, params_0)
    assert step._cache_size() == 1
    # The compiled program of seed 0, given seed 1's state, does what seed 1's own does.
    shared, state_1 = step(grads, state_1, params_1)
    own, _ = jax.jit(tx_1.update)(grads, tx_1.init(params_1), params_1)
    assert step._cache_size() == 1
    chex.assert_trees_all_close(shared, own, rtol=0, atol=1e-6)
    assert np.max(np.abs(flat(shared)["conv/kernel"] - flat(first)["conv/kernel"])) > 1e-3
    # Nor does a second step compile again: the state's types are stable, weak ones included.
    step(grads, state_1, optax.apply_updates(params_1, shared))
    assert step._cache_size() == 1


def test_the_program_does_not_grow_with_layers():
    """Slices of one shape are handled together, whatever layer they are from."""

    def operations(depth):
        shapes = [(3, 3, 4, 24 + 8 * (i % 3)) for i in range(depth)]
        params = {f"conv{i}/kernel": jax.ShapeDtypeStruct(shape, "float32") for i, shape in enumerate(shapes)}
        tx = fg.fgsgd(0.1, fg.plan(params, MIXED), momentum=0.9)
        text = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).as_text()
        return len(re.findall(r"stablehlo\.(dot_general|while|case|if|rsqrt|sqrt|custom_call)\b", text))

    assert 0 < operations(6) == operations(12)


@pytest.mark.slow
def test_update_runs_under_vmap():
    """Two replicas of one plan, trained side by side."""
    params, plan = network()
    tx = fg.fgsgd(0.1, plan, momentum=0.9)
    grads = [gaussians(SHAPES, "float64", number) for number in (3, 4)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    together, _ = jax.vmap(lambda g: tx.update(g, tx.init(params), params))(both)
    for i in range(2):
        alone, _ = tx.update(grads[i], tx.init(params), params)
        chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[i], together), alone, rtol=0, atol=1e-12)  # noqa: B023


def test_a_state_may_be_donated():
    """No two of its leaves are one buffer, which XLA refuses to be given twice."""
    params, plan = network()
    rescaling = fg.Rescaling(every=2, warmup=(2, 4))
    for tx in (
        fg.fgsgd(0.1, plan, momentum=0.9, rescaling=rescaling),
        fg.rescale(plan, rescaling),
        fg.on_manifolds(optax.adam(0.1), plan, rescaling=rescaling),
        fg.riemannian_adam(0.1, plan, rescaling=rescaling),
    ):
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tx.init(params)) if leaf.size]
        assert len(set(buffers)) == len(buffers)
