"""What the two operations do with layers: all at once, under JAX's transformations, and on which platform."""

import dataclasses
import functools
import math
import os
import subprocess
import sys

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec as P
from layer_examples import FEW, LENGTHS, MIX, OTHER_RETRACTIONS, example

import fgsgd_jax as fg
from fgsgd_jax import kernels
from fgsgd_jax.kernels import _api, _cpu_lengths, _cpu_matrices, _cpu_planes, _matrices, _reference
from fgsgd_jax.kernels._by_platform import Program
from fgsgd_jax.kernels._layers import Layer, Layers, Operation
from fgsgd_jax.manifolds import Mixture


def arrays(its):
    """Points, directions (without those that are no numbers) and new radii of an example's layers."""
    layers = its.layers(np.nan_to_num(its.w), True)
    return [[getattr(layer, name) for layer in layers] for name in ("x", "w", "new_radius")]


def operations(mixtures, x, w, radii, factor, is_exact=True):
    return kernels.tangent(mixtures, x, w, is_exact), kernels.step(mixtures, x, w, radii, factor)


def alone(mixtures, x, w, radii, factor):
    """The definition, layers of one mixture after the other."""

    def split(found, like):
        return tuple(jnp.split(found[0], np.cumsum([len(a) for a in like])[:-1])), found[1]

    x, own = list(map(jnp.concatenate, x)), list(map(jnp.concatenate, w))
    tangents = [split(_reference.tangent(*row), like) for *row, like in zip(mixtures, x, own, w, strict=True)]
    steps = [
        split(_reference.step(m, x, own, r, jnp.asarray(factor, x.dtype), False), like)
        for m, x, own, r, like in zip(mixtures, x, own, radii, w, strict=True)
    ]
    return tuple(tuple(map(list, zip(*pairs, strict=True))) for pairs in (tangents, steps))


def all_close(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, **tolerance)


def test_which_form_serves_is_decided_by_exact_type_and_shape():
    """A fast form that is never taken would pass every other test."""

    class Own(fg.Sphere):
        pass

    def on_cpu(manifolds, n, p, count, is_shared=False):
        return _api.form_for("cpu", Program(is_shared, is_exported=False), manifolds, n, p, count)

    assert on_cpu(MIX, 3, 3, 1024) is _cpu_planes
    assert on_cpu(LENGTHS, 64, 3, 1024) is _cpu_lengths
    assert on_cpu((fg.Sphere(),), 3, 5, 1) is _cpu_lengths
    assert on_cpu(MIX, 64, 64, 512) is _cpu_matrices
    assert on_cpu(MIX, 64, 64, 4) is _cpu_matrices
    assert on_cpu(MIX, 3, 3, 1024, is_shared=True) is _reference
    for manifolds in ((Own(),), (fg.Stiefel(), Own()), OTHER_RETRACTIONS):
        assert on_cpu(manifolds, 3, 3, 1024) is _reference
    for n, p, count in ((3, 3, 0), (0, 3, 1024), (3, 0, 1024), (16, 8, 4), (2, 5, 1024)):
        assert on_cpu(MIX, n, p, count) is _reference
    assert _matrices.TPU.serves(MIX, 65, 8, 1)
    assert _matrices.TPU.serves((fg.Stiefel(),), 8, 80, 1)
    for manifolds, n, p in (
        (MIX, 3, 3),
        (LENGTHS, 64, 64),
        ((Own(),), 64, 64),
        ((fg.Stiefel(retraction="qr"),), 64, 64),
    ):
        assert not _matrices.TPU.serves(manifolds, n, p, 1)


def one_pass(a, b):
    """A product as TPUs have it: of bfloat16, summed in float32."""
    return jnp.matmul(*(x.astype(jnp.bfloat16) for x in (a, b)), preferred_element_type=jnp.float32)


@pytest.mark.parametrize("start", ["random", "permutation"])
@pytest.mark.parametrize("shape", [(96, 24), (32, 40)])
def test_products_of_few_passes_keep_the_constraint(shape, start, monkeypatch):
    """On CPU all products are exact: here they are those of a TPU. Nothing averages out where y has one entry a row."""
    monkeypatch.setattr(_matrices, "_one_pass", one_pass)
    monkeypatch.setattr(_matrices, "_LARGE", 24)  # four squares, of the first shape
    stiefel, rng = (fg.Stiefel(),), np.random.default_rng(0)
    x = (
        rng.standard_normal((6, *shape))
        if start == "random"
        else np.eye(*shape)[rng.permutation(shape[0])] * np.ones((6, 1, 1))
    )
    s = np.exp(rng.uniform(-3, 1, 6))
    x = np.asarray(h.nearest("stiefel", x, s), np.float32)
    w = h.spread(s) * rng.standard_normal(x.shape) / math.prod(shape) ** 0.5
    own = Layer(*(jnp.asarray(a, jnp.float32) for a in (x, w)), None, jnp.asarray(s, jnp.float32))
    exact = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), own)
    line_5, line_7 = Operation(stiefel, is_step=False), Operation(stiefel, is_step=True)

    @functools.partial(jax.jit, static_argnums=0)
    def found(operation, factor=1.0):
        layers = Layers((own.x,), (own.w,), *own[2:])
        (((array,), figures),) = _matrices.TPU.run(operation, [layers], jnp.asarray(factor, jnp.float32))
        return array, figures

    @functools.partial(jax.jit, static_argnums=0)
    def expected(operation, factor=1.0, layer=exact):
        return _reference.of_layer(operation, layer, jnp.asarray(factor, jnp.float64))

    t, square = found(line_5)
    its_t, its_square = expected(line_5)
    error = np.asarray(t, np.float64) - np.asarray(its_t)
    tangent_error, _ = expected(line_5, layer=exact._replace(w=jnp.asarray(error)))
    assert np.max(h.norm(np.asarray(tangent_error)) / h.norm(w)) <= 2e-5
    # The normal part of it, and its square in that of the length.
    assert np.max(h.norm(error) / h.norm(w)) <= 2**-8
    assert np.max(np.abs(np.asarray(square) - np.asarray(its_square)) / h.norm(w) ** 2) <= 2**-16
    t, _ = found(line_5._replace(is_exact=True))
    assert np.max(h.norm(np.asarray(t, np.float64) - np.asarray(its_t)) / h.norm(w)) <= 5e-7
    for length in (1e-6, 1e-3, 0.01, 0.1, 1.0, 30.0, 1e4):
        (move, _), (its_move, _) = found(line_7, length), expected(line_7, length)
        assert np.max(h.violation("stiefel", np.asarray(x + np.asarray(move), np.float64), s)) <= 6e-7, length
        if length <= 1:
            # Beside the step, what rounding a point does.
            limit = 5e-4 * h.norm(np.asarray(its_move)) + 1e-6 * s * min(shape) ** 0.5
            assert np.all(h.norm(np.asarray(move) - np.asarray(its_move)) <= limit), length


def test_layers_of_all_sizes_and_manifolds_at_once():
    """Whatever is joined with what: every layer is answered in its place."""
    examples = [
        example(MIX, (3, 3), ((2, 130),), "float32"),
        example(LENGTHS, (2, 5), ((4, 10), (1, 2)), "float32"),
        example((fg.Stiefel(),), (3, 3), ((3, 8),), "float64"),
    ]
    layers = [layer for its in examples for layer in zip(its.mixtures(), *arrays(its), strict=True)]
    # Neighbours of different kinds.
    order = np.random.default_rng(0).permutation(len(layers))
    mixtures, x, w, radii = (list(parts) for parts in zip(*(layers[i] for i in order), strict=True))
    found, expected = (jax.jit(f)(mixtures, x, w, radii, -0.3) for f in (operations, alone))
    all_close(found, expected, rtol=1e-4, atol=1e-5)
    assert kernels.tangent([], [], []) == kernels.step([], [], []) == ([], [])


def test_no_matrices_and_one_radius_for_all():
    stiefel = (fg.Stiefel(),)
    rng = np.random.default_rng(0)
    x = [[jnp.asarray(h.point("stiefel", rng, (*grid, 3, 3), 0.5), jnp.float32)] for grid in FEW]
    w = [[jnp.asarray(rng.standard_normal(a.shape), jnp.float32)] for (a,) in x]
    found, expected = (
        jax.jit(operations)([Mixture(stiefel, None, s) for s in radii], x, w, None, -0.3)
        for radii in ([0.5] * 3, [jnp.full(grid, 0.5, jnp.float32) for grid in FEW])
    )
    all_close(found, expected, atol=1e-6)
    for size in ((3, 3), (64, 64)):
        empty = jnp.zeros((0, 4, *size), jnp.float32)
        for operation in (kernels.tangent, kernels.step):
            ((array,),), (figure,) = operation([Mixture(stiefel, None)], [[empty]], [[empty]])
            assert (array.shape, figure.shape) == (empty.shape, (0, 4))


@pytest.mark.parametrize(("count", "shape"), [(1, (4200, 1)), (1, (1, 4200)), (1021, (40, 32))])
def test_one_column_and_a_count_that_nothing_divides(count, shape):
    """A single matrix of one column, and more matrices than are taken at once, in a number without divisors."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(h.point("stiefel", rng, (count, 1, *shape)), jnp.float32)
    w = jnp.asarray(0.01 * rng.standard_normal(x.shape), jnp.float32)
    manifold = fg.Stiefel()
    (((displacement,),), _) = jax.jit(functools.partial(kernels.step, [Mixture((manifold,), None)]))([[x]], [[w]])
    expected = jax.jit(lambda x, w: manifold.retract(x, manifold.project(x, w)) - x)(x, w)
    np.testing.assert_allclose(displacement, expected, atol=1e-6)


def test_a_small_radius_is_no_zero():
    """What is next to nothing is told in radii: a point of a radius that float32 holds moves at any of them."""
    sphere = (fg.Sphere(),)
    x = jnp.full((4, 1, 40, 1), 2e-16 / 40**0.5, jnp.float32)
    w = jnp.asarray(np.random.default_rng(0).standard_normal(x.shape), jnp.float32)
    mixture = Mixture(sphere, None, jnp.full((4, 1), 2e-16, jnp.float32))
    for form in (_cpu_lengths, _reference):
        layers = [Layers((x,), (w,), None, mixture.radius)]
        (((displacement,), _),) = form.run(Operation(sphere, is_step=True), layers, jnp.float32(1e-17))
        assert np.min(h.norm(np.asarray(displacement) / 2e-16)) > 0.1


def test_a_manifold_of_ones_own_is_never_replaced():
    """Also by a subclass of a built-in one, in numbers that a fast form would handle."""

    @dataclasses.dataclass(frozen=True)
    class Still(fg.Sphere):
        def _project(self, x, g):
            return jnp.zeros_like(g)

    rng = np.random.default_rng(0)
    x = jnp.asarray(h.point("sphere", rng, (1030, 3, 3)), jnp.float32)
    w = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    kind = np.arange(1030) % 2
    for manifolds in ((Still(),), (fg.Sphere(), Still())):
        mixture = Mixture(manifolds, jnp.asarray(kind) if len(manifolds) > 1 else None)
        own = kind == 1 if len(manifolds) > 1 else kind >= 0
        program = jax.jit(functools.partial(operations, [mixture], radii=None, factor=1.0))
        (((t,),), (squares,)), (((displacement,),), (ratio,)) = program([[x]], [[w]])
        assert np.max(np.abs(t[own])) == np.max(squares[own]) == np.max(ratio[own]) == 0
        assert np.max(np.abs(displacement[own])) < 1e-6
        others = h.norm(np.asarray(displacement)[~own])
        assert np.all(others > 0.1)

    params = {"kernel": jnp.zeros((3, 3, 32, 33), jnp.float32)}
    rules = [("kernel", fg.Each(Still()))]
    params = fg.initialize(jax.random.key(0), params, rules)
    tx = fg.fgsgd(0.1, rules)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert np.max(np.abs(updates["kernel"])) < 1e-7


# --- under JAX's transformations

FORMS = pytest.mark.parametrize(
    ("manifolds", "shape"),
    [
        pytest.param(MIX, (3, 3), id="planes"),
        pytest.param(LENGTHS, (40, 2), id="lengths", marks=pytest.mark.slow),
        pytest.param((fg.Stiefel(),), (12, 9), id="xla", marks=pytest.mark.slow),
    ],
)


@FORMS
def test_gradients_are_those_of_the_definition(manifolds, shape):
    """A loop whose length is found at run time has none of its own."""
    its = example(manifolds, shape, ((130, 2), (2, 20)), "float64")
    x, w, radii = arrays(its)
    # At no point there is no derivative.
    x = jax.tree.map(lambda a: jnp.where(jnp.any(a, (-2, -1), keepdims=True), a, 1), x)

    def loss(numbers, factor, operations):
        radius, *others = numbers
        mixtures = [mixture.with_radius(own) for mixture, own in zip(its.mixtures(), radius, strict=True)]
        return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in jax.tree.leaves(operations(mixtures, *others, factor)))

    numbers, factor = ([mixture.radius for mixture in its.mixtures()], x, w, radii), jnp.asarray(-0.3)
    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, operations=f), argnums=(0, 1)))(numbers, factor)
        for f in (operations, alone)
    )
    all_close(found, expected, rtol=1e-8, atol=1e-8)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found[1]))


@FORMS
def test_vmap_is_one_after_the_other(manifolds, shape):
    """As of replicas of one plan: the turns of an iteration are then those of the longest step."""
    its = example(manifolds, shape, ((130, 2), (2, 20)), "float32")
    x, w, _ = arrays(its)

    def scaled(scale):
        return operations(its.mixtures(), x, jax.tree.map(lambda a: jnp.sqrt(scale) * a, w), None, -jnp.sqrt(scale))

    scales = jnp.asarray([0.01, 20.0], jnp.float32)
    together = jax.jit(jax.vmap(scaled))(scales)
    one_by_one = [jax.jit(scaled)(scale) for scale in scales]
    all_close(together, jax.tree.map(lambda *parts: jnp.stack(parts), *one_by_one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("manifolds", "shape"),
    [(MIX, (3, 3)), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((LENGTHS, (40, 2)), (MIX, (64, 64))))],
    ids=["planes", "lengths", "chunks"],
)
@pytest.mark.parametrize("differing", [(0, 1), (2,), (3,)], ids=["weights", "radii", "rate"])
def test_numbers_that_differ_by_device(manifolds, shape, differing):
    """As an ensemble's under `shard_map`, whose types say so."""
    its = example(manifolds, shape, ((130, 2), (2, 20)), "float32")
    mesh = jax.make_mesh((1,), ("seed",), axis_types=(AxisType.Auto,))
    numbers = (*arrays(its), jnp.asarray(-0.3, jnp.float32))

    def changed(leaf_of, numbers):
        return [jax.tree.map(leaf_of, a) if i in differing else a for i, a in enumerate(numbers)]

    def own(*numbers):
        _, step = operations(its.mixtures(), *changed(lambda leaf: leaf[0], numbers))
        return jax.tree.map(lambda leaf: leaf[None], step)

    specs = tuple(P("seed") if i in differing else P() for i in range(4))
    each = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P("seed")))
    found = jax.tree.map(lambda leaf: leaf[0], each(*changed(lambda leaf: leaf[None], numbers)))
    _, expected = jax.jit(operations)(its.mixtures(), *numbers)
    all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_work_that_is_shared_out_gives_the_same():
    its = example((fg.Stiefel(),), (12, 8), ((5, 5), (2, 3)), "float32")
    x, w, _ = arrays(its)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    found, expected = (kernels.step(its.mixtures(), x, w, factor=-0.3, share_out=m) for m in (mesh, None))
    all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_euclidean_matrices_do_not_move_without_a_direction():
    """A length that changes by round-off in every step changes by a percent in a training."""
    its = example(MIX, (3, 3), ((130, 2), (2, 20)), "float32")
    x, w, _ = arrays(its)
    nowhere, mixtures = jax.tree.map(jnp.zeros_like, w), its.mixtures()
    step = jax.jit(functools.partial(kernels.step, mixtures))
    for given in (None, [mixture.radius for mixture in mixtures]):
        moved, _ = its.in_one_row(list(zip(*step(x, nowhere, given), strict=True)))
        assert not np.any(np.asarray(moved)[its.on(fg.Euclidean)])


@pytest.mark.parametrize("count", [1, 3])
def test_stacked_values_come_apart(count):
    stacked = np.random.default_rng(0).standard_normal((count, 4, 3))
    found = jax.jit(kernels.unstack)(jnp.asarray(stacked))
    np.testing.assert_array_equal(np.stack(found), stacked)


# --- on other platforms, and on several devices


@pytest.mark.parametrize(("manifolds", "shape"), [(MIX, (3, 3)), (LENGTHS, (70, 3))], ids=["planes", "lengths"])
def test_what_pleases_one_compiler_is_in_no_other_program(manifolds, shape):
    """Barriers, blocks and sums by products are for CPU; elsewhere the program is that of the definition."""
    its = example(manifolds, shape, ((130, 2), (2, 20)), "float32")
    numbers = (*arrays(its), jnp.zeros((), jnp.float32))
    allowed = export.DisabledSafetyCheck.custom_call("LayoutConstraint")

    def lowered(platform):
        program = jax.jit(lambda *numbers: operations(its.mixtures(), *numbers))
        return export.export(program, platforms=(platform,), disabled_checks=[allowed])(*numbers).mlir_module()

    own = "stablehlo.optimization_barrier" if shape == (3, 3) else "stablehlo.dot_general"
    assert own in lowered("cpu")
    for platform in ("tpu", "cuda"):
        assert own not in lowered(platform)


@pytest.mark.parametrize(("is_exact", "of_tangent"), [(False, 3), (True, 6 + 6)])
def test_products_of_few_passes_are_those_of_the_tpu_program(is_exact, of_tangent):
    """Those of full precision would compile for minutes; exact tangent vectors take six passes for each product."""
    its = example((fg.Stiefel(),), (32, 24), ((3, 5), (3, 5)), "float32")
    numbers = (*arrays(its), jnp.zeros((), jnp.float32))
    program = jax.jit(lambda *numbers: operations(its.mixtures(), *numbers, is_exact=is_exact))
    allowed = export.DisabledSafetyCheck.custom_call("LayoutConstraint")
    text = export.export(program, platforms=("tpu",), disabled_checks=[allowed])(*numbers).mlir_module()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert not any("HIGH" in line for line in products)
    # Of two layers.
    assert sum("bf16" in line for line in products) == 2 * (of_tangent + 3 + 4)
    assert len(products) == 2 * (of_tangent + 3 + 5)


@pytest.mark.parametrize("shared", [False, True])
def test_squares_of_an_array_are_taken_one_by_one_unless_it_is_shared_out(shared, monkeypatch):
    """A square that several devices have a part of would be gathered."""
    monkeypatch.setattr(_matrices, "_LARGE", 16)
    x = jax.ShapeDtypeStruct((1, 1, 16, 48), jnp.float32)
    layers = Layers((x,), (x,), None, jax.ShapeDtypeStruct((1, 1), jnp.float32))
    operation = Operation((fg.Stiefel(),), is_step=True, is_shared=shared)
    program = jax.jit(lambda layers: _matrices.TPU.run(operation, [layers], jnp.float32(0.1)))
    text = str(program.trace(layers).jaxpr)
    assert ("dynamic_slice" in text) != shared
    assert text.count("dot_general") == 3 + 5


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import fgsgd_jax as fg
from fgsgd_jax import kernels
from fgsgd_jax.manifolds import Mixture

rng = np.random.default_rng(0)
mixed = (fg.Sphere(), fg.Oblique(), fg.Stiefel())
kind = rng.integers(0, 3, (16, 32))
mixture = Mixture(mixed, jnp.asarray(kind), jnp.asarray(rng.uniform(0.1, 2, (16, 32)), jnp.float32))
x = mixture.nearest(jnp.asarray(rng.standard_normal((16, 32, 3, 3)), jnp.float32))
w = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

def operations(mixtures, x, w):
    return kernels.tangent(mixtures, x, w), kernels.step(mixtures, x, w, None, -0.1)

def put(a):
    return jax.device_put(a, NamedSharding(mesh, P(None, "model")))

expected = jax.jit(operations)([mixture] * 2, [[x], [x]], [[w], [2 * w]])
mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
here = jax.tree.map(put, ([mixture] * 2, [[x], [x]], [[w], [2 * w]]))
program = jax.jit(operations).lower(*here).compile()
for name in ("all-gather", "all-to-all", "collective-permute"):
    assert name not in program.as_text(), name
for found, known in zip(jax.tree.leaves(program(*here)), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(found, known, rtol=1e-5, atol=1e-5)
    assert not found.sharding.is_fully_replicated
"""


def test_layers_over_several_devices_stay_where_they_are():
    """Joined, they would lose the axes along which they are sharded."""
    devices = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"}
    run = subprocess.run([sys.executable, "-c", SHARDED], env=os.environ | devices, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
