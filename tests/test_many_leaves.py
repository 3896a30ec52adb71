"""Hundreds and thousands of parameters: programs grow with the number of shapes, not of leaves."""

import contextvars
import re
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import chained

import fgsgd_jax as fg
from fgsgd_jax import kernels
from fgsgd_jax.groups import _weights
from fgsgd_jax.kernels import _by_platform, _layers

OPTIMIZERS = {
    "fgsgd": lambda plan: fg.fgsgd(0.1, plan, 0.9, rescaling=fg.Rescaling(every=2)),
    "fgsgd, decaying": lambda plan: fg.fgsgd(0.1, plan, weight_decay=0.1),
    "chain": lambda plan: chained(plan, 0.1, 0.9),
    "on_manifolds": lambda plan: fg.on_manifolds(optax.adam(0.05), plan),
    "riemannian_adam": lambda plan: fg.riemannian_adam(0.05, plan),
}
# More than are stacked at a time.
FEW = 9


def many(count, matrix=(4, 3), conv=(2, 2, 2, 3), dtype="float32"):
    """`count` matrices and as many kernels, some of them Euclidean alone."""
    rng = np.random.default_rng(0)
    shapes = {"m": matrix, "k": conv, "e": matrix}
    params = {
        f"{name}{n}": jnp.asarray(rng.standard_normal(shape), dtype)
        for n in range(count)
        for name, shape in shapes.items()
    }
    rules = [
        ("m*", fg.Whole(fg.Stiefel())),
        ("k*", fg.PIO([fg.Sphere(), fg.Stiefel(), fg.Euclidean()])),
        ("e*", fg.Whole(fg.Euclidean())),
    ]
    plan = fg.plan(params, rules)
    return fg.initialize(jax.random.key(0), params, plan), plan


def steps(tx, params, count=2):
    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda x: jnp.sin(3 * x), params)
        # The gradient of one leaf is refused.
        grads["m0"] = grads["m0"] * jnp.asarray(jnp.nan, params["m0"].dtype)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(count):
        params, state = step(params, state)
    return params, state


@pytest.mark.usefixtures("lenient_promotion")
@pytest.mark.parametrize(
    "name", [name if name == "fgsgd" else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]
)
def test_many_leaves_step_as_few_do(name, monkeypatch):
    """Each as if it were alone, also one whose gradient is refused, in states of the same structure."""
    params, plan = many(FEW)
    tx = OPTIMIZERS[name](plan)
    expected = steps(tx, params)
    monkeypatch.setattr(_layers, "_FEWEST", FEW)
    assert kernels.are_many(FEW, (4, 3))
    found = steps(tx, params)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=2e-6)
    chex.assert_trees_all_equal_dtypes(found, expected)
    assert int(fg.refused(found[1])["m0"]) == 2


@pytest.mark.parametrize("count", [64, 65, 100])
def test_packing_is_undone(count):
    parts = [jnp.full((2, 3), float(n)) for n in range(count)]
    together = jax.jit(lambda parts: kernels.pack(parts))(parts)
    np.testing.assert_array_equal(together, np.stack(parts))
    chex.assert_trees_all_equal(jax.jit(kernels.unpack)(together), parts)


def test_leaves_of_two_dtypes_are_not_packed(monkeypatch):
    monkeypatch.setattr(_layers, "_FEWEST", 4)
    params = {str(n): jnp.eye(3, dtype=("float32", "bfloat16")[n % 2]) for n in range(6)}
    plan = fg.plan(params, [("*", fg.Whole(fg.Stiefel()))])
    tx = fg.fgsgd(0.1, plan)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(updates, params)


def kernels_of(tx, params):
    """The different fused computations of a compiled update, whatever their names: equal ones are one kernel."""
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()

    def unnamed(body):
        names = {}
        body = re.sub(r", metadata=\{[^}]*\}", "", body)
        return re.sub(r"%[\w.-]+", lambda name: names.setdefault(name[0], f"%{len(names)}"), body)

    return {unnamed(body) for body in re.findall(r"(?ms)^%fused_computation\S* [^\n]*\n(.*?)^\}", text)}


def test_arrays_on_several_devices_are_not_packed(monkeypatch):
    """In the program that is lowered; in a process of many devices most programs may be for one."""
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not kernels.are_many(100, (4, 3))
    for is_shared in (False, True):
        program = contextvars.copy_context()
        program.run(_by_platform._SHARED.set, is_shared)
        assert program.run(kernels.are_many, 100, (4, 3)) != is_shared


def test_the_kernels_of_an_update_do_not_grow_with_the_leaves(monkeypatch):
    monkeypatch.setattr(_layers, "_FEWEST", 32)
    found = []
    for count in (32, 64):
        params = {str(n): jnp.eye(3) + jnp.zeros((3, 3)) for n in range(count)}
        plan = fg.plan(params, [("*", fg.Whole(fg.Stiefel()))])
        found.append(len(kernels_of(fg.fgsgd(0.1, plan, 0.9), params)))
    assert found[1] <= found[0] + 2


def test_programs_that_draw_and_move_weights_are_shared():
    """By all leaves of a shape, a few at a time; and each is drawn as it is alone."""
    params = {f"layer_{n}": jnp.full((5, 2), n + 1.0, jnp.float32) for n in range(40)}
    plan = fg.plan(params, [("*", fg.Whole(fg.Stiefel()))])
    programs = [_weights._uniform, _weights._nearest, _weights._violation]
    before = [program._cache_size() for program in programs]
    drawn = fg.initialize(jax.random.key(0), params, plan)
    fg.nearest(drawn, plan)
    assert len(fg.violation(drawn, plan)) == 40
    assert [program._cache_size() for program in programs] == [size + 1 for size in before]
    alone = {"layer_7": params["layer_7"]}
    one = fg.initialize(jax.random.key(0), alone, [("*", fg.Whole(fg.Stiefel()))])
    np.testing.assert_allclose(drawn["layer_7"], one["layer_7"], atol=1e-6)


def test_parts_are_stacked_and_sliced_by_calls_that_stay():
    """XLA on CPU would inline them, and compile a kernel for each: four times as long with thousands of leaves."""
    parts = [jnp.full((2, 3), float(n)) for n in range(100)]
    text = jax.jit(lambda parts: kernels.unpack(2 * kernels.pack(parts))).lower(parts).compile().as_text()
    assert len(re.findall(r" call\(", text)) == -(-100 // _layers._STACKED) + -(-100 // _layers._SLICED)


@pytest.mark.slow
def test_the_time_of_many_leaves(record_property):
    """Seconds of the processor; to compile, no more than XLA takes for the updates by optax.adam."""

    def seconds(call):
        start = time.process_time()
        jax.block_until_ready(call())
        return time.process_time() - start

    params = {f"layer_{n}": jnp.eye(8, dtype=jnp.float32) for n in range(3000)}
    plan = fg.plan(params, [("*", fg.Each(fg.Stiefel()))])
    assert seconds(lambda: fg.initialize(jax.random.key(0), params, plan)) <= 5
    assert seconds(lambda: fg.nearest(params, plan)) <= 5

    def to_compile(tx):
        with jax.numpy_dtype_promotion("standard"):
            lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
        return seconds(lambda: lowered.compile() and jnp.zeros(()))

    taken, by_adam = (to_compile(tx) for tx in (fg.fgsgd(0.1, plan, momentum=0.9), optax.adam(0.1)))
    record_property("worst share of optax.adam's time to compile 3,000 leaves", taken / by_adam)
    assert taken <= by_adam
