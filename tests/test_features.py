"""What enters each weight: moments against NumPy on recorded activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import fgsgd_jax as fg
from fgsgd_jax.features import batch_moments, merge_moments, merge_over

# --- the arithmetic


def close(moments, x, axes):
    """The moments are NumPy's, in float64, to 1e-6 of the scale of the data."""
    x = np.asarray(x, np.float64)
    reduced = tuple(axis for axis in range(x.ndim) if axis not in [a % x.ndim for a in axes])
    scale = np.abs(x).max()
    np.testing.assert_allclose(moments.mean, x.mean(reduced), rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(moments.std, x.std(reduced), rtol=0, atol=1e-6 * scale)
    np.testing.assert_array_equal(moments.count, np.full(moments.mean.shape, x.size // moments.mean.size))


def test_merging_parts_is_the_whole_even_far_from_zero():
    x = 1e4 + jax.random.normal(jax.random.key(0), (7, 50, 3), jnp.float32)
    merged = batch_moments(x[0], (-1,))
    for part in x[1:]:
        merged = merge_moments(merged, batch_moments(part, (-1,)))
    # The sum of squares would have lost every digit of the variance here.
    np.testing.assert_allclose(merged.std, np.asarray(x, np.float64).std((0, 1)), rtol=2e-3)
    np.testing.assert_allclose(merged.mean, np.asarray(x, np.float64).mean((0, 1)), rtol=1e-6)


def test_merging_with_nothing_changes_nothing():
    some = batch_moments(jax.random.normal(jax.random.key(0), (5, 3)), (-1,))
    nothing = jax.tree.map(jnp.zeros_like, some)
    for a, b in ((some, nothing), (nothing, some)):
        jax.tree.map(np.testing.assert_array_equal, merge_moments(a, b), some)


def test_pooling_is_the_union():
    x = jax.random.normal(jax.random.key(0), (40, 3)) * jnp.array([[1.0, 5.0, 0.1]]) + jnp.array([[0.0, 3.0, -2.0]])
    pooled = merge_over(batch_moments(x, (-1,)), axis=0)
    np.testing.assert_allclose(pooled.std, np.std(x), rtol=1e-6)


def test_devices_together_see_what_one_device_sees():
    x = jax.random.normal(jax.random.key(0), (4, 10, 3)) + jnp.arange(4.0).reshape(4, 1, 1)
    shards = jax.vmap(lambda part: fg.psum_moments({"k": batch_moments(part, (-1,))}, "d"), axis_name="d")(x)
    close(jax.tree.map(lambda leaf: leaf[0], shards["k"]), x, (-1,))


def test_sharded_arrays_need_nothing():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.random.normal(jax.random.key(0), (16, 5, 3)) + 2
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    close(jax.jit(lambda x: batch_moments(x, (-1,)))(placed), x, (-1,))


# --- NNX


class Model(nnx.Module):
    """One of each layer; keeps what enters them when called outside jit."""

    def __init__(self, rngs, dtype=None):
        self.conv = nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=rngs, dtype=dtype)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.shared = nnx.Linear(8, 8, rngs=rngs, dtype=dtype)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs, dtype=dtype)
        self.einsum = nnx.Einsum("...ab,bc->...ac", (8, 5), rngs=rngs, dtype=dtype)

    def __call__(self, x, record=None):
        def enters(name, x):
            if record is not None:
                record.setdefault(name, []).append(np.asarray(x, np.float64))
            return x

        x = nnx.relu(self.norm(self.conv(enters("conv/kernel", x)))).mean(1)
        x = self.shared(enters("shared/kernel", x))
        x = self.shared(enters("shared/kernel", x))
        x = self.attention(enters("attention/query/kernel", x))
        return self.einsum(enters("einsum/kernel", x))


def inputs(seed=0):
    return 1 + 3 * jax.random.normal(jax.random.key(seed), (4, 5, 6, 4), jnp.float32)


@pytest.fixture(scope="module")
def recorded():
    """What entered the layers in two calls of the model, by plain code."""
    record, model = {}, Model(nnx.Rngs(0))
    for seed in (0, 1):
        model(inputs(seed), record)
    return {path: np.concatenate([x.reshape(-1, x.shape[-1]) for x in parts]) for path, parts in record.items()}


@pytest.mark.parametrize("graph", [True, False], ids=["graph mode", "tree mode"])
def test_nnx_records_what_enters(graph, recorded):
    model = fg.nnx.observe(Model(nnx.Rngs(0)))
    pytest.importorskip("flax", minversion="0.12.4", reason="nnx.jit has no tree mode")
    call = nnx.jit(lambda model, x: model(x), graph=graph)
    call(model, inputs(0))
    call(model, inputs(1))
    moments = fg.nnx.moments(model)
    assert set(recorded) < set(moments)
    assert moments["attention/out/kernel"].mean.shape == (2, 4)  # heads, head_dim
    for path, x in recorded.items():
        close(moments[path], x, (-1,))
    fg.nnx.clear(model)
    assert all(not np.any(m.count) for m in fg.nnx.moments(model).values())


def test_nnx_output_and_gradient_are_those_of_the_plain_model():
    plain, observed = Model(nnx.Rngs(0)), fg.nnx.observe(Model(nnx.Rngs(0)))
    slope = nnx.jit(nnx.value_and_grad(lambda model, x: jnp.sum(model(x) ** 2)))
    (a, grads), (b, observed_grads) = slope(plain, inputs()), slope(observed, inputs())
    assert a == b
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(grads), nnx.to_pure_dict(observed_grads))


def test_nnx_records_nothing_in_evaluation_and_stops_on_request():
    model = fg.nnx.observe(Model(nnx.Rngs(0)))
    assert isinstance(model.conv, nnx.Conv)
    model.eval()
    model(inputs())
    assert not np.any(fg.nnx.moments(model)["conv/kernel"].count)
    model.train()
    model(inputs())
    assert np.all(fg.nnx.moments(model)["conv/kernel"].count == 120)
    fg.nnx.unobserve(model)
    assert type(model.conv) is nnx.Conv
    with pytest.raises(ValueError, match="observe"):
        fg.nnx.moments(model)


def test_nnx_observes_stacked_layers_under_scan_and_remat(users_settings):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def block(rngs):
        return nnx.Linear(8, 8, rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = block(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            @nnx.remat
            def forward(layer, x):
                return nnx.tanh(layer(x))

            return forward(self.layers, x)

    model = fg.nnx.observe(Stack(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (16, 8), jnp.float32)
    nnx.jit(nnx.grad(lambda model, x: jnp.sum(model(x))))(model, x)
    moments = fg.nnx.moments(model)["layers/kernel"]
    assert moments.mean.shape == (3, 8)
    for layer in range(3):
        close(jax.tree.map(lambda leaf, n=layer: leaf[n], moments), x, (-1,))
        x = jnp.tanh(x @ model.layers.kernel[layer] + model.layers.bias[layer][None])


@pytest.mark.slow
def test_nnx_keeps_float32_moments_of_a_bfloat16_model(users_settings):
    model = fg.nnx.observe(Model(nnx.Rngs(0), dtype=jnp.bfloat16))
    model(inputs())
    moments = fg.nnx.moments(model)["conv/kernel"]
    assert moments.mean.dtype == jnp.float32
    close(moments, inputs(), (-1,))


def test_observing_keeps_no_activation():
    """Peak memory of the compiled gradient grows by less than 1 %."""

    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Conv(16, 16, (3, 3), rngs=rngs) for _ in range(6)])

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.relu(layer(x))
            return x

    def peak(model):
        graphdef, state = nnx.split(model)

        def slope(state, x):
            def loss(state):
                merged = nnx.merge(graphdef, state)
                return jnp.sum(merged(x)), nnx.state(merged)

            return jax.grad(loss, has_aux=True, allow_int=True)(state)

        x = jax.ShapeDtypeStruct((32, 16, 16, 16), jnp.float32)
        return jax.jit(slope).lower(state, x).compile().memory_analysis().temp_size_in_bytes

    plain = peak(Deep(nnx.Rngs(0)))
    assert peak(fg.nnx.observe(Deep(nnx.Rngs(0)))) <= 1.01 * plain


# --- linen


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x, record=None):
        def enters(name, x):
            if record is not None:
                record.setdefault(name, []).append(np.asarray(x, np.float64))
            return x

        x = linen.Conv(8, (3, 3), feature_group_count=2)(enters("Conv_0/kernel", x))
        x = linen.relu(linen.BatchNorm(use_running_average=False)(x)).mean(1)
        shared = linen.Dense(8)
        x = shared(enters("Dense_0/kernel", x))
        x = shared(enters("Dense_0/kernel", x))
        name = "MultiHeadDotProductAttention_0/query/kernel"
        x = linen.MultiHeadDotProductAttention(2)(enters(name, x))
        return linen.Einsum((8, 5), "...ab,bc->...ac")(enters("Einsum_0/kernel", x))


def test_linen_records_what_enters():
    module = LinenModel()
    variables = module.init(jax.random.key(0), inputs())
    record = {}
    module.apply(variables, inputs(), record, mutable=["batch_stats"])
    observed = fg.linen.observe(module)
    _, updates = jax.jit(lambda v, x: observed.apply(v, x, mutable=["batch_stats"]))(variables, inputs())
    assert set(updates) == {"batch_stats", "feature_moments"}
    moments = fg.linen.moments(updates)
    kernels = {p for p in fg.groups.by_path(variables["params"]) if p.endswith("kernel")}
    assert set(moments) == kernels
    for path, parts in record.items():
        close(moments[path], np.concatenate([x.reshape(-1, x.shape[-1]) for x in parts]), (-1,))


# --- the trace and γ


@pytest.mark.parametrize(
    ("features", "kernel", "size", "literal", "glorot"),
    [
        ((16, 16), 3, 32, 0.00778, 0.0589),
        ((64, 64), 3, 32, 0.00389, 0.0295),
        ((512, 512), 3, 4, 0.00884, 0.0104),
        ((3, 64), 7, 112, 0.00112, 0.0175),
    ],
)
def test_literal_gamma_from_traced_output_sizes(features, kernel, size, literal, glorot):
    conv = nnx.eval_shape(lambda: nnx.Conv(*features, (kernel, kernel), rngs=nnx.Rngs(0)))
    trace = fg.nnx.trace(conv, jax.ShapeDtypeStruct((2, size, size, features[0]), jnp.float32))
    module = linen.Conv(features[1], (kernel, kernel))
    assert fg.linen.trace(module, jax.ShapeDtypeStruct((2, size, size, features[0]), jnp.float32)) == trace
    rules = [("kernel", fg.Each(fg.Sphere())), ("*", None)]
    params = nnx.state(conv, nnx.Param)
    assert fg.plan(params, rules, gamma=trace)["kernel"].gamma == pytest.approx(literal, rel=6e-3)
    assert fg.plan(params, rules)["kernel"].gamma == pytest.approx(glorot, rel=6e-3)
    assert fg.plan(params, rules, trace=trace)["kernel"].gamma == pytest.approx(glorot, rel=6e-3)


def test_gamma_of_dense_slices():
    dense = nnx.eval_shape(lambda: nnx.Linear(2048, 1000, rngs=nnx.Rngs(0)))
    trace = fg.nnx.trace(dense, jax.ShapeDtypeStruct((2, 2048), jnp.float32))
    rules = [("kernel", fg.Each(fg.Euclidean(), view="i o -> i o 1 1")), ("*", None)]
    for gamma in ("glorot", trace):
        assert fg.plan(nnx.state(dense, nnx.Param), rules, gamma=gamma)["kernel"].gamma == pytest.approx(
            0.0181, rel=6e-3
        )


def test_a_trace_tells_the_order_and_where_scales_are_forgotten():
    trace = fg.nnx.trace(Model(nnx.Rngs(0)), jax.ShapeDtypeStruct((2, 5, 6, 4), jnp.float32))
    assert trace.order(["einsum/kernel", "shared/kernel", "conv/kernel"]) == (
        "conv/kernel",
        None,
        "shared/kernel",
        "einsum/kernel",
    )
