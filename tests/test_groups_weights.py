"""Drawing weights on their manifolds, moving them there, and measuring how far they are."""

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grids import kernel
from jax import lax
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
    updates, after = jax.jit(tx.update)(gradients, state, params)
    for found, expected in ((updates, params), (after, state)):
        assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(expected)]


# --- weights without a scale, numbers or buffers of their own

ZERO_RULES = [("conv/kernel", fg.Each(fg.Sphere())), ("dense", fg.Whole(fg.Stiefel())), ("*", None)]


def with_zeros(dtype="float32"):
    """A stack of kernels and a matrix, one of them zero: as of LoRA or a branch that begins as the identity."""
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": jnp.asarray(rng.standard_normal((2, 2, 2, 3)), dtype).at[:, :, 1, 2].set(0)},
        "dense": jnp.asarray(rng.standard_normal((6, 4)), dtype),
        "bias": jnp.zeros(3, dtype),
    }
    return params, fg.plan(params, ZERO_RULES)


FITTED = {
    "nearest": lambda params, plan: fg.nearest(params, plan, radii="fitted"),
    "fgsgd": lambda params, plan: fg.fgsgd(0.1, plan, initial_radii="fitted").init(params),
    "on_manifolds": lambda params, plan: fg.on_manifolds(optax.sgd(0.1), plan, initial_radii="fitted").init(params),
    "rescale": lambda params, plan: fg.rescale(plan, initial_radii="fitted").init(params),
}


@pytest.mark.parametrize("call", FITTED.values(), ids=FITTED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_matrix_of_zeros_has_no_scale_to_fit(call, dtype):
    params, plan = with_zeros(dtype)
    with pytest.raises(ValueError, match=r"conv/kernel: its matrix at input 1, output 2 .* norm 0:") as error:
        call(params, plan)
    assert "('conv/kernel', None)" in str(error.value)
    assert "fg.initialize(key, params, [('conv/kernel', scheme), ('*', None)])" in str(error.value)
    # What it recommends.
    free = fg.plan(params, [("conv/kernel", None), *ZERO_RULES[1:]])
    call(fg.nearest(params, free, radii="fitted"), free)
    drawn = fg.initialize(jax.random.key(0), params, [ZERO_RULES[0], ("*", None)])
    np.testing.assert_array_equal(drawn["dense"], params["dense"])
    call(fg.nearest(drawn, plan, radii="fitted"), plan)


def test_a_matrix_next_to_zero_is_not_called_zero():
    """The square of its norm is no normal number."""
    with pytest.raises(ValueError, match="its matrix at input 0, output 0 of the grid has the norm 2e-30"):
        fg.nearest({"w": jnp.full((2, 2), 1e-30, jnp.float32)}, [("w", fg.Whole(fg.Stiefel()))], radii="fitted")


def test_the_matrix_of_zeros_of_a_stack_is_named():
    params = {"w": jnp.ones((2, 4, 3)).at[1, :, 2].set(0)}
    plan = fg.plan(params, [("w", fg.Each(fg.Sphere(), view="neurons", layers=1))])
    with pytest.raises(ValueError, match="w: its matrix of layer 1 at input 0, output 2"):
        fg.nearest(params, plan, radii="fitted")


@pytest.mark.parametrize("manifold", [fg.Sphere(), fg.Oblique(), fg.Stiefel()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("make", ["fgsgd", "on_manifolds"])
def test_in_jit_a_matrix_of_zeros_stays_and_is_counted(make, manifold):
    """And all others train, in the same parameter and elsewhere."""
    params, _ = with_zeros()
    plan = fg.plan(params, [("conv/kernel", fg.Each(manifold)), ("dense", fg.Whole(fg.Stiefel())), ("*", None)])
    tx = {
        "fgsgd": fg.fgsgd(0.1, plan, 0.9, initial_radii="fitted"),
        "on_manifolds": fg.on_manifolds(optax.sgd(0.1, 0.9), plan, initial_radii="fitted"),
    }[make]

    @jax.jit
    def trained(params):
        params = fg.nearest(params, plan, radii="fitted")

        def step(_, carry):
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            return optax.apply_updates(params, updates), state

        return lax.fori_loop(0, 3, step, (params, tx.init(params)))

    found, state = trained(params)
    figures = fg.metrics(state)
    assert (int(figures["conv/kernel"].degenerate), int(figures["dense"].degenerate)) == (1, 0)
    kernels = np.asarray(found["conv"]["kernel"])
    assert np.all(np.isfinite(kernels))
    assert np.max(np.abs(kernels[:, :, 1, 2])) < 1e-15
    before = np.asarray(fg.nearest(params | {"conv": found["conv"]}, plan)["dense"])
    assert np.all(np.isfinite(before))
    moved = np.max(np.abs(kernels - np.asarray(params["conv"]["kernel"])), axis=(0, 1))
    assert np.all(np.delete(moved.ravel(), 5) > 1e-3)
    assert np.all(np.isfinite(found["dense"]))


def test_what_comes_back_shares_no_buffer():
    """So that the parameters and what was made of them can be donated together."""
    params, plan = setting()
    for made in (fg.initialize(jax.random.key(0), params, plan), fg.nearest(params, plan)):
        places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, made))]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    "call",
    [
        lambda params, plan: fg.initialize(jax.random.key(0), params, plan),
        lambda params, plan: fg.nearest(params, plan),
        lambda params, plan: fg.violation(params, plan),
    ],
    ids=["initialize", "nearest", "violation"],
)
def test_parameters_without_numbers_are_refused(call):
    params, plan = setting()
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(TypeError, match=r"conv/(kernel|bias): the numbers .*jax.eval_shape"):
        call(shapes, plan)
    # A part of them is enough to be refused, and the remedy gives shapes.
    with pytest.raises(TypeError, match="conv/bias"):
        call({"conv": params["conv"] | {"bias": shapes["conv"]["bias"]}}, plan)
    found = jax.eval_shape(lambda params: call(params, plan), shapes)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("make", [fg.fgsgd, fg.riemannian_adam], ids=["fgsgd", "riemannian_adam"])
def test_fitted_radii_need_numbers(make):
    params, plan = setting()
    with pytest.raises(TypeError, match=r"conv/kernel: initial_radii='fitted' reads the weights"):
        make(0.1, plan, initial_radii="fitted").init(jax.eval_shape(lambda: params))


@pytest.mark.parametrize("make", [fg.fgsgd, fg.riemannian_adam], ids=["fgsgd", "riemannian_adam"])
def test_leaves_that_are_no_arrays_are_named(make):
    """As of an equinox model that was not filtered, given as gradients or as parameters."""
    params, plan = setting()
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = make(0.1, plan)
    state = tx.init(params)
    unfiltered = params | {"activation": jax.nn.relu}
    for role, trees in (("updates", (unfiltered, state, params)), ("parameters", (params, state, unfiltered))):
        with pytest.raises(TypeError, match=rf"activation: the {role} are arrays, .*eqx.filter\(model"):
            tx.update(*trees)


@pytest.mark.parametrize("make", [fg.fgsgd, fg.riemannian_adam], ids=["fgsgd", "riemannian_adam"])
def test_gradients_of_numpy_outside_jit(make):
    params, plan = setting()
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = make(0.1, plan)
    grads = jax.tree.map(jnp.sin, params)
    expected, _ = tx.update(grads, tx.init(params), params)
    found, _ = tx.update(jax.tree.map(np.asarray, grads), tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("make", [fg.fgsgd, fg.riemannian_adam], ids=["fgsgd", "riemannian_adam"])
def test_none_among_the_gradients_is_named(make):
    params, plan = setting()
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = make(0.1, plan)
    grads = {"conv": {"kernel": None, "bias": jnp.ones_like(params["conv"]["bias"])}}
    with pytest.raises(ValueError, match=r"None at 'conv/kernel'.*jnp.zeros_like\(p\) if g is None.*None\) before"):
        tx.update(grads, tx.init(params), params)
    # What it recommends; and a free leaf may have none.
    filled = jax.tree.map(
        lambda g, p: jnp.zeros_like(p) if g is None else g, grads, params, is_leaf=lambda g: g is None
    )
    tx.update(filled, tx.init(params), params)


def test_a_free_leaf_without_a_gradient_has_no_update():
    """As in Optax, whose `apply_updates` wants one of every leaf, and `equinox.apply_updates` does not."""
    params, plan = setting()
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = fg.fgsgd(0.1, plan, momentum=0.9)
    grads = {"conv": {"kernel": jnp.sin(3 * params["conv"]["kernel"]), "bias": None}}
    updates, _ = tx.update(grads, tx.init(params), params)
    alone, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(params), params)
    assert updates["conv"]["bias"] is alone["conv"]["bias"] is None
    assert np.max(np.abs(updates["conv"]["kernel"])) > 1e-4


def test_a_rate_of_zero_moves_by_round_off_and_a_frozen_leaf_not_at_all():
    params, plan = setting()
    params = fg.initialize(jax.random.key(0), params, plan)
    grads = jax.tree.map(jnp.ones_like, params)
    for tx, most in ((fg.fgsgd(0.0, plan), 1e-7), (optax.chain(fg.fgsgd(0.1, plan), optax.freeze(True)), 0.0)):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert max(float(jnp.max(jnp.abs(u))) for u in jax.tree.leaves(updates)) <= most


def test_a_state_is_asked_for_without_parameters_by_a_plan_only():
    tx = fg.fgsgd(0.1, PLAN_RULES)
    params, _ = setting()
    state = tx.init(fg.initialize(jax.random.key(0), params, PLAN_RULES))
    with pytest.raises(ValueError, match=r"give it the plan, fg.plan\(params, rules\)"):
        optax.tree_utils.tree_map_params(tx, lambda leaf: leaf, state)
