"""Optimizers and wrappers of Optax on manifolds, and docs/compatibility.md says what is found: see tools/compat.py.

By default every optimizer runs on the mixture and every wrapper around and inside one of four optimizers, on a sphere
and the mixture; the slow cases complete the schemes and the pairs of wrapper and optimizer.
"""

import json

import compat
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fgsgd_jax as fg

pytestmark = [
    pytest.mark.usefixtures("users_settings"),
    # contrib.dpsgd and the like, of their own arguments.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:optax"),
]


@pytest.fixture(scope="module")
def published():
    return compat.read()


@pytest.fixture(scope="module")
def known():
    return json.loads(compat.FOUND.read_text())


@pytest.mark.parametrize("name", sorted(compat.OPTIMIZERS))
def test_an_optimizer_does_as_published(name, published):
    found = compat.of_optimizer(name, ("float32",), ("PIO mix",))
    assert found["float32"]["PIO mix"] == published[name]["PIO mix"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(compat.OPTIMIZERS))
def test_an_optimizer_does_as_published_on_every_scheme(name, published):
    expected = {scheme: published[name][scheme] for scheme in compat.SCHEMES}
    assert compat.of_optimizer(name) == dict.fromkeys(compat.DTYPES, expected)


def cases(usual):
    """Wrapper, optimizer and dtype: of every wrapper one of four optimizers, or all."""
    for number, name in enumerate(compat.WRAPPERS):
        for other, optimizer in enumerate(compat.FOUR):
            if other == number % len(compat.FOUR) or not usual:
                yield name, optimizer, compat.DTYPES[(number // 4 + number + other) % 2]


PLACES = pytest.mark.parametrize("place", [compat.AROUND, compat.WITHIN])


def check_wrapper(name, place, optimizer, dtype, known, schemes):
    published = known[f"{place} {name}"][optimizer][dtype]
    found = compat.of_wrapper(name, place, optimizer, (dtype,), schemes=schemes)[dtype]
    assert found == {scheme: published[scheme] for scheme in schemes}


@pytest.mark.parametrize(("name", "optimizer", "dtype"), list(cases(usual=True)))
@PLACES
def test_a_wrapper_does_as_published(name, optimizer, dtype, place, known):
    # Some wrappers act on the first kernel alone.
    check_wrapper(name, place, optimizer, dtype, known, ("Sphere", "PIO mix"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer", "dtype"), list(cases(usual=False)))
@PLACES
def test_a_wrapper_does_as_published_on_every_scheme(name, optimizer, dtype, place, known):
    check_wrapper(name, place, optimizer, dtype, known, tuple(compat.SCHEMES))


def test_the_page_is_what_was_found(known):
    assert compat.DOCUMENT.read_text() == compat.document(known)


def test_the_table_is_complete(published):
    """It has a row for everything that is tried, a remedy for each trouble, and nothing leaves the manifolds unsaid."""
    assert set(published) == {*compat.OPTIMIZERS, *compat.WRAPPERS}
    for name, row in published.items():
        cells = {row[column] for column in (*compat.SCHEMES, compat.AROUND, compat.WITHIN) if column in row}
        assert cells <= {compat.FEASIBLE, compat.REFUSED}, name
        assert compat.REFUSED not in cells or row["remedy"], name
    assert all(row["PIO mix"] == compat.FEASIBLE for name, row in published.items() if name in compat.FOUR)


# --- refusals


def uncompiled_steps(tx, p, count):
    params = p.params
    state = tx.init(params)
    for _ in range(count):
        updates, state = tx.update(jax.grad(p.loss)(params), state, params)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (lambda p: optax.flatten(p.on(optax.sgd(0.1))), r"goes inside, as in fg.on_manifolds\(optax.flatten"),
        (lambda p: optax.chain(p.on(optax.sgd(0.1, 0.9)), optax.ema(0.9)), "Put that inside, as in"),
        (lambda p: optax.chain(fg.fgsgd(1.0, p.plan), optax.scale(0.5)), "Put that inside, as in"),
        (lambda p: optax.conditionally_transform(p.on(optax.sgd(0.1)), lambda step: step % 2 == 0), "Put that inside"),
        (lambda p: p.on(optax.lookahead(optax.sgd(0.1), 5, 0.5)), "average the weights in the training loop"),
    ],
    ids=["flatten", "ema", "scale", "conditionally_transform", "lookahead"],
)
def test_refusals_name_the_remedy(wrap, remedy):
    p = compat.problem(("PIO mix",))
    with pytest.raises((ValueError, TypeError), match=remedy):
        uncompiled_steps(wrap(p), p, 4)


def test_gradients_by_example_are_refused():
    p = compat.problem(("PIO mix",))
    tx = p.on(optax.sgd(0.1))
    batch = jax.tree.map(lambda x: jnp.stack([x] * 3), p.params)
    with pytest.raises(ValueError, match="differentially_private_aggregate"):
        tx.update(batch, tx.init(p.params), p.params)


def test_averaged_weights_go_through_nearest():
    p = compat.problem()
    tx, average = p.on(optax.adam(0.1)), optax.ema(0.9)

    @jax.jit
    def step(params, state, mean_state):
        updates, state = tx.update(jax.grad(p.loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        mean, mean_state = average.update(params, mean_state)
        return params, state, mean, mean_state

    params, state, mean_state = p.params, tx.init(p.params), average.init(p.params)
    for _ in range(10):
        params, state, mean, mean_state = step(params, state, mean_state)
    assert max(map(float, fg.violation(mean, p.plan).values())) > 1e-3
    back = fg.nearest(mean, p.plan, radii=fg.radii(state))
    assert max(map(float, fg.violation(back, p.plan).values())) <= 1e-6
    # Free weights stay averages.
    np.testing.assert_array_equal(back["bias"], mean["bias"])


@pytest.mark.parametrize("make", [fg.fgsgd, fg.riemannian_adam], ids=["fgsgd", "riemannian_adam"])
def test_coarse_gradients_leave_fine_weights_feasible(make):
    """Gradients in bfloat16 of float32 weights, as mixed precision hands them over."""
    p = compat.problem(("PIO mix",))
    tx = make(0.05, p.plan)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), jax.grad(p.loss)(params))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = p.params, tx.init(p.params)
    for _ in range(20):
        params, state = step(params, state)
    assert float(fg.violation(params, p.plan)["PIO mix"]) <= 1e-6
    assert params["PIO mix"].dtype == jnp.float32
