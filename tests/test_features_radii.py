"""The radii that follow from what enters each weight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import chained
from flax import linen as nn, nnx

import fgsgd_jax as fg
from fgsgd_jax.features import batch_moments, matrix_moments, merge_moments

# --- ℜ = γ/λ


def layers(*shapes, dtype=jnp.float32):
    return {f"l{n}": {"kernel": jnp.zeros(shape, dtype)} for n, shape in enumerate(shapes)}


def started(params, scheme, **options):
    plan = fg.plan(params, [("*/kernel", scheme)], seed=1)
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = fg.fgsgd(0.1, plan, momentum=0.9, rescaling=fg.Rescaling(**options))
    return plan, params, tx, tx.init(params)


def moments_of(x, path="l0/kernel"):
    return {path: batch_moments(x, (-1,))}


MIX = fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()])


@pytest.mark.parametrize("linked", [False, True], ids=["fgsgd", "chain"])
def test_radii_follow_the_features_of_an_epoch(linked):
    plan, params, tx, _ = started(layers((3, 3, 4, 6)), MIX, every=3, max_change=None)
    if linked:
        tx = chained(plan, 0.1, rescaling=fg.Rescaling(every=3, max_change=None))
    state, update = tx.init(params), jax.jit(tx.update)
    seen = []
    collection = plan["l0/kernel"]
    free = np.array([isinstance(m, fg.Euclidean) for m in collection.manifolds])[collection.member]
    for step in range(6):
        before = params["l0"]["kernel"]
        x = jax.random.normal(jax.random.key(step), (20, 4)) * jnp.array([[0.5, 1.0, 2.0, 4.0]]) + 1
        seen.append(np.asarray(x, np.float64))
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = update(grads, state, params, feature_moments=moments_of(x))
        params = optax.apply_updates(params, updates)
        radii = np.asarray(fg.radii(state)["l0/kernel"])
        if step % 3 == 2:
            expected = collection.gamma / np.concatenate(seen).std(0).reshape(4, 1) * np.ones((4, 6))
            seen = []
        elif step < 3:
            expected = np.full((4, 6), collection.gamma)
        np.testing.assert_allclose(radii[~free], expected[~free], rtol=1e-6)
        assert float(fg.violation(params, plan, radii=fg.radii(state))["l0/kernel"]) < 1e-6
        assert np.max(np.abs(params["l0"]["kernel"] - before)) > 1e-4


@pytest.mark.slow
def test_the_function_of_the_weights_changes_by_the_ratio_of_the_scales():
    _, params, tx, state = started(layers((3, 3, 4, 6)), fg.PIO([fg.Sphere(), fg.Stiefel()]), every=1, max_change=None)
    x = jax.random.normal(jax.random.key(3), (50, 4)) * jnp.array([[0.5, 1.0, 2.0, 4.0]])
    still = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(still, state, params, feature_moments=moments_of(x))
    ratio = np.asarray(updates["l0"]["kernel"] + params["l0"]["kernel"]) / np.asarray(params["l0"]["kernel"])
    expected = np.broadcast_to((1 / np.std(x, axis=0)).reshape(1, 1, 4, 1), ratio.shape)
    np.testing.assert_allclose(ratio, expected, rtol=3e-5)


@pytest.mark.parametrize(("every", "changes"), [(3, {2, 4, 7}), (None, {2, 4})])
def test_a_warm_up_changes_sooner_and_without_a_period_only_then(every, changes):
    _, params, tx, state = started(layers((1, 2, 4, 2)), fg.Each(fg.Sphere()), every=every, warmup=(2, 5))
    update, still = jax.jit(tx.update), jax.tree.map(jnp.zeros_like, params)
    found, before = set(), fg.radii(state)["l0/kernel"]
    for step in range(1, 9):
        x = (1 + 0.1 * step) * jax.random.normal(jax.random.key(step), (20, 4))
        updates, state = update(still, state, params, feature_moments=moments_of(x))
        params = optax.apply_updates(params, updates)
        after = fg.radii(state)["l0/kernel"]
        found |= {step} if np.all(after != before) else set()
        before = after
    assert found == changes


@pytest.mark.slow
def test_grouped_convolutions_have_a_radius_for_input_and_output():
    plan, params, tx, state = started(layers((3, 3, 2, 6)), fg.Each(fg.Sphere()), every=1, max_change=None)
    x = jax.random.normal(jax.random.key(0), (50, 6)) * jnp.arange(1.0, 7.0).reshape(1, 6)
    still = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(still, state, params, feature_moments=moments_of(x))
    lam = np.std(np.asarray(x, np.float64), axis=0)
    for c in range(2):
        for d in range(6):  # three groups of two outputs; group g sees channels 2g and 2g + 1
            expected = plan["l0/kernel"].gamma / lam[2 * (d // 2) + c]
            assert float(fg.radii(state)["l0/kernel"][c, d]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_views_that_mix_channels_pool_them():
    params = {"w": jnp.zeros((8, 5))}
    plan = fg.plan(params, [("w", fg.Whole(fg.Oblique(), view="i o -> 1 1 i o"))])
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = fg.fgsgd(0.1, plan, rescaling=fg.Rescaling(every=1, max_change=None))
    x = jax.random.normal(jax.random.key(0), (50, 8)) + jnp.arange(8.0).reshape(1, 8)
    _, state = tx.update(params, tx.init(params), params, feature_moments=moments_of(x, "w"))
    np.testing.assert_allclose(fg.radii(state)["w"], [[1 / np.std(x)]], rtol=1e-5)


def test_dead_channels_keep_their_scale_and_are_counted():
    plan, params, tx, state = started(
        layers((3, 3, 4, 6), (3, 3, 4, 6)), fg.Each(fg.Sphere()), every=1, max_change=None
    )
    x = jax.random.normal(jax.random.key(0), (50, 4)) * jnp.array([[2.0, 0.0, 1.0, 1.0]]) + 3
    still = jax.tree.map(jnp.zeros_like, params)
    _, state = jax.jit(tx.update)(still, state, params, feature_moments=moments_of(x))
    radii, gamma = fg.radii(state), plan["l0/kernel"].gamma
    assert np.all(np.isfinite(radii["l0/kernel"]))
    np.testing.assert_allclose(radii["l0/kernel"][1], gamma, rtol=1e-6)
    np.testing.assert_allclose(radii["l1/kernel"], gamma, rtol=1e-6)  # no features at all
    assert int(fg.metrics(state)["l0/kernel"].unfed) == 6
    assert int(fg.metrics(state)["l1/kernel"].unfed) == 24


def test_a_floor_bounds_the_radii_by_gamma():
    plan, params, tx, state = started(layers((3, 3, 4, 6)), fg.Each(fg.Sphere()), every=1, floor=1.0, max_change=None)
    x = jax.random.normal(jax.random.key(0), (50, 4)) * jnp.array([[0.1, 0.5, 1.5, 1.9]])
    still = jax.tree.map(jnp.zeros_like, params)
    _, state = jax.jit(tx.update)(still, state, params, feature_moments=moments_of(x))
    ratio = np.asarray(fg.radii(state)["l0/kernel"][:, 0]) / plan["l0/kernel"].gamma
    np.testing.assert_allclose(ratio[:2], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[2:], 1 / np.std(x, axis=0)[2:], rtol=1e-5)


def test_multisteps_loses_no_moments(users_settings):
    """Moments cover what was seen since the last applied update: two micro-steps of one epoch count once each."""
    plan, params, plain, _ = started(layers((3, 3, 4, 6)), fg.Each(fg.Sphere()), every=2, max_change=None)
    tx = optax.MultiSteps(plain, every_k_schedule=2)
    state, seen, since_applied = tx.init(params), [], None
    update = jax.jit(tx.update)
    for micro in range(4):
        x = jax.random.normal(jax.random.key(micro), (20, 4)) * (1 + micro)
        seen.append(np.asarray(x, np.float64))
        batch = moments_of(x)["l0/kernel"]
        since_applied = batch if since_applied is None else merge_moments(since_applied, batch)
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = update(grads, state, params, feature_moments={"l0/kernel": since_applied})
        params = optax.apply_updates(params, updates)
        if tx.has_updated(state):
            since_applied = None
    expected = plan["l0/kernel"].gamma / np.concatenate(seen).std(0)
    np.testing.assert_allclose(fg.radii(state)["l0/kernel"][:, 0], expected, rtol=1e-5)


def test_wrong_moments_are_refused_by_name():
    _, params, tx, state = started(layers((3, 3, 4, 6)), fg.Each(fg.Sphere()), every=2)
    x = jnp.ones((5, 4))
    with pytest.raises(ValueError, match="l0/kernel"):
        tx.update(params, state, params, feature_moments=moments_of(x, "elsewhere"))
    with pytest.raises(ValueError, match="l0/kernel"):
        tx.update(params, state, params, feature_moments=moments_of(jnp.ones((5, 3))))
    with pytest.raises(TypeError, match="l0/kernel"):
        tx.update(params, state, params, feature_moments={"l0/kernel": jnp.ones(4)})


# --- networks without normalization


def chain(depth, width=32):
    names = [f"l{n:03d}" for n in range(depth)]
    params = {name: {"kernel": jnp.zeros((width, width), jnp.float32)} for name in names}
    trace = fg.Trace(tuple((f"{name}/kernel", 1) for name in names))
    x = jax.random.normal(jax.random.key(1), (128, width), jnp.float32)

    def forward(params):
        h, moments = x, {}
        for name in names:
            moments[f"{name}/kernel"] = batch_moments(h, (-1,))
            h = jax.nn.relu(h @ params[name]["kernel"])
        return jnp.std(h), moments

    return params, trace, forward


WHOLE = fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")
BY_CHANNEL = fg.Each(fg.Sphere(), view="i o -> i 1 o 1")


@pytest.mark.parametrize("depth", [10, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (20, 50))])
@pytest.mark.parametrize(
    ("scheme", "ordered", "max_change", "after", "spread"),
    [
        (WHOLE, True, "auto", 1, 1.01),  # one scale a layer: the correction is exact
        (BY_CHANNEL, True, "auto", 1, 30),  # one a channel: exact for what they share, the rest in small steps
        (WHOLE, False, "auto", 120, 1.5),  # at most a factor of 2 at once: it takes many changes
        (WHOLE, False, None, 1, None),  # everything at once over-corrects
    ],
    ids=["order known", "order known, by channel", "limited", "neither"],
)
def test_deep_chains_settle(depth, scheme, ordered, max_change, after, spread):
    params, trace, forward = chain(depth)
    plan = fg.plan(params, [("*", scheme)], trace=trace if ordered else None, gamma=1.0)
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = fg.fgsgd(0.0, plan, rescaling=fg.Rescaling(every=1, max_change=max_change))
    state, still = tx.init(params), jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def change(params, state):
        scale, moments = forward(params)
        updates, state = tx.update(still, state, params, feature_moments=moments)
        return optax.apply_updates(params, updates), state, scale

    scales = []
    for _ in range(after + 3):
        params, state, scale = change(params, state)
        scales.append(float(scale))
    assert scales[0] < 0.8**depth  # it starts faded
    late = scales[after:]
    if max_change == "auto" and not ordered and depth == 50:
        # Round-off in a layer's λ doubles with every layer below it: in float32 the scales only stay finite here.
        assert all(1e-9 < scale < 1e9 for scale in late), scales
    elif spread is None:
        assert not all(1e-3 < scale < 1e3 for scale in late)
    else:
        assert all(0.01 < scale < 100 for scale in late), scales
        assert max(late) / min(late) < spread, scales


# --- stacks of layers


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4, name="dense")(x)), None


def scanned(length):
    return nn.scan(
        LinenBlock,
        variable_axes={"params": 0, "feature_moments": 0},
        split_rngs={"params": True},
        length=length,
    )


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        return scanned(3)(name="blocks")(x, None)[0]


class LinenList(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in range(3):
            x, _ = LinenBlock(name=f"block_{n}")(x, None)
        return x


def nnx_models():
    def layer(rngs):
        return nnx.Linear(4, 4, rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(layer, in_axes=0, out_axes=0))(rngs)

        def __call__(self, x):
            def forward(layer, x):
                return nnx.tanh(layer(x))

            return nnx.scan(forward, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)

    class List(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([layer(rngs) for _ in range(3)])

        def __call__(self, x):
            for layer in self.blocks:
                x = nnx.tanh(layer(x))
            return x

    return Stack(nnx.Rngs(0)), List(nnx.Rngs(0))


def radii_after(params, rules, moments):
    """ℜ after the first epoch, of one update."""
    plan = fg.plan(params, rules)
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = fg.fgsgd(0.1, plan, rescaling=fg.Rescaling(every=1, max_change=None))
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params, feature_moments=moments(params))
    return fg.radii(state)


SLICES = {"view": "i o -> 1 o i 1"}


def test_linen_layers_whose_moments_a_scan_drops_are_named(users_settings):
    """Else λ would stay 1 for them in silence."""

    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="first")(x)
            scanned = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scanned(name="blocks")(x, None)[0]

    x = jnp.ones((2, 4))
    params = Dropping().init(jax.random.key(0), x)
    with pytest.warns(UserWarning, match=r'blocks/dense/kernel .*variable_axes=\{"params": 0, "feature_moments": 0\}'):
        _, observed = fg.linen.observe(Dropping()).apply(params, x)
    assert list(fg.linen.moments(observed)) == ["first/kernel"]


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_lambda_of_layers_under_scan_is_that_of_the_layers(framework, users_settings):
    """The moments that `observe` collects arrive per layer, and every layer of the stack gets its own ℜ."""
    x = 3 * jax.random.normal(jax.random.key(1), (16, 4))
    if framework == "linen":
        stack, layers = LinenStack(), LinenList()
        params = stack.init(jax.random.key(0), x)["params"]
        listed = {f"block_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], params["blocks"]) for n in range(3)}
        names = [f"block_{n}/dense/kernel" for n in range(3)]

        def moments_of(model, weights):
            return lambda _: fg.linen.observe(model).apply({"params": weights}, x)[1]["feature_moments"]

        of_stack, of_list = moments_of(stack, params), moments_of(layers, listed)
        path = "blocks/dense/kernel"
        assert fg.linen.moments({"feature_moments": of_stack(None)})[path].mean.shape == (3, 4)
    else:
        stack, layers = nnx_models()
        for n, layer in enumerate(layers.blocks):
            layer.kernel[...], layer.bias[...] = stack.blocks.kernel[n], stack.blocks.bias[n]
        for model in (fg.nnx.observe(stack), fg.nnx.observe(layers)):
            nnx.jit(lambda model, x: model(x))(model, x)
        params, listed = (nnx.state(model, nnx.Param) for model in (stack, layers))
        names, path = [f"blocks/{n}/kernel" for n in range(3)], "blocks/kernel"
        of_stack, of_list = lambda _: fg.nnx.moments(stack), lambda _: fg.nnx.moments(layers)
        assert fg.nnx.moments(stack)[path].mean.shape == (3, 4)
    together = radii_after(params, [("kernel", fg.Each(fg.Sphere(), layers=1, **SLICES)), ("*", None)], of_stack)[path]
    alone = radii_after(listed, [("kernel", fg.Each(fg.Sphere(), **SLICES)), ("*", None)], of_list)
    for n, name in enumerate(names):
        np.testing.assert_allclose(together[n], alone[name], rtol=1e-5)
    assert np.ptp(np.asarray(together)[:, 0, 0]) > 0.1  # 3 times the unit at the first, less after tanh


@pytest.mark.parametrize(
    ("shape", "channels", "axes", "view"),
    [
        ((3, 3, 4, 6), (4,), (-2,), "slices"),
        ((3, 3, 2, 6), (4,), (-2,), "slices"),  # two groups of channels
        ((2, 4, 5), (2, 4), (0, 1), "h d e -> 1 h d e"),
    ],
    ids=["kernel", "grouped", "attention's output"],
)
@pytest.mark.parametrize("named", [False, True], ids=["axes of a layer", "axes of the stack"])
def test_moments_of_stacks_are_those_of_the_layers(shape, channels, axes, view, named):
    """As linen's `scan` stacks them, and as NNX reports them."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.uniform(1, 2, (2, 3, *channels))) for _ in range(3)]
    of_stack = (0, 1, *(axis if axis < 0 else axis + 2 for axis in axes)) if named else axes
    scheme = fg.Each(fg.Sphere(), view=view, layers=2)
    split = fg.plan({"w": jnp.zeros((2, 3, *shape))}, [("w", scheme)])["w"].view
    found = matrix_moments(fg.FeatureMoments(*arrays, of_stack), split, (2, 3, *shape), 2)
    for index in np.ndindex(2, 3):
        alone = matrix_moments(fg.FeatureMoments(*(x[index] for x in arrays), axes), split, shape)
        np.testing.assert_allclose(found.std[index], alone.std, rtol=1e-12)


def test_moments_that_are_not_stacked_are_refused():
    params = {"w": jnp.ones((3, 4, 4), jnp.float32)}
    with pytest.raises(ValueError, match=r"w: .*not stacked over layers"):
        radii_after(
            params,
            [("*", fg.Each(fg.Sphere(), layers=1, **SLICES))],
            lambda _: {"w": fg.FeatureMoments(*(jnp.ones(4, jnp.float32) for _ in range(3)))},
        )
