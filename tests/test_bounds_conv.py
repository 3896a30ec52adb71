"""Convolutions as operators against their explicit matrices, and networks of them against what they do to inputs."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgsgd_jax as fg
from fgsgd_jax.bounds import Chain, Sum


def padded(geometry, window):
    """(before, after) of both axes, from the definitions of Flax; the pads of circular padding wrap."""
    sides = []
    for axis, length in enumerate(window):
        span, size, stride = (length - 1) * geometry.dilation[axis] + 1, geometry.size[axis], geometry.strides[axis]
        if geometry.padding == "VALID":
            sides.append((0, 0))
        elif geometry.padding == "CIRCULAR":
            sides.append(((span - 1) // 2, span // 2))
        elif geometry.padding == "SAME":
            total = max((-(-size // stride) - 1) * stride + span - size, 0)
            sides.append((total // 2, total - total // 2))
        else:
            sides.append(geometry.padding[axis])
    return sides


def operator(kernel, geometry):
    """The matrix of a convolution, entry by entry, from an input as a vector to its output as one."""
    height, width, per_group, filters = kernel.shape
    sides = padded(geometry, (height, width))
    outputs = [
        (size + sum(side) - (length - 1) * dilation - 1) // stride + 1
        for size, side, length, dilation, stride in zip(
            geometry.size, sides, (height, width), geometry.dilation, geometry.strides, strict=True
        )
    ]
    matrix = np.zeros((*outputs, filters, *geometry.size, per_group * geometry.groups))
    for o, p, a, b in itertools.product(*map(range, (*outputs, height, width))):
        i = o * geometry.strides[0] + a * geometry.dilation[0] - sides[0][0]
        j = p * geometry.strides[1] + b * geometry.dilation[1] - sides[1][0]
        if geometry.padding == "CIRCULAR":
            i, j = i % geometry.size[0], j % geometry.size[1]
        if 0 <= i < geometry.size[0] and 0 <= j < geometry.size[1]:
            for f in range(filters):
                first = f // (filters // geometry.groups) * per_group
                matrix[o, p, f, i, j, first : first + per_group] += kernel[a, b, :, f]
    return matrix.reshape(math.prod(outputs) * filters, -1)


def operator_norm(kernel, geometry):
    return np.linalg.norm(operator(np.asarray(kernel, np.float64), geometry), 2)


def random_layer(seed):
    """A kernel and its geometry: strides, paddings, groups and dilation at random, and kernels of several kinds."""
    rng = np.random.default_rng(seed)
    while True:
        window = rng.choice([1, 2, 3, 5], 2, p=[0.15, 0.15, 0.55, 0.15])
        groups = int(rng.choice([1, 1, 2, 3]))
        padding = ["SAME", "VALID", "CIRCULAR", 1, ((0, 1), (2, 1)), 0][rng.integers(6)]
        try:
            geometry = fg.ConvGeometry(
                size=tuple(rng.integers(3, 10, 2).tolist()),
                strides=tuple(rng.choice([1, 1, 2, 3], 2).tolist()),
                padding=padding,
                groups=groups,
                dilation=tuple(rng.choice([1, 1, 1, 2], 2).tolist()),
            )
            geometry.output_size(tuple(window.tolist()))
        except ValueError:
            continue
        shape = (*window, int(rng.integers(1, 5)), groups * int(rng.integers(1, 5)))
        kernel = rng.standard_normal(shape)
        kind = rng.integers(4)
        if kind == 1:  # low-pass: the norm is at frequency zero, where padding matters most
            kernel = np.abs(kernel)
        elif kind == 2:  # a single direction in channels
            kernel = kernel[..., :1, :1] * rng.standard_normal(shape[2:])
        elif kind == 3:
            kernel = kernel * (rng.random(shape) < 0.3)
        return jnp.asarray(kernel, jnp.float32 if seed % 2 else jnp.float64), geometry


# --- operator norms


SEEDS = [pytest.param(seed, marks=() if seed < 3 else pytest.mark.slow) for seed in range(100)]


@pytest.mark.parametrize("seed", SEEDS)
def test_certified_norms_of_random_layers_lie_above_the_operator_and_within_half_of_it(seed):
    kernel, geometry = random_layer(seed)
    norms = fg.conv_norms({"k": kernel}, {"k": geometry})["k"]
    exact = operator_norm(kernel, geometry)
    # The norm that it is judged by rounds in float64.
    assert exact * (1 - 1e-13) <= float(norms.certified) <= 1.5 * exact + 1e-30
    tolerance = {"rtol": 1e-5 if kernel.dtype == jnp.float32 else 1e-12, "atol": 1e-12}
    matrix = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
    np.testing.assert_allclose(norms.reshaped, np.linalg.norm(matrix, 2), **tolerance)
    np.testing.assert_allclose(norms.circular, operator_norm(kernel, geometry.on_torus()), **tolerance)


def test_the_operators_of_this_file_are_those_of_jax():
    for seed in range(5):
        kernel, geometry = random_layer(seed)
        if geometry.padding == "CIRCULAR":
            continue
        shape = (*geometry.size, kernel.shape[2] * geometry.groups)
        x = jnp.asarray(np.random.default_rng(seed).standard_normal((1, *shape)), kernel.dtype)
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            geometry.strides,
            padded(geometry, kernel.shape[:2]),
            rhs_dilation=geometry.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=geometry.groups,
        )
        found = operator(np.asarray(kernel, np.float64), geometry) @ np.asarray(x, np.float64).ravel()
        np.testing.assert_allclose(found, np.asarray(y).ravel(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_larger_layer_takes_the_torus_and_stays_within_a_few_percent():
    """Too large to be unrolled, as the layers of real networks are."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, 6, 6))
    geometry = fg.ConvGeometry((12, 12), padding=1)
    norms = fg.conv_norms({"k": jnp.asarray(kernel)}, {"k": geometry})["k"]
    exact = operator_norm(kernel, geometry)
    assert exact <= norms.certified <= 1.05 * exact


def test_a_reshaped_norm_of_one_is_no_lipschitz_constant():
    """Stiefel weights: the reshaped kernel is orthogonal, the convolution stretches by up to √(A·B)."""
    kernel = jnp.full((3, 3, 1, 1), 1 / 3)
    norms = fg.conv_norms({"k": kernel}, {"k": fg.ConvGeometry((16, 16), padding="CIRCULAR")})["k"]
    np.testing.assert_allclose(norms.reshaped, 1)
    np.testing.assert_allclose(norms.circular, 3)
    assert 3 <= norms.certified <= 3 * 1.001


def test_dense_layers_vectors_and_scales():
    matrix = jnp.asarray([[3.0, 0.0], [0.0, 1.0]])
    norms = fg.conv_norms({"w": matrix, "bias": jnp.ones(2)}, {}, scales={"w": jnp.asarray([1.0, -5.0])})
    assert list(norms) == ["w"]
    for value in norms["w"]:
        np.testing.assert_allclose(value, 5, rtol=1e-3)


@pytest.mark.parametrize(
    ("params", "geometries", "scales", "said"),
    [
        ({"k": (3, 3, 2, 2)}, {}, None, "no geometry: give it one"),
        ({"k": (3, 3, 2, 2)}, {"l": fg.ConvGeometry((4, 4))}, None, "no parameter 'l'"),
        ({"k": (3, 2)}, {"k": fg.ConvGeometry((4, 4))}, None, "needs four axes"),
        ({"k": (3, 3, 2, 3)}, {"k": fg.ConvGeometry((4, 4), groups=2)}, None, "the groups divide"),
        ({"k": (3, 2)}, {}, {"k": (3,)}, "one number per output"),
    ],
)
def test_wrong_use_names_the_path_and_the_remedy(params, geometries, scales, said):
    scales = scales and {path: jnp.ones(shape) for path, shape in scales.items()}
    with pytest.raises(ValueError, match=said):
        fg.conv_norms({path: jnp.ones(shape) for path, shape in params.items()}, geometries, scales)


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": (0, 3)},
        {"size": (8, 8), "strides": 0},
        {"size": (8, 8), "padding": "same"},
        {"size": (8, 8), "groups": 0},
    ],
    ids=str,
)
def test_what_is_no_geometry_is_refused(arguments):
    with pytest.raises(ValueError, match="ConvGeometry"):
        fg.ConvGeometry(**arguments)


# --- networks


def conv(x, kernel, geometry):
    return jax.lax.conv_general_dilated(
        x, kernel, geometry.strides, geometry.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


SIZE = 8
GEOMETRIES = {
    "stem": fg.ConvGeometry((SIZE, SIZE), padding=1),
    "a": fg.ConvGeometry((SIZE, SIZE), padding=1),
    "b": fg.ConvGeometry((SIZE, SIZE), padding=1),
    "down": fg.ConvGeometry((SIZE, SIZE), strides=2, padding=1),
}
MEAN = (SIZE * SIZE / 4) ** -0.5
NETWORKS = {
    "sequential": Chain("stem", 1, "a", 1, "b", 1, "down", 1, MEAN, "head"),
    "residual": Chain("stem", 1, Sum(1, Chain("a", 1, "b")), 1, "down", 1, MEAN, "head"),
}


def forward(kind, params, x):
    layer = {name: lambda x, name=name: conv(x, params[name], GEOMETRIES[name]) for name in GEOMETRIES}
    x = jax.nn.relu(layer["stem"](x))
    branch = layer["b"](jax.nn.relu(layer["a"](x)))
    x = jax.nn.relu(branch if kind == "sequential" else x + branch)
    x = jax.nn.relu(layer["down"](x))
    return x.mean((1, 2)) @ params["head"]


@pytest.fixture(scope="module")
def images():
    datasets = pytest.importorskip("sklearn.datasets")
    return jnp.asarray(datasets.load_digits().images[:48, ..., None] / 16)


def network(weights):
    """Weights of He's scale. Positive ones let one direction pass all layers at once, which comes near the bound."""
    rng = np.random.default_rng(0)
    shapes = {"stem": (3, 3, 1, 4), "a": (3, 3, 4, 4), "b": (3, 3, 4, 4), "down": (3, 3, 4, 8), "head": (8, 10)}
    drawn = {name: rng.standard_normal(shape) * (2 / math.prod(shape[:-1])) ** 0.5 for name, shape in shapes.items()}
    return {name: jnp.asarray(np.abs(x) if weights == "positive" else x) for name, x in drawn.items()}


def jacobian_norms(kind, params, x):
    """The spectral norm of the derivative of all scores at each input."""
    jacobians = jax.vmap(jax.jacrev(lambda one: forward(kind, params, one[None])[0]))(x)
    return jnp.linalg.norm(jacobians.reshape(len(x), 10, -1), 2, (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("weights", ["gaussian", "positive"])
def test_neither_gradients_at_real_inputs_nor_an_adversarial_search_exceed_the_bound(kind, weights, images):
    params = network(weights)
    bound = math.exp(fg.log_lipschitz(NETWORKS[kind], fg.conv_norms(params, GEOMETRIES)))
    norms = jax.jit(lambda x: jacobian_norms(kind, params, x))
    at_inputs = norms(images)
    assert at_inputs.max() <= bound

    def stretch(pair):
        """‖f(x) - f(y)‖ / ‖x - y‖, and what ascends it."""
        x, y = pair
        change = forward(kind, params, x) - forward(kind, params, y)
        distance = jnp.sqrt(jnp.sum(jnp.square(x - y), axis=(1, 2, 3)))
        return jnp.sqrt(jnp.sum(jnp.square(change), axis=1)) / distance

    @jax.jit
    def ascend(pair):
        def step(_, carry):
            pair, best = carry
            gradient = jax.grad(lambda pair: jnp.log(stretch(pair)).sum())(pair)
            length = jnp.sqrt(sum(jnp.sum(jnp.square(g), axis=(1, 2, 3), keepdims=True) for g in gradient))
            pair = tuple(x + 0.1 * g / (length + 1e-12) for x, g in zip(pair, gradient, strict=True))
            return pair, jnp.maximum(best, stretch(pair))

        return jax.lax.fori_loop(0, 200, step, (pair, stretch(pair)))

    near = images + 0.1 * jax.random.normal(jax.random.key(1), images.shape)
    (found, _), best = ascend((images, near))
    worst = max(float(best.max()), float(norms(found).max()))
    assert worst <= bound
    # A search that gets nowhere would prove nothing.
    assert worst > (1.1 * float(at_inputs.max()) if weights == "gaussian" else bound / 3)


def test_a_linear_chain_reaches_its_bound():
    """Of layers whose largest singular vectors meet, the product is the norm itself."""
    q, s = jnp.eye(4), jnp.asarray([2.0, 1.0, 1.0, 1.0])
    norms = fg.conv_norms({"a": q * s[None], "b": q * s[None]}, {})
    np.testing.assert_allclose(math.exp(fg.log_lipschitz(Chain("a", "b"), norms)), 4, rtol=5e-3)
    np.testing.assert_allclose(math.exp(fg.log_lipschitz(Sum(1, Chain("a", 0.5, "b")), norms)), 3, rtol=5e-3)


def test_deep_products_zero_and_unknown_norms():
    norms = fg.conv_norms({"a": 1e30 * jnp.eye(2), "zero": jnp.zeros((2, 2)), "nan": jnp.full((2, 2), jnp.nan)}, {})
    assert fg.log_lipschitz(Chain(*["a"] * 20), norms) == pytest.approx(600 * math.log(10), rel=1e-3)
    assert fg.log_lipschitz(Chain("a", 0.0), norms) == -math.inf
    assert fg.log_lipschitz(Chain(0.0, "nan"), norms) == math.inf
    assert fg.log_lipschitz(Sum(1.0, "nan"), norms) == math.inf
    assert fg.log_lipschitz(Chain("zero"), norms) < -600  # a bound of zero, and not below it
    assert fg.log_lipschitz(Chain(), norms) == pytest.approx(0, abs=1e-300)
    for wrong, said in (("b", "no norms of 'b'"), (-1.0, "no Lipschitz constant"), (math.nan, "no Lipschitz constant")):
        with pytest.raises(ValueError, match=said):
            fg.log_lipschitz(wrong, norms)
