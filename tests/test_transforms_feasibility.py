"""Weights stay on their manifolds, and what is on none is moved as Optax moves it."""

import chex
import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from chains import chained
from networks import (
    MIXED,
    SHAPES,
    SMALL_SHAPES,
    falling,
    flat,
    gaussians,
    in_dtype,
    layers_of,
    nested,
    network,
    run,
    slope_of_loss,
    small_network,
    worst_violation,
)

import fgsgd_jax as fg

# --- feasibility


@pytest.mark.parametrize("dtype", ["float32"])
def test_ten_thousand_steps_with_momentum_stay_on_the_manifold(dtype):
    """Radius-relative, at the plan's own radius: a radius that random-walked by round-off would show."""
    params = {"kernel": jnp.zeros((3, 3, 5, 6), dtype)}
    plan = fg.plan(params, MIXED)
    params = fg.initialize(jax.random.key(0), params, plan)
    layers = layers_of(params, plan)
    tx = fg.fgsgd(0.1, plan, momentum=0.9)

    def step(carry, key):
        params, state = carry
        grads = {"kernel": jax.random.normal(key, params["kernel"].shape, dtype)}
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def thousand(params, state, key):
        return jax.lax.scan(step, (params, state), jax.random.split(key, 1000))[0]

    state, start = tx.init(params), params
    for i in range(10):
        params, state = thousand(params, state, jax.random.key(i))
        assert worst_violation(params, layers) <= 1e-6, f"after {1000 * (i + 1)} steps"
    assert np.max(np.abs(params["kernel"] - start["kernel"])) > 0.01
    assert float(jax.tree.leaves(fg.violation(params, plan))[0]) <= 1e-6


# Slow, since that is compiled as users compile. Without LLVM's optimization a fused loop computes ω + v twice, once
# with a contracted multiplication and once without: where v is what a projection leaves of a vector 100 times as long,
# a column of an oblique matrix is then normalized to 2.4e-6.
@pytest.mark.slow
@pytest.mark.parametrize("retraction", h.RETRACTIONS)
@pytest.mark.parametrize("momentum", [None, 0.99])
def test_small_radii_and_steps_far_larger(retraction, momentum):
    """Steps of a thousand radii and more, as a high rate on a small gamma gives."""
    params = {"kernel": jnp.zeros((3, 3, 5, 6), jnp.float32), "wide": jnp.zeros((2, 5, 3, 4), jnp.float32)}
    stiefel = fg.Stiefel(retraction=retraction)
    plan = fg.plan(params, [("*", fg.PIO([fg.Sphere(), fg.Oblique(), stiefel]))], gamma=0.004)
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = fg.fgsgd(10.0, plan, momentum=momentum)

    @jax.jit
    def step(params, state, key):
        grads = {
            name: jax.random.normal(jax.random.fold_in(key, i), params[name].shape, jnp.float32)
            for i, name in enumerate(params)
        }
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, largest = tx.init(params), 0.0
    for i in range(30):
        params, state = step(params, state, jax.random.key(i))
        assert worst_violation(params, layers_of(params, plan)) <= 1e-6
        largest = max(largest, *(float(np.max(m.step_ratio)) for m in fg.metrics(state).values()))
    assert largest > 300  # the steps were as long as this test says


@pytest.mark.slow
def test_bf16_parameters_reach_bf16_roundoff():
    params, plan = network(dtype="bfloat16")
    rng = np.random.default_rng(0)
    tx = fg.fgsgd(0.1, plan, momentum=0.9)
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(30):
        grads = nested({p: jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for p, s in SHAPES.items()})
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal_dtypes(params, updates, grads)
    # Half a unit in the last place, relative, of each entry of a slice: at most 2 sqrt(15) 2^-9 in a Gram matrix.
    assert worst_violation(params, layers_of(params, plan)) <= 2 * 15**0.5 * 2.0**-9


# --- the parameters that are not constrained


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rate", [0.1, falling(20)], ids=["constant", "falling"])
def test_a_plan_of_none_is_sgd_exactly(momentum, nesterov, rate):
    params = gaussians(SHAPES, "float32")
    plan = fg.plan(params, [("*", None)])

    def gradients(params):
        return in_dtype(slope_of_loss(in_dtype(params, "float64")), "float32")

    mine, _ = run(fg.fgsgd(rate, plan, momentum=momentum, nesterov=nesterov), params, gradients, 10)
    theirs, _ = run(optax.sgd(rate, momentum, nesterov), params, gradients, 10)
    chex.assert_trees_all_equal(mine, theirs)
    linked, _ = run(chained(plan, rate, momentum, nesterov), params, gradients, 10)
    chex.assert_trees_all_equal(linked, theirs)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_leaf_without_a_gradient_is_left_alone(momentum):
    params, plan = small_network()
    tx, gradients = fg.fgsgd(0.1, plan, momentum=momentum), gaussians(SMALL_SHAPES, "float32", 3)
    update = jax.jit(tx.update)

    def without_bias(tree):
        return tree | {"conv": tree["conv"] | {"bias": None}}

    all_updates, _ = update(gradients, tx.init(params), params)
    updates, state = update(without_bias(gradients), tx.init(params), params)
    chex.assert_trees_all_equal(updates, without_bias(all_updates))
    # Its momentum is where it was, for a gradient that comes later.
    chex.assert_trees_all_equal_structs(state, tx.init(params))
    update(gradients, state, params)


def test_every_link_passes_unconstrained_leaves_untouched():
    params, plan = small_network()
    grads = gaussians(SMALL_SHAPES, "float32", 3)
    for link in (fg.project(plan), fg.normalize_by_zeta(plan), fg.retract(plan), fg.rescale(plan)):
        updates, _ = jax.jit(link.update)(grads, link.init(params), params)
        for path in ("conv/bias", "dense/bias"):
            np.testing.assert_array_equal(flat(updates)[path], flat(grads)[path])


def test_weight_decay_acts_on_euclidean_leaves_only():
    shapes = {"kernel": (3, 3, 2, 4), "dense": (4, 3), "bias": (3,)}
    params, grads = gaussians(shapes, "float64", 2), gaussians(shapes, "float64", 3)
    plan = fg.plan(params, [("kernel", fg.Each(fg.Sphere())), ("*", None)])
    params = fg.initialize(jax.random.key(0), params, plan)

    def constant(_):
        return grads

    plain, _ = run(fg.fgsgd(0.1, plan, momentum=0.9), params, constant, 3)
    decayed, _ = run(fg.fgsgd(0.1, plan, momentum=0.9, weight_decay=0.1), params, constant, 3)
    expected, _ = run(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9)), params, constant, 3)
    for path in shapes:
        theirs = expected if plan[path] is None else plain
        np.testing.assert_allclose(decayed[path], theirs[path], rtol=1e-12)
    assert np.max(np.abs(decayed["dense"] - plain["dense"])) > 1e-3


@pytest.mark.slow
def test_mask_and_labels_follow_the_plan(lenient_promotion):
    params, plan = network()
    mask, labels = flat(plan.mask()), flat(plan.labels())
    for path in SHAPES:
        assert mask[path] is (plan[path] is None)
        assert labels[path] == ("euclidean" if plan[path] is None else "manifold")
    # What they are for.
    tx = optax.partition({"manifold": fg.fgsgd(0.1, plan, momentum=0.9), "euclidean": optax.adam(1e-3)}, plan.labels())
    grads = gaussians(SHAPES, "float64", 3)
    moved, _ = run(tx, params, lambda _: grads, 3)
    adam, _ = run(optax.adam(1e-3), params, lambda _: grads, 3)
    fine, _ = run(fg.fgsgd(0.1, plan, momentum=0.9), params, lambda _: grads, 3)
    for path in SHAPES:
        expected = adam if plan[path] is None else fine
        np.testing.assert_allclose(flat(moved)[path], flat(expected)[path], rtol=0, atol=1e-12)


def test_euclidean_members_get_zeta_and_nothing_else():
    params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 4, 6)))}
    plan = fg.plan(params, [("kernel", fg.PI([fg.Stiefel(), fg.Euclidean()]))])
    initialized = fg.initialize(jax.random.key(0), params, plan)
    member, group = np.asarray(plan["kernel"].member), np.asarray(plan["kernel"].group)
    flatland = np.array([isinstance(m, fg.Euclidean) for m in plan["kernel"].manifolds])[member]
    assert flatland.sum() == 12
    before, after = (np.asarray(tree["kernel"])[:, :, flatland] for tree in (params, initialized))
    np.testing.assert_array_equal(before, after)  # left as given

    grads = {"kernel": jnp.asarray(np.random.default_rng(1).standard_normal((3, 3, 4, 6)))}
    for tx in (fg.fgsgd(0.1, plan), chained(plan, 0.1)):
        moved, _ = run(tx, initialized, lambda _: grads, 1)
        squares = np.sum(np.asarray(grads["kernel"]) ** 2, axis=(0, 1))
        for number in np.unique(group[flatland]):
            here = group == number
            z = reference.zeta(np.sqrt(np.sum(squares[here])))
            assert z > 1
            expected = np.asarray(initialized["kernel"])[:, :, here] - 0.1 * np.asarray(grads["kernel"])[:, :, here] / z
            np.testing.assert_allclose(np.asarray(moved["kernel"])[:, :, here], expected, rtol=1e-12)
