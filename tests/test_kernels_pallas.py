"""The Pallas kernels, interpreted on CPU, against `fgsgd` without kernels and against the manifolds' own methods."""

import dataclasses
import functools
import re
from typing import Any

import chex
import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import fgsgd_jax as fg
from fgsgd_jax.kernels import _descend, _pallas_tpu, _pallas_triton
from fgsgd_jax.kernels._pallas_entries import Points
from fgsgd_jax.kernels._pallas_layer import LayerType
from fgsgd_jax.transforms._at_once import check_kernels

FORMS = {"tpu": _pallas_tpu, "triton": _pallas_triton}
THREE = (fg.Sphere(), fg.Oblique(), fg.Stiefel())


def entries(x):
    """[*batch, n, p] as rows of entries."""
    return [[x[..., i, j] for j in range(x.shape[-1])] for i in range(x.shape[-2])]


def matrices(entries):
    return jnp.stack([jnp.stack(row, -1) for row in entries], -2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A parameter, its scheme, and the options of `fgsgd`."""

    shape: tuple[int, ...]
    scheme: Any
    options: dict[str, Any]
    dtype: Any = jnp.float32


CASES = {
    "PIO": Case((3, 3, 4, 6), fg.PIO(THREE), {"momentum": 0.9, "rescaling": fg.Rescaling(every=2)}),
    "PO": Case((1, 3, 5, 3), fg.PO((fg.Euclidean(), fg.Stiefel())), {"momentum": 0.9, "nesterov": True}, jnp.bfloat16),
    "stacked": Case((2, 2, 2, 3, 5), fg.PI((fg.Sphere(), fg.Stiefel()), layers=1), {"rho": 0.5, "curvature": 2.0}),
    "Each": Case((3, 1, 2, 3), fg.Each(fg.Oblique()), {"momentum": 0.5}),
    "Whole": Case((3, 2, 2, 4), fg.Whole(fg.Stiefel()), {"momentum": 0.5}),
    "Euclidean": Case((2, 3, 2, 4), fg.Whole(fg.Euclidean()), {"momentum": 0.5, "weight_decay": 0.1}),
    "PI": Case((3, 3, 3, 5), fg.PI(THREE), {"momentum": 0.9, "nesterov": True}),
    "tall": Case((5, 2, 1, 11), fg.PO(THREE), {"momentum": 0.9}),
    "custom": Case(
        (2, 2, 2, 3), fg.Custom((fg.Sphere(), fg.Stiefel()), [[0, 0, 1], [1, 1, 0]], [[0, 0, 1], [1, 2, 0]]), {}
    ),
    "swapped": Case((2, 1, 70, 3), fg.PIO(THREE), {"momentum": 0.9}),
    "blocks": Case((1, 3, 70, 6), fg.PIO((fg.Sphere(), fg.Stiefel())), {"momentum": 0.9}),
}
# Each kernel once; on TPU a stack has `measure` and `move` in the place of `descend`.
FAST = {("tpu", "PIO"), ("tpu", "stacked"), ("triton", "PIO")}


def quick(values, fast):
    """The values, those that are not fast left to the long run."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


# Every group far above and below ζ = 1; no gradient; one that is refused, for its NaN or for its size.
GRADIENTS = (3.0, 0.05, 0.0, np.nan, 1e30)


@pytest.fixture
def interpreted(users_settings, monkeypatch):
    """Has programs for CPU take the kernels of a form."""
    return lambda form: monkeypatch.setitem(_descend.PALLAS, "cpu", _descend.PallasForm(FORMS[form], interpret=True))


def optimizer(case, plan, **options):
    return fg.fgsgd(0.1, plan, **CASES[case].options, **options)


@functools.cache
def steps(case):
    """Steps of `fgsgd` without kernels: of each what `update` was given and what it answered."""
    of, found = CASES[case], []
    zeros = {"kernel": jnp.zeros(of.shape, of.dtype)}
    plan = fg.plan(zeros, [("kernel", of.scheme)], seed=3)
    params = fg.initialize(jax.random.key(0), zeros, plan)
    rng, channels = np.random.default_rng(0), of.shape[-2]
    moments = fg.FeatureMoments(jnp.full(channels, 9.0), jnp.zeros(channels), 9 * jnp.linspace(1, 4, channels))
    given = {"feature_moments": {"kernel": moments} if "rescaling" in of.options else None}
    tx = optimizer(case, plan, kernels="xla")
    state, update = tx.init(params), jax.jit(tx.update)
    for scale in GRADIENTS:
        g = rng.standard_normal(of.shape)
        if 0 <= scale < 1e20:
            g = scale * g
        else:
            g[..., -1, 0, 1] = scale
        g = {"kernel": jnp.asarray(g, of.dtype)}
        updates, after = update(g, state, params, **given)
        found.append(((g, state, params), given, (updates, after)))
        params, state = optax.apply_updates(params, updates), after
    if "momentum" in of.options:
        # Last a buffer that is no number.
        broken = state._replace(momentum=jax.tree.map(lambda m: m.at[..., 0, 1].set(np.nan), state.momentum))
        found.append(((g, broken, params), given, update(g, broken, params, **given)))
    return plan, found


def check(found, expected):
    (updates, state), (expected_updates, expected_state) = found, expected
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    size = float(jnp.max(fg.radii(state)["kernel"]))
    chex.assert_trees_all_close(updates, expected_updates, rtol=0, atol=2e-6 * size)
    chex.assert_trees_all_close(state, expected_state, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("of", quick([(form, case) for form in FORMS for case in CASES], FAST), ids="-".join)
def test_steps_are_those_without_kernels(interpreted, of):
    form, case = of
    plan, expected = steps(case)
    interpreted(form)
    update = jax.jit(optimizer(case, plan, kernels="pallas").update)
    assert max(int(fg.refused(after)["kernel"]) for *_, (_, after) in expected) > 1
    for given, options, answer in expected:
        check(update(*given, **options), answer)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("case", ["PIO", "Each", "blocks", "swapped"])
def test_tpu_takes_large_layers_block_by_block(interpreted, monkeypatch, case, at_once):
    """In blocks of 32 rows, of which the last goes past the end of 70; in one kernel or, as shared out layers, two."""
    plan, expected = steps(case)
    monkeypatch.setattr(_pallas_tpu, "_BLOCK", 1)
    if not at_once:
        monkeypatch.setattr(_pallas_tpu, "descends", lambda layer, shape: False)
    interpreted("tpu")
    update = jax.jit(optimizer(case, plan).update)
    for given, options, answer in expected:
        check(update(*given, **options), answer)


def test_tpu_turns_layers_as_xla_lays_them():
    assert _pallas_tpu._lies_swapped((3, 3, 128, 32), jnp.dtype(jnp.float32))
    assert not _pallas_tpu._lies_swapped((3, 3, 32, 128), jnp.dtype(jnp.float32))
    assert not _pallas_tpu._lies_swapped((3, 3, 16, 16), jnp.dtype(jnp.float32))
    assert _pallas_tpu._lies_swapped(CASES["swapped"].shape, jnp.dtype(jnp.float32))


@pytest.mark.slow
def test_derivatives_and_batches_are_those_without_kernels(interpreted):
    plan, ((given, _, (updates, _)), *_) = steps("PIO")
    interpreted("tpu")
    tx, (g, state, params) = optimizer("PIO", plan), given
    both = jax.jit(jax.vmap(lambda g: tx.update(g, state, params)[0]))(jax.tree.map(lambda g: jnp.stack([g, g]), g))
    np.testing.assert_allclose(both["kernel"][1], updates["kernel"], atol=2e-6)

    def moved(scale, tx):
        return jnp.sum(tx.update(jax.tree.map(lambda g: scale * g, g), state, params)[0]["kernel"] ** 2)

    derivative = jax.jit(jax.grad(moved), static_argnums=1)
    expected = derivative(jnp.float32(1), optimizer("PIO", plan, kernels="xla"))
    assert expected != 0
    assert derivative(jnp.float32(1), tx) == pytest.approx(float(expected), rel=1e-4)


LENGTHS = (0.0, 1e-6, 1e-3, 0.1, 0.4, 1.0, 10.0, 1e2, 1e3, 1e4)
SHAPES = [(3, 3), (2, 2), (3, 1), (9, 3), (2, 7), (5, 5), (8, 5)]
MAPS = [(fg.Stiefel(), shape) for shape in SHAPES] + [(manifold, (3, 2)) for manifold in (fg.Sphere(), fg.Oblique())]


@pytest.mark.parametrize("of", quick(MAPS, MAPS[:1] + MAPS[-1:]), ids=lambda of: f"{type(of[0]).__name__}-{of[1]}")
def test_maps_of_every_step_length(of):
    """Against the manifold's own in float64, whose rounding at the points is the same."""
    manifold, shape = of
    keys = jax.random.split(jax.random.key(0), 2)
    point = jax.jit(type(manifold).random_point, static_argnums=(2, 3))
    x = point(manifold, keys[0], (len(LENGTHS), 50, *shape), jnp.float64).astype(jnp.float32)
    v = jax.jit(type(manifold).random_tangent)(manifold, keys[1], x.astype(jnp.float64))
    length = jnp.linalg.norm(v, axis=(-2, -1), keepdims=True)
    lengths = jnp.array(LENGTHS)[:, None, None, None]
    v = (jnp.where(length > 0, v / jnp.where(length > 0, length, 1), 0) * lengths).astype(jnp.float32)
    radius = jnp.full(x.shape[:2], 0.5, jnp.float32)

    @jax.jit
    def moved(x, v):
        points = Points((manifold,), entries(0.5 * x), None, radius)
        displacement, ratio = points.displace(entries(0.5 * v), None)
        return matrices(displacement), ratio, matrices(points.project(entries(v)))

    displacement, ratio, projected = moved(x, v)
    y = 2 * (0.5 * x + displacement).astype(jnp.float64)
    assert np.max(h.violation(type(manifold).__name__.lower(), y)) < 1e-6
    np.testing.assert_allclose(ratio, jnp.linalg.norm(v, axis=(-2, -1)), rtol=1e-5)
    longest = float(jnp.finfo(jnp.float32).eps ** -0.5)
    reach = jnp.minimum(1.0, longest / jnp.maximum(lengths, 1e-300)) if isinstance(manifold, fg.Stiefel) else 1.0
    wanted = jax.jit(type(manifold).retract)(manifold, x.astype(jnp.float64), reach * v.astype(jnp.float64))
    # Rounding of the step itself is of the order of its length.
    error = jnp.max(jnp.abs(y - wanted), axis=(1, 2, 3))
    assert jnp.all(error < 1e-6 + 3e-8 * jnp.minimum(jnp.array(LENGTHS), longest))
    np.testing.assert_allclose(projected[:6], v[:6], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("manifold", [*THREE, fg.Euclidean()], ids=lambda manifold: type(manifold).__name__)
def test_projection_is_the_manifolds(manifold):
    keys = jax.random.split(jax.random.key(0), 2)
    for shape in ((3, 3), (2, 5), (9, 3)):
        x = manifold.with_radius(2.0).random_point(keys[0], (20, *shape))
        g = jax.random.normal(keys[1], x.shape, jnp.float32)
        found = Points((manifold,), entries(x), None, jnp.full(20, 2.0, jnp.float32)).project(entries(g))
        np.testing.assert_allclose(matrices(found), manifold.with_radius(2.0).project(x, g), atol=1e-6)


@pytest.mark.parametrize("manifold", THREE, ids=lambda manifold: type(manifold).__name__)
@pytest.mark.parametrize("bad", quick([np.nan, np.inf, -np.inf], [np.nan]))
def test_no_step_is_taken_where_there_is_no_point(manifold, bad):
    x = manifold.random_point(jax.random.key(0), (4, 3, 3))
    v = manifold.random_tangent(jax.random.key(1), x).at[1, 2, 0].set(bad)

    @jax.jit
    def displaced(x, v):
        displacement, ratio = Points((manifold,), entries(x), None, jnp.ones(4, jnp.float32)).displace(entries(v), None)
        return matrices(displacement), ratio

    displacement, ratio = displaced(x, v)
    np.testing.assert_allclose(x + displacement, jax.jit(manifold.retract)(x, v), atol=1e-6)
    assert ratio[1] == jnp.inf
    assert jnp.all(jnp.isfinite(ratio[jnp.array([0, 2, 3])]))
    # What is no point is no reason to stay.
    displacement, _ = displaced(jnp.zeros_like(x), v)
    assert np.max(h.violation(type(manifold).__name__.lower(), displacement[1:2])) < 1e-6


def test_what_is_served():
    class Own(fg.Sphere):
        pass

    single, half, double = (jnp.dtype(dtype) for dtype in (np.float32, jnp.bfloat16, np.float64))
    for form in FORMS.values():
        assert form.unserved(LayerType(THREE, "row", 3), 3, 3, single, half) is None
        assert "float64" in form.unserved(LayerType(THREE, "row", 3), 3, 3, double)
        assert "Own" in form.unserved(LayerType((Own(),), "row", 1), 3, 3, single)
        assert "qr" in form.unserved(LayerType((fg.Stiefel(retraction="qr"),), "row", 1), 3, 3, single)
        assert "entries" in form.unserved(LayerType((fg.Sphere(),), "row", 1), 9, 9, single)
    assert _pallas_tpu.unserved(LayerType(THREE, "row", 3), 9, 3, single) is None
    assert "entries" in _pallas_triton.unserved(LayerType(THREE, "row", 3), 9, 3, single)
    # What is too large for VMEM, or has groups of any form, takes two kernels.
    assert _pallas_tpu.descends(LayerType(THREE, "row", 3), (3, 3, 512, 512))
    assert not _pallas_tpu.descends(LayerType(THREE, "row", 3), (3, 3, 2048, 2048))
    assert not _pallas_tpu.descends(LayerType(THREE, "custom", 3), (3, 3, 8, 8))


LEAVES = {"a": (3, 3, 8, 16), "b": (3, 3, 8, 16), "c": (3, 3, 16, 16), "dense": (16, 8), "bias": (8,)}


def lowered(platform, sharding=None, paths=LEAVES, **options):
    """An update for a platform that this machine may lack, the parameters lying as `sharding` says."""
    params = {path: jax.ShapeDtypeStruct(LEAVES[path], jnp.float32, sharding=sharding) for path in paths}
    rules = [(path, scheme) for path, scheme in (("dense", fg.Whole(fg.Stiefel())), ("bias", None)) if path in paths]
    tx = fg.fgsgd(0.1, fg.plan(params, [*rules, ("?", fg.PIO(THREE))]), momentum=0.9, **options)
    return (
        jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params), params).lower(lowering_platforms=(platform,))
    )


def kernels_in(program):
    """How many kernels there are to compile, and how many are called."""
    text = program.as_text()
    compiled = re.findall(r"custom_call @(?:tpu_custom_call|__gpu\$xla\.gpu\.triton)", text)
    return len(compiled), len(re.findall(r"call @(?:descend|measure|move)", text))


@pytest.mark.usefixtures("users_settings")
@pytest.mark.parametrize(("platform", "compiled", "called"), [("tpu", 2, 3), ("cuda", 4, 6)])
def test_layers_of_one_shape_share_their_kernels(platform, compiled, called):
    """One or two custom calls in a function of all layers of one shape; a matrix has none."""
    assert kernels_in(lowered(platform)) == (compiled, called)
    assert kernels_in(lowered(platform, kernels="xla")) == (0, 0)


def over(axes, *spec):
    return NamedSharding(AbstractMesh((axes,), ("channels",), axis_types=(AxisType.Auto,)), P(*spec))


@pytest.mark.usefixtures("users_settings")
@pytest.mark.parametrize(("platform", "called"), [("tpu", (3, 6)), ("cuda", (6, 6))])
def test_programs_for_several_devices_have_kernels_where_shardings_are_known(platform, called):
    """On TPU one kernel a layer where every device has all of it, whatever number of devices this process sees."""
    everywhere, shared = over(4), over(4, None, None, None, "channels")
    assert kernels_in(lowered(platform, everywhere)) == (0, 0)
    assert kernels_in(lowered(platform, everywhere, shardings=everywhere))[1] == called[0]
    assert kernels_in(lowered(platform, shared, "abc", shardings=dict.fromkeys("abc", shared)))[1] == called[1]


@pytest.mark.usefixtures("users_settings")
def test_kernels_are_refused_with_path_and_reason():
    with pytest.raises(ValueError, match=r"kernels=\'triton\'.*\'pallas\'"):
        check_kernels("triton")
    with pytest.raises(ValueError, match="a: there are none for this platform"):
        lowered("cpu", paths="abc", kernels="pallas")
    with pytest.raises(ValueError, match="dense: the kernels take"):
        lowered("tpu", kernels="pallas")
    with pytest.raises(ValueError, match=r"a: .*shardings="):
        lowered("tpu", over(4), "abc", kernels="pallas")
    everywhere = over(4)
    for wrong in (everywhere.spec, {"a": everywhere.spec}, [everywhere]):
        with pytest.raises(ValueError, match=r"fg.fgsgd: shardings has .* a tree of them like the parameters"):
            lowered("tpu", everywhere, "abc", shardings=wrong)
    with pytest.raises(ValueError, match="a: entries of one matrix"):
        lowered("cuda", over(3, "channels"), "abc", kernels="pallas", shardings=over(3, "channels"))
    assert kernels_in(lowered("tpu", paths="abc", kernels="pallas"))[1] == 3


def test_branch_free():
    """No branch and no loop over turns for 3×3 matrices."""
    x = jnp.ones((4, 3, 3), jnp.float32)

    def displace(x, v):
        kind = jnp.arange(4, dtype=jnp.int32) % 3
        return Points(THREE, entries(x), kind, jnp.ones(4, jnp.float32)).displace(entries(v), None)

    program = str(jax.make_jaxpr(displace)(x, x))
    assert not re.search(r"\b(cond|while|scan)\[", program)
