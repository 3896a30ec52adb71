"""Drawing weights on their manifolds, moving them there, and measuring how far they are."""

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import kernel
from scipy import stats

import fgsgd_jax as fg

LEAST_P = 1e-4

PARAMS = {"conv": {"kernel": np.random.default_rng(0).standard_normal((3, 3, 4, 6)), "bias": np.arange(6.0)}}
PLAN_RULES = [("kernel", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel()])), ("*", None)]


def setting(dtype="float32", rules=PLAN_RULES, **options):
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), PARAMS)
    return params, fg.plan(params, rules, **options)


def per_slice(params, plan, radius):
    """Violations by the definition, over the grid."""
    found = plan["conv/kernel"]
    member = np.asarray(found.member)
    out = np.zeros(member.shape)
    radius = np.broadcast_to(radius, member.shape)
    for c, d in np.ndindex(member.shape):
        kind = type(found.manifolds[member[c, d]]).__name__.lower()
        out[c, d] = h.violation(kind, np.asarray(params["conv"]["kernel"], np.float64)[:, :, c, d], radius[c, d])
    return out


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_initialize_draws_every_slice_on_its_manifold(dtype):
    params, plan = setting(dtype)
    drawn = fg.initialize(jax.random.key(0), params, plan)
    limit = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 0.03}[dtype]
    assert np.max(per_slice(drawn, plan, plan["conv/kernel"].gamma)) <= limit
    assert drawn["conv"]["kernel"].dtype == dtype
    np.testing.assert_array_equal(drawn["conv"]["bias"], params["conv"]["bias"])  # not the plan's business
    again, other = (
        fg.initialize(jax.random.key(0), params, plan),
        fg.initialize(jax.random.key(1), params, plan),
    )
    np.testing.assert_array_equal(drawn["conv"]["kernel"], again["conv"]["kernel"])
    assert np.all(np.asarray(drawn["conv"]["kernel"]) != np.asarray(other["conv"]["kernel"]))
    # No two slices, and no two layers, share a draw.
    slices = np.asarray(drawn["conv"]["kernel"], np.float64).reshape(9, -1).T
    assert len(np.unique(slices.round(4), axis=0)) == 24


def test_layers_of_one_shape_are_drawn_apart():
    params = {name: {"kernel": jnp.zeros((3, 3, 2, 2))} for name in "ab"}
    plan = fg.plan(params, [("kernel", fg.Each(fg.Stiefel()))])
    drawn = fg.initialize(jax.random.key(0), params, plan)
    assert np.all(np.asarray(drawn["a"]["kernel"]) != np.asarray(drawn["b"]["kernel"]))


def test_initialize_is_uniform():
    """Each slice's, by its marginals: the p-values would be below 1e-4 for one key in ten thousand."""
    params = kernel(40, 60)
    plan = fg.plan(params, [("k", fg.PI([fg.Sphere(), fg.Stiefel()]))], gamma=0.5)
    drawn = np.asarray(fg.initialize(jax.random.key(0), params, plan)["k"], np.float64) / 0.5
    member = np.asarray(plan["k"].member)
    for k, n in ((0, 9), (1, 3)):
        entries = drawn[:, :, member == k]
        law = stats.beta((n - 1) / 2, (n - 1) / 2, loc=-1, scale=2)
        for i, j in ((0, 0), (1, 2)):
            assert stats.kstest(entries[i, j], law.cdf).pvalue > LEAST_P


def test_nearest_keeps_what_can_be_kept():
    params, plan = setting("float64")
    gamma = np.asarray(plan["conv/kernel"].gamma)
    found = fg.nearest(params, plan)
    assert np.max(per_slice(found, plan, gamma)) < 1e-13
    np.testing.assert_array_equal(found["conv"]["bias"], params["conv"]["bias"])
    member = np.asarray(plan["conv/kernel"].member)
    for c, d in np.ndindex(member.shape):
        kind = type(plan["conv/kernel"].manifolds[member[c, d]]).__name__.lower()
        expected = h.nearest(
            kind, PARAMS["conv"]["kernel"][:, :, c, d], float(np.broadcast_to(gamma, member.shape)[c, d])
        )
        np.testing.assert_allclose(found["conv"]["kernel"][:, :, c, d], expected, atol=1e-12)
    twice = fg.nearest(found, plan)
    np.testing.assert_allclose(twice["conv"]["kernel"], found["conv"]["kernel"], atol=1e-15)


def test_nearest_at_radii_of_ones_own():
    params, plan = setting("float64")
    radii = {"conv/kernel": jnp.asarray(np.linspace(0.1, 2, 24).reshape(4, 6))}
    found = fg.nearest(params, plan, radii=radii)
    assert np.max(per_slice(found, plan, radii["conv/kernel"])) < 1e-13
    assert float(fg.violation(found, plan, radii=radii)["conv/kernel"]) < 1e-13
    assert float(fg.violation(found, plan)["conv/kernel"]) > 0.5


def test_nearest_fitted_is_the_least_squares_scale():
    """Weights that are on their manifolds at some scale stay as they are; of others, no scale is nearer."""
    params, plan = setting("float64")
    drawn = fg.initialize(jax.random.key(0), params, plan)
    scaled = jax.tree.map(lambda leaf: 7.3 * leaf, drawn)
    found = fg.nearest(scaled, plan, radii="fitted")
    np.testing.assert_allclose(found["conv"]["kernel"], scaled["conv"]["kernel"], rtol=1e-9, atol=1e-9)
    fitted = fg.nearest(params, plan, radii="fitted")["conv"]["kernel"]
    best = float(jnp.sum((fitted - params["conv"]["kernel"]) ** 2))
    for gamma in np.geomspace(0.1, 10, 25):
        radii = {"conv/kernel": jnp.full((4, 6), gamma)}
        other = fg.nearest(params, plan, radii=radii)["conv"]["kernel"]
        assert best <= float(jnp.sum((other - params["conv"]["kernel"]) ** 2)) + 1e-9


def test_nearest_leaves_euclidean_slices():
    params, plan = setting("float64", [("kernel", fg.PI([fg.Sphere(), fg.Euclidean()])), ("*", None)])
    flatland = np.asarray(plan["conv/kernel"].member) == 1
    found = np.asarray(fg.nearest(params, plan)["conv"]["kernel"])
    np.testing.assert_array_equal(found[:, :, flatland], PARAMS["conv"]["kernel"][:, :, flatland])


def test_violation_is_the_worst_slices():
    params, plan = setting("float64")
    gamma = plan["conv/kernel"].gamma
    drawn = fg.initialize(jax.random.key(0), params, plan)
    drawn["conv"]["kernel"] = drawn["conv"]["kernel"].at[:, :, 2, 3].multiply(1.1)
    found = fg.violation(drawn, plan)
    expected = np.max(per_slice(drawn, plan, gamma))
    assert expected == pytest.approx(0.1) or expected == pytest.approx(0.21)
    (value,) = jax.tree.leaves(found)  # one number per constrained parameter
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert np.shape(value) == ()
    np.testing.assert_allclose(jax.jit(lambda p: fg.violation(p, plan))(drawn)["conv/kernel"], expected, rtol=1e-9)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_gradients_wider_than_the_weights_do_not_widen_the_update(momentum):
    """Else the momentum of float32 weights, and then they, would be float64 after a gradient that is."""
    params = {"w": jnp.zeros((2, 3, 4, 5), jnp.float32), "bias": jnp.zeros(5, jnp.float32)}
    rules = [("w", fg.Each(fg.Sphere())), ("*", None)]
    params = fg.initialize(jax.random.key(0), params, rules)
    tx = fg.fgsgd(0.1, rules, momentum)
    state = tx.init(params)
    gradients = jax.tree.map(lambda x: jnp.ones_like(x, jnp.float64), params)
    updates, after = tx.update(gradients, state, params)
    for found, expected in ((updates, params), (after, state)):
        assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(expected)]
