"""Long trainings do not drift; the same seed gives the same weights, and the same plan everywhere."""

from pathlib import Path

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import chained

import fgsgd_jax as fg

GOLDEN = Path(__file__).with_name("golden_plan.json")
MANIFOLDS = [fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()]
NAMES = ["sphere", "oblique", "stiefel", "euclidean"]


def mixed(shape):
    params = {"kernel": jnp.zeros(shape, jnp.float32)}
    plan = fg.plan(params, [("*", fg.PIO(MANIFOLDS))])
    return fg.initialize(jax.random.key(0), params, plan), plan


def worst_of(kernel, collection):
    """By the definition, at the plan's own radius, in float64."""
    kernel = np.moveaxis(np.asarray(kernel, np.float64), (0, 1), (2, 3))
    return max(
        float(np.max(h.violation(name, kernel[collection.member == number], collection.gamma)))
        for number, name in enumerate(NAMES)
    )


@pytest.mark.slow
def test_a_million_steps_do_not_drift(record_property):
    """In float32, with momentum, at steps up to several radii: the size of the test of ten thousand."""
    params, plan = mixed((3, 3, 5, 6))
    start = params["kernel"]
    tx = fg.fgsgd(0.5, plan, momentum=0.9)
    gradients = jax.random.normal(jax.random.key(1), (1000, *start.shape), jnp.float32)

    def step(carry, g):
        params, state, longest = carry
        updates, state = tx.update({"kernel": g}, state, params)
        longest = jnp.maximum(longest, fg.metrics(state)["kernel"].step_ratio)
        return (optax.apply_updates(params, updates), state, longest), None

    @jax.jit
    def hundred_thousand(params, state, key):
        def thousand(number, carry):
            # Another order of signs each time, so that no cycle is closed.
            sign = jnp.sign(jax.random.normal(jax.random.fold_in(key, number), (1000, 1, 1, 1, 1), jnp.float32))
            return jax.lax.scan(step, carry, sign * gradients)[0]

        return jax.lax.fori_loop(0, 100, thousand, (params, state, jnp.zeros((), jnp.float32)))

    state, worst, longest = tx.init(params), 0.0, 0.0
    before = np.asarray(fg.radii(state)["kernel"])
    for number in range(10):
        params, state, ratio = hundred_thousand(params, state, jax.random.key(number))
        worst, longest = max(worst, worst_of(params["kernel"], plan["kernel"])), max(longest, float(ratio))
        assert worst <= 1e-6, f"after {100_000 * (number + 1)} steps"
    np.testing.assert_array_equal(fg.radii(state)["kernel"], before)
    bound = np.asarray(plan["kernel"].member) != 3
    assert np.all(np.any(np.asarray(params["kernel"] != start), axis=(0, 1)))
    assert np.all(before[bound] == np.float32(plan["kernel"].gamma))
    assert longest > 1
    record_property("steps", 1_000_000)
    record_property("worst violation", worst)


# --- determinism


def descending(tx, target):
    def step(_, carry):
        params, state = carry
        grads = jax.tree.map(lambda x, t: x - t, params, target)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


OPTIMIZERS = {
    "fgsgd": lambda plan: fg.fgsgd(0.1, plan, momentum=0.9),
    "chain": lambda plan: chained(plan, 0.1, 0.9),
    "adam": lambda plan: fg.on_manifolds(optax.adam(0.01), plan),
    "riemannian_adam": lambda plan: fg.riemannian_adam(0.01, plan),
}


def in_python(step, carry):
    step = jax.jit(step)
    for number in range(50):
        carry = step(number, carry)
    return carry


def in_a_compiled_loop(step, carry):
    return jax.jit(lambda carry: jax.lax.fori_loop(0, 50, step, carry))(carry)


def in_a_scan(step, carry):
    return jax.jit(
        lambda carry: jax.lax.scan(lambda carry, number: (step(number, carry), None), carry, jnp.arange(50))
    )(carry)[0]


def trained(loop, shape, optimizer):
    """The weights and the state after 50 steps, everything made anew."""
    params, plan = mixed(shape)
    tx = optimizer(plan)
    return loop(descending(tx, {"kernel": jnp.ones(shape, jnp.float32)}), (params, tx.init(params)))


# Slow, since that is compiled as users compile: without LLVM's optimization the loops round differently.
@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_seed_gives_the_same_bits_whatever_runs_the_loop(name, lenient_promotion, record_property):
    shape = (3, 3, 3, 4)
    first = trained(in_python, shape, OPTIMIZERS[name])
    assert np.any(np.asarray(first[0]["kernel"]) != np.asarray(mixed(shape)[0]["kernel"]))
    for loop in (in_python, in_a_compiled_loop, in_a_scan):
        jax.tree.map(np.testing.assert_array_equal, first, trained(loop, shape, OPTIMIZERS[name]))
    record_property("trainings equal bit for bit", 4)


@pytest.mark.slow
def test_compiled_loops_over_other_shapes_agree_to_the_last_digits(record_property):
    """XLA rounds these in another way inside of a loop; a small rate does not let that grow."""
    loops = (in_python, in_a_compiled_loop, in_a_scan)
    first, *others = (
        trained(loop, (5, 5, 4, 6), lambda plan: fg.fgsgd(0.001, plan, momentum=0.9))[0]["kernel"] for loop in loops
    )
    worst = max(float(np.max(np.abs(np.asarray(other) - np.asarray(first)))) for other in others)
    assert worst <= 1e-7
    record_property("worst difference of loops", worst)


def plan_of_every_kind():
    """Every scheme, views of every sort, stated radii, remainders and scarce rows."""
    params = {
        "stem": jnp.zeros((3, 3, 1, 5)),
        "conv": {"kernel": jnp.zeros((3, 3, 7, 5)), "bias": jnp.zeros(5)},
        "rows": jnp.zeros((3, 2, 4, 7)),
        "columns": jnp.zeros((2, 3, 7, 4)),
        "filters": jnp.zeros((3, 3, 4, 6)),
        "heads": jnp.zeros((8, 2, 4)),
        "tiles": jnp.zeros((8, 12)),
        "dense": jnp.zeros((9, 4)),
        "own": jnp.zeros((3, 3, 2, 3)),
    }
    member, group = np.array([[0, 1, 0], [1, 0, 0]]), np.array([[0, 1, 0], [1, 2, 2]])
    rules = [
        ("stem", fg.PIO([fg.Sphere(), fg.Stiefel(), fg.Oblique()])),
        ("conv/kernel", fg.PIO([fg.Sphere(radius=0.25), fg.Stiefel(retraction="cayley"), fg.Euclidean()])),
        ("rows", fg.PI([fg.Sphere(), fg.Oblique(), fg.Stiefel()])),
        ("columns", fg.PO([fg.Stiefel(), fg.Sphere()])),
        ("filters", fg.Each(fg.Sphere(), view="h w i o -> 1 o (h w i) 1")),
        ("heads", fg.Each(fg.Stiefel(), view="e h d -> 1 h e d")),
        ("tiles", fg.PO([fg.Oblique(), fg.Stiefel(retraction="qr")], view="(i a) (o b) -> i o a b", a=4, b=4)),
        ("dense", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")),
        ("own", fg.Custom([fg.Sphere(), fg.Stiefel()], member, group)),
        ("*", None),
    ]
    return fg.plan(params, rules, seed=20191208)


def test_the_plan_is_the_golden_one():
    """Written once; a plan that a platform or a version deals otherwise would break every checkpoint."""
    golden = fg.Plan.from_json(GOLDEN.read_text(encoding="utf-8"))
    assert golden.difference(plan_of_every_kind()) is None
    assert len(golden.collections) == 9
