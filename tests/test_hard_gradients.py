"""Gradients that are no numbers, or hardly: every weight stays finite and on its manifold, and no state is spoilt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import chained

import fgsgd_jax as fg

SHAPES = {"kernel": (3, 3, 3, 5), "dense": (6, 4), "free": (3, 2), "bias": (5,)}
RULES = [
    ("kernel", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()])),
    ("dense", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")),
    ("free", fg.Whole(fg.Euclidean(), view="i o -> 1 1 i o")),
    ("bias", None),
]


OPTIMIZERS = {
    "fgsgd": lambda plan: fg.fgsgd(0.1, plan, momentum=0.9),
    "chain": lambda plan: chained(plan, 0.1, 0.9),
    "adam": lambda plan: fg.on_manifolds(optax.adam(0.01), plan),
    "spel": lambda plan: fg.spel(0.1, plan),
    "riemannian_adam": lambda plan: fg.riemannian_adam(0.01, plan),
}
# What a leaf's gradient is made of, and whether no step can be taken along it in an arithmetic of float32.
VALUES = {
    "nan": (np.nan, True),
    "inf": (np.inf, True),
    "-inf": (-np.inf, True),
    "zero": (0.0, False),
    "denormal": (1e-40, False),
    "1e-30": (1e-30, False),
    "1e15": (1e15, False),
    "1e30": (1e30, True),
    "-3e38": (-3e38, True),
}
AS_IT_IS = 0.5  # marks the entries of a gradient that are not spoilt
# Round-off of the weights, as violation sees it: 2 sqrt(15) half-ulps in a Gram matrix.
LIMITS = {"float32": 1e-6, "bfloat16": 2 * 15**0.5 * 2.0**-9, "float16": 2 * 15**0.5 * 2.0**-12}


@functools.cache
def setting(name, dtype):
    rng = np.random.default_rng(0)
    params = {path: jnp.asarray(rng.standard_normal(shape), dtype) for path, shape in SHAPES.items()}
    plan = fg.plan(params, RULES)
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = OPTIMIZERS[name](plan)

    @jax.jit
    def steps(params, state, spoilt):
        """A good step, the spoilt one, and three good ones."""

        def one(carry, number):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(1), number)
            grads = {}
            for place, (path, leaf) in enumerate(params.items()):
                good = jax.random.normal(jax.random.fold_in(key, place), leaf.shape).astype(leaf.dtype)
                grads[path] = jnp.where((number == 1) & (spoilt[path] != AS_IT_IS), spoilt[path], good)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, state), jnp.arange(5))[0]

    return params, plan, tx, steps


def untouched():
    return {path: np.full(shape, AS_IT_IS) for path, shape in SHAPES.items()}


def finite(tree):
    return all(np.all(np.isfinite(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree))


CASES = [
    pytest.param(name, dtype, marks=() if (name, dtype) == ("fgsgd", "float32") else pytest.mark.slow)
    for name in OPTIMIZERS
    for dtype in LIMITS
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_weights_stay_finite_and_on_their_manifolds(name, dtype, lenient_promotion, record_property):
    params, plan, tx, steps = setting(name, dtype)
    state = tx.init(params)

    def spoilt_by(leaf, value, everywhere):
        grads = untouched()
        grads[leaf][... if everywhere else (0,) * grads[leaf].ndim] = value
        return {path: jnp.asarray(g).astype(dtype) for path, g in grads.items()}

    clean, _ = steps(params, state, {path: jnp.asarray(g, dtype) for path, g in untouched().items()})
    worst, tried = 0.0, 0
    for leaf in SHAPES:
        for what, (value, hopeless) in VALUES.items():
            for everywhere in (False, True):
                after, last = steps(params, state, spoilt_by(leaf, value, everywhere))
                where = f"{what} in {leaf}"
                # In half precision 1e15 may be infinite.
                hopeless = hopeless or abs(value) > float(jnp.finfo(dtype).max)
                assert finite(after), where
                assert finite(last), where
                counts = {path: int(count) for path, count in fg.refused(last).items()}
                assert counts == {path: int(hopeless and path == leaf) for path in SHAPES}, where
                violation = max(map(float, fg.violation(after, plan).values()))
                assert violation <= LIMITS[dtype], where
                # The other leaves moved as if nothing had been there.
                for path in set(SHAPES) - {leaf}:
                    np.testing.assert_array_equal(after[path], clean[path], err_msg=where)
                    assert np.any(np.asarray(after[path] != params[path])), where
                worst, tried = max(worst, violation), tried + 1
    record_property("inputs tried", tried)
    record_property("worst violation", worst)


def test_no_gradient_makes_a_step_longer_than_the_rate_allows():
    """Eq. 7 at any magnitude: R/ζ never exceeds √2 - 1, and is 1/(2 + R) above it."""
    params, plan, *_ = setting("fgsgd", "float32")
    tx = fg.fgsgd(1.0, plan)
    rng, update = np.random.default_rng(2), jax.jit(tx.update)
    for size in (1e-3, 1.0, 1e6, 1e12, 1e18):
        grads = {path: jnp.asarray(size * rng.standard_normal(shape), jnp.float32) for path, shape in SHAPES.items()}
        updates, state = update(grads, tx.init(params), params)
        ratio = max(float(figures.step_ratio) for figures in fg.metrics(state).values())
        # The smallest radius is that of the kernel's slices.
        assert ratio * np.min(plan["kernel"].gamma) <= 0.4143
        moved = float(jnp.max(jnp.abs(updates["free"])))
        norm = float(jnp.linalg.norm(grads["free"]))
        assert moved <= (1 / (2 + norm) if norm > 0.4143 else norm) * (1 + 1e-6)


def test_refused_gradients_leave_momentum_to_go_on():
    """Refused is the gradient: the buffer decays as it does for a gradient of zero."""
    params, _, tx, _ = setting("fgsgd", "float32")
    grads, update = {path: jnp.ones(shape, jnp.float32) for path, shape in SHAPES.items()}, jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params)
    nothing, _ = update(grads | {"kernel": jnp.zeros(SHAPES["kernel"], jnp.float32)}, state, params)
    spoilt = grads["kernel"].at[0, 0, 0, 0].set(jnp.nan)
    refused, _ = update(grads | {"kernel": spoilt}, state, params)
    jax.tree.map(np.testing.assert_array_equal, nothing, refused)


@pytest.mark.parametrize("make", [fg.project, lambda plan: fg.on_manifolds(optax.sgd(0.1), plan)])
def test_a_refused_gradient_leaves_derivatives_by_the_others_numbers(make):
    """Through an update, as in meta-learning: a leaf of 10²⁵ is refused, and its derivative is zero."""
    params, plan, *_ = setting("fgsgd", "float32")
    tx = make(plan)
    state = tx.init(params)
    grads = {path: jnp.ones(shape, jnp.float32) for path, shape in SHAPES.items()}
    grads["kernel"] = 1e25 * grads["kernel"]

    def total(grads):
        return sum(jnp.sum(update**2) for update in jax.tree.leaves(tx.update(grads, state, params)[0]))

    found = jax.jit(jax.grad(total))(grads)
    assert finite(found)
    assert not np.any(found["kernel"])
    assert all(np.any(found[path]) for path in set(SHAPES) - {"kernel"})


def test_features_that_are_no_numbers_cost_lambda_nothing():
    """A batch with NaN among its features is left out of λ; the others count as ever."""
    params = {"kernel": jnp.zeros((3, 3, 3, 5), jnp.float32)}
    plan = fg.plan(params, [("*", fg.Each(fg.Sphere()))])
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = fg.fgsgd(0.1, plan, rescaling=fg.Rescaling(every=3, max_change=None))
    rng = np.random.default_rng(3)

    def moments(mean, m2):
        return {"kernel": fg.FeatureMoments(jnp.full(3, 8.0, jnp.float32), mean, m2)}

    good = [
        moments(*(jnp.asarray(rng.uniform(1, 9, 3), jnp.float32) for _ in range(2))),
        moments(*(jnp.asarray(rng.uniform(1, 9, 3), jnp.float32) for _ in range(2))),
    ]
    bad = [
        moments(jnp.full(3, value, jnp.float32), jnp.full(3, abs(value), jnp.float32))
        for value in (np.nan, np.inf, 1e30)
    ]
    update = jax.jit(tx.update)

    def radii_after(batches):
        state = tx.init(params)
        for feature_moments in batches:
            _, state = update(params, state, params, feature_moments=feature_moments)
        return np.asarray(fg.radii(state)["kernel"])

    nothing = moments(jnp.zeros(3, jnp.float32), jnp.zeros(3, jnp.float32))
    nothing["kernel"] = fg.FeatureMoments(jnp.zeros(3, jnp.float32), nothing["kernel"].mean, nothing["kernel"].m2)
    expected = radii_after([good[0], nothing, good[1]])
    assert np.max(np.abs(expected / float(plan["kernel"].gamma) - 1)) > 0.1
    for spoilt in bad:
        np.testing.assert_array_equal(radii_after([good[0], spoilt, good[1]]), expected)
