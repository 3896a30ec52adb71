"""The links under other optimizers, the wrappers of Optax and Flax, and wrong use."""

import re

import chex
import helpers as h
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from chains import chained
from networks import MIXED, SHAPES, flat, gaussians, kernel_slices, layers_of, nested, network, run, worst_violation

import fgsgd_jax as fg

# --- other optimizers and wrappers


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner",
    [optax.adamw(1e-2), optax.sgd(0.1, 0.9), optax.rmsprop(1e-2), optax.lion(1e-3)],
    ids=["adamw", "sgd", "rmsprop", "lion"],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_any_optimizer_on_manifolds(inner, dtype, lenient_promotion):
    params, plan = network(dtype=dtype)
    grads = gaussians(SHAPES, dtype, 3)
    moved, state = run(fg.on_manifolds(inner, plan), params, lambda _: grads, 20)
    plain, _ = run(inner, params, lambda _: grads, 20)
    assert worst_violation(moved, layers_of(params, plan)) <= 1e-6
    chex.assert_trees_all_equal_dtypes(moved, params)
    for path in SHAPES:
        if plan[path] is None:
            np.testing.assert_allclose(flat(moved)[path], flat(plain)[path], rtol=1e-6, atol=1e-7)
        else:
            assert np.max(np.abs(flat(moved)[path] - flat(params)[path])) > 1e-3
    assert set(fg.radii(state)) == {path for path in SHAPES if plan[path] is not None}


def test_descent():
    """It optimizes: the nearest rotation to a matrix is found, to round-off, by fgsgd and by adam on the manifold."""
    target = h.point("stiefel", np.random.default_rng(0), (4, 4))
    params = {"w": jnp.zeros((4, 4))}
    plan = fg.plan(params, [("w", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o"))])
    start = {
        "w": jnp.asarray(h.retract("stiefel", "polar", target, h.tangent("stiefel", np.random.default_rng(1), target)))
    }

    def gradients(params):
        return {"w": params["w"] - jnp.asarray(target)}

    for tx in (fg.fgsgd(0.5, plan), fg.on_manifolds(optax.sgd(0.3), plan)):
        found, _ = run(tx, start, gradients, 100)
        np.testing.assert_allclose(found["w"], target, atol=1e-8)


@pytest.mark.slow
def test_multi_steps(lenient_promotion):
    """Accumulating four gradients is one step with their mean."""
    params, plan = network()
    tx = fg.fgsgd(0.1, plan, momentum=0.9)
    grads = [gaussians(SHAPES, "float64", number) for number in range(8)]
    wrapped = optax.MultiSteps(tx, 4).gradient_transformation()
    state, step, here = wrapped.init(params), jax.jit(wrapped.update), params
    for g in grads:
        updates, state = step(g, state, here)
        here = optax.apply_updates(here, updates)
    state, expected = tx.init(params), params
    for part in (grads[:4], grads[4:]):
        updates, state = tx.update(jax.tree.map(lambda *leaves: sum(leaves) / 4, *part), state, expected)
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(here, expected, rtol=0, atol=1e-7)  # MultiSteps averages in float32


@pytest.mark.slow
def test_inject_hyperparams(lenient_promotion):
    params, plan = network()
    grads = gaussians(SHAPES, "float64", 3)
    tx = optax.inject_hyperparams(fg.fgsgd)(learning_rate=0.1, plan=plan, momentum=0.9)
    state = tx.init(params)
    step = jax.jit(tx.update)
    first, state = step(grads, state, params)
    expected, _ = run(fg.fgsgd(0.1, plan, momentum=0.9), params, lambda _: grads, 1)
    chex.assert_trees_all_close(optax.apply_updates(params, first), expected, rtol=0, atol=1e-9)
    state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
    still, _ = step(grads, state, params)
    chex.assert_trees_all_close(still, jax.tree.map(jnp.zeros_like, params), rtol=0, atol=1e-12)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "options",
    [
        {"rescaling": fg.Rescaling(every=2, floor=0.9, max_change=1.5)},
        {"every": 2, "lambda_floor": 0.9, "max_change": 1.5},
    ],
    ids=["rescaling", "keywords of the first version"],
)
@pytest.mark.filterwarnings("ignore:.*is now.*:DeprecationWarning")
def test_inject_hyperparams_leaves_what_is_static(options):
    """As `every`, which no array can stand for; λ changes the radii as without it."""
    params = {"kernel": jnp.eye(4, 3, dtype=jnp.float32)}
    plan = fg.plan(params, [("*", fg.Whole(fg.Sphere()))])
    params = fg.nearest(params, plan)
    moments = {"kernel": fg.FeatureMoments(*(jnp.full(4, value, jnp.float32) for value in (10, 0, 40)))}

    def radii_after(tx):
        step = jax.jit(lambda state: tx.update(params, state, params, feature_moments=moments)[1])
        return fg.radii(step(step(tx.init(params))))["kernel"]

    found = radii_after(optax.inject_hyperparams(fg.fgsgd)(learning_rate=0.1, plan=plan, **options))
    np.testing.assert_array_equal(found, radii_after(fg.fgsgd(0.1, plan, **options)))
    assert np.all(found < 1)


@pytest.mark.parametrize("power", [0.6, 1.0])
def test_robbins_monro_diverges_and_converges(power):
    """Eq. 4: the rates sum to infinity, their squares do not. True of t^-power iff 1/2 < power <= 1."""
    schedule = fg.robbins_monro(0.3, power)
    assert float(schedule(0)) == pytest.approx(0.3)
    t = np.array([1e4, 1e5, 1e6]).astype(int)
    rates = np.array([float(schedule(int(i))) for i in t])
    assert h.slope(t.astype(float), rates) == pytest.approx(-power, abs=1e-2)
    jitted = jax.jit(schedule)(jnp.asarray(7))
    np.testing.assert_allclose(jitted, schedule(7), rtol=1e-6)


@pytest.mark.parametrize("power", [0.5, 1.1, -1.0])
def test_robbins_monro_refuses_other_powers(power):
    with pytest.raises(ValueError, match=str(power)):
        fg.robbins_monro(0.3, power)


# --- wrong use


@pytest.mark.parametrize("link", ["project", "retract", "rescale", "fgsgd", "on_manifolds"])
def test_update_without_params_names_the_remedy(link):
    params, plan = network()
    tx = {
        "project": fg.project(plan),
        "retract": fg.retract(plan),
        "rescale": fg.rescale(plan),
        "fgsgd": fg.fgsgd(0.1, plan),
        "on_manifolds": fg.on_manifolds(optax.sgd(0.1), plan),
    }[link]
    with pytest.raises(ValueError, match=r"params") as error:
        tx.update(params, tx.init(params))
    assert re.search(r"update\(.*params\)", str(error.value))


@pytest.mark.parametrize("make", [fg.fgsgd, pytest.param(chained, marks=pytest.mark.slow)], ids=["fgsgd", "chain"])
@pytest.mark.parametrize("broken", ["conv1/kernel", "dense/kernel"])
def test_params_off_the_manifold_are_an_error_at_init(make, broken):
    params, plan = network()
    tx = make(plan=plan, **{"learning_rate" if make is fg.fgsgd else "rate": 0.1})
    off = flat(params)
    off[broken] = off[broken] * 1.01
    with pytest.raises(ValueError) as error:
        tx.init(nested(off))
    assert broken in str(error.value)
    assert "initialize" in str(error.value)
    assert "nearest" in str(error.value)
    # Inside jit nobody can look at the numbers.
    jax.jit(tx.init)(nested(off))


def test_params_of_another_model_are_an_error_at_init():
    params, plan = network()
    for change in ("missing", "shape"):
        other = flat(params)
        if change == "missing":
            del other["conv1/kernel"]
        else:
            other["conv1/kernel"] = jnp.zeros((3, 3, 6, 9))
        with pytest.raises(ValueError, match="conv1/kernel"):
            fg.fgsgd(0.1, plan).init(nested(other))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rho": -1.0}, "rho"),
        ({"curvature": -1.0}, "curvature"),
    ],
    ids=str,
)
def test_bad_options_fail_when_built(options, named):
    _, plan = network()
    with pytest.raises(ValueError, match=named):
        fg.fgsgd(0.1, plan, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"every": 2.5},
        {"floor": -1.0},
        {"max_change": 1.0},
        {"max_change": -2.0},
        {"warmup": (0, 5)},
        {"warmup": 5},
    ],
    ids=str,
)
def test_bad_options_of_rescaling_fail_when_built(options, monkeypatch):
    # The suite's own type check would come first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=next(iter(options))):
        fg.Rescaling(**options)


# What 0.1 called the options, and what they are now.
OLD = {
    "every": ({"every": 2}, {"rescaling": fg.Rescaling(every=2)}),
    "all of them": (
        {"every": 2, "lambda_floor": 0.9, "max_change": 1.5, "warmup": (1, 1)},
        {"rescaling": fg.Rescaling(every=2, floor=0.9, max_change=1.5, warmup=(1, 1))},
    ),
    "radii": ({"radii": "fitted"}, {"initial_radii": "fitted"}),
}
OPTIMIZERS = {
    "fgsgd": lambda plan, **options: fg.fgsgd(0.1, plan, **options),
    "rescale": lambda plan, **options: optax.chain(fg.project(plan), fg.retract(plan), fg.rescale(plan, **options)),
    "on_manifolds": lambda plan, **options: fg.on_manifolds(optax.sgd(0.1), plan, **options),
    "riemannian_adam": lambda plan, **options: fg.riemannian_adam(0.1, plan, **options),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", OLD.values(), ids=OLD)
def test_keywords_of_the_first_version_warn_and_give_the_same(name, options):
    old, new = options
    params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)}
    plan = fg.plan(params, [("*", fg.Whole(fg.Sphere()))])
    params = fg.nearest(params, plan, "fitted" if "radii" in old else None)
    moments = {"kernel": fg.FeatureMoments(jnp.full(4, 10.0), jnp.zeros(4), jnp.full(4, 40.0))}
    moments = jax.tree.map(lambda leaf: leaf.astype("float32"), moments)
    grads = jax.tree.map(jnp.ones_like, params)

    def trained(tx):
        tx = optax.with_extra_args_support(tx)
        state, here, update = tx.init(params), params, jax.jit(tx.update)
        for _ in range(3):
            updates, state = update(grads, state, here, feature_moments=moments)
            here = optax.apply_updates(here, updates)
        return here, fg.radii(state)

    with pytest.warns(DeprecationWarning, match=next(iter(old))) as warned:
        tx = OPTIMIZERS[name](plan, **old)
    assert next(iter(new)) in str(warned[0].message)
    found, expected = trained(tx), trained(OPTIMIZERS[name](plan, **new))
    chex.assert_trees_all_equal(found, expected)
    if "every" in old:
        without, _ = trained(OPTIMIZERS[name](plan))
        assert np.any(without["kernel"] != found[0]["kernel"])


def test_old_keywords_beside_new_ones_are_an_error():
    _, plan = network()
    with pytest.raises(TypeError, match="every"):
        fg.fgsgd(0.1, plan, rescaling=fg.Rescaling(), every=2)
    with pytest.raises(TypeError, match="lamda_floor"):
        fg.fgsgd(0.1, plan, lamda_floor=2)


# --- flax


@pytest.mark.slow
def test_nnx_optimizer(users_settings):
    """init sees variables, update sees pure arrays; the paths are one and the same."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.blocks = nnx.List([nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(2)])
            self.head = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            x = jax.nn.relu(self.conv(x))
            for block in self.blocks:
                x = x + jax.nn.relu(block(x))
            return self.head(x.mean((1, 2)))

    model = Net(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    rules = [
        ("conv/kernel", MIXED[0][1]),
        ("blocks/*/kernel", fg.PIO([fg.Stiefel(), fg.Sphere()])),
        ("*", None),
    ]
    plan = fg.plan(params, rules)
    assert plan["blocks/0/kernel"] is not None
    assert plan["head/kernel"] is None
    assert plan == fg.plan(nnx.as_pure(params), rules)
    nnx.update(model, fg.initialize(jax.random.key(0), params, plan))
    optimizer = nnx.Optimizer(model, fg.fgsgd(0.05, plan, momentum=0.9), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(1), (4, 6, 6, 3))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0] / 2
    violations = fg.violation(nnx.state(model, nnx.Param), plan)
    assert max(float(v) for v in jax.tree.leaves(violations)) <= 1e-6
    kernel = np.asarray(model.blocks[1].kernel[...])
    collection = plan["blocks/1/kernel"]
    for s in kernel_slices(collection)(kernel.shape):
        assert h.violation(s.kind, s.of(kernel), s.radius) <= 1e-6


@pytest.mark.slow
def test_linen_train_state(users_settings):
    from flax import linen
    from flax.training.train_state import TrainState

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Conv(8, (3, 3))(x))
            return linen.Dense(4)(x.mean((1, 2)))

    x = jax.random.normal(jax.random.key(1), (4, 6, 6, 3))
    model = Net()
    params = model.init(jax.random.key(0), x)["params"]
    plan = fg.plan(params, [("Conv_*/kernel", MIXED[0][1]), ("*", None)])
    params = fg.initialize(jax.random.key(0), params, plan)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=fg.fgsgd(0.05, plan, momentum=0.9))

    @jax.jit
    def step(state):
        grads = jax.grad(lambda p: jnp.mean((state.apply_fn({"params": p}, x) - 1) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(10):
        state = step(state)
    assert worst_violation(state.params, layers_of(state.params, plan)) <= 1e-6
    assert np.max(np.abs(state.params["Conv_0"]["kernel"] - params["Conv_0"]["kernel"])) > 1e-2


@pytest.mark.parametrize(
    "make",
    [
        lambda plan: fg.fgsgd(0.05, plan, initial_radii="fitted"),
        lambda plan: fg.on_manifolds(optax.sgd(0.05), plan, initial_radii="fitted"),
    ],
    ids=["fgsgd", "on_manifolds"],
)
def test_a_trained_net_is_fine_tuned_at_its_own_scale(make):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 6)).astype(np.float32)
    y = np.tanh(x @ rng.standard_normal((6, 4)).astype(np.float32)) @ rng.standard_normal((4, 1)).astype(np.float32)
    trained = {
        "hidden": rng.standard_normal((6, 4)).astype(np.float32),
        "out": rng.standard_normal((4, 1)).astype(np.float32),
    }

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2)

    for _ in range(300):
        trained = jax.tree.map(lambda w, g: w - 0.1 * g, trained, loss(trained)[1])
    plan = fg.plan(trained, [("hidden", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")), ("*", None)])
    params = fg.nearest(trained, plan, radii="fitted")
    tx = make(plan)
    state = tx.init(params)
    radius = float(fg.radii(state)["hidden"].squeeze())
    # The nearest multiple of orthonormal columns: the mean of the singular values.
    np.testing.assert_allclose(radius, np.linalg.svd(trained["hidden"], compute_uv=False).mean(), rtol=1e-5)
    before, step = float(loss(params)[0]), jax.jit(tx.update)
    for _ in range(100):
        updates, state = step(loss(params)[1], state, params)
        params = optax.apply_updates(params, updates)
    assert float(loss(params)[0]) < before / 2
    assert h.violation("stiefel", params["hidden"], radius) <= 1e-6
