"""Batches of matrices on mixed manifolds: the shared products of many small ones are the manifolds' own geometry."""

import functools
import math

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgsgd_jax as fg
from fgsgd_jax.linalg import MATRICES_LAST, _products, chunks_of, layout_for
from fgsgd_jax.manifolds import Mixture
from fgsgd_jax.manifolds._shared_products import share_products

MIX = (fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean())
# Above the size from which products are shared, and three chunks.
COUNTS = {"whole": 1030, "chunked": 3 * 4096, "chunks below the size": 1536}
CASES = [((3, 3), "float32"), ((3, 3), "float64"), ((5, 3), "float32"), ((4, 1), "float32")]
# One compilation for the branch of small steps and the safe one, and one of a tall matrix.
QUICK = [(CASES[0], 0.3), (CASES[0], 30.0), (CASES[2], 0.3)]


@functools.cache
def batch(shape, count, dtype, kinds, radius=0.06):
    rng = np.random.default_rng(0)
    kind = rng.integers(0, len(kinds), count).astype(np.int8)
    radii = radius * rng.uniform(0.5, 2, count)
    x = Mixture(kinds, jnp.asarray(kind) if len(kinds) > 1 else None, jnp.asarray(radii)).nearest(
        jnp.asarray(rng.standard_normal((count, *shape)))
    )
    w = radius * rng.standard_normal((count, *shape))
    mixture = Mixture(kinds, jnp.asarray(kind) if len(kinds) > 1 else None, jnp.asarray(radii, dtype))
    return mixture, jnp.asarray(x, dtype), jnp.asarray(w, dtype)


project = jax.jit(lambda mixture, x, g: mixture.project(x, g))
displace = jax.jit(lambda m, x, w, radius, tangent: m.displace(x, w, radius, tangent), static_argnums=4)
displace_by = jax.jit(lambda m, x, w, radius, factor: m.displace(x, w, radius, False, factor))


def piecewise(method, mixture, *arrays):
    """`method` in float64 on pieces too small to share products: the manifolds' own arithmetic."""
    radius, *arrays = (np.asarray(a, "float64") for a in (mixture.radius, *arrays))
    whole = [np.asarray(mixture.kind), radius, *arrays]
    pad = -len(radius) % 515
    padded = [np.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1), mode="edge") for a in whole]
    pieces = [
        method(Mixture(mixture.manifolds, kind, radius), *(jnp.asarray(a) for a in rest))
        for kind, radius, *rest in zip(*(map(jnp.asarray, np.split(a, len(a) // 515)) for a in padded), strict=True)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(radius)], *pieces)


def test_few_or_large_matrices_keep_the_usual_layout():
    assert layout_for((1023, 3, 3)) is MATRICES_LAST
    assert layout_for((1024, 3, 3)) is not MATRICES_LAST
    assert layout_for((4096, 16, 16)) is MATRICES_LAST
    assert layout_for((4096, 64, 1)) is MATRICES_LAST
    assert share_products(MIX, (4096, 3, 3))
    assert not share_products((fg.Sphere(), fg.Stiefel(retraction="qr")), (4096, 3, 3))
    assert not share_products(MIX, (4096, 2, 3))


@pytest.mark.parametrize(
    ("shape", "dtype"), [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])], ids=str
)
def test_shared_projection_is_that_of_each_manifold(shape, dtype):
    mixture, x, g = batch(shape, COUNTS["whole"], dtype, MIX)
    expected = piecewise(project, mixture, x, g)
    np.testing.assert_allclose(project(mixture, x, g), expected, atol=8 * h.EPS[dtype])


@pytest.mark.parametrize(
    ("shape", "dtype", "length", "size"),
    [
        pytest.param(*case, length, "whole", marks=() if (case, length) in QUICK else pytest.mark.slow)
        for case in CASES
        for length in (0.003, 0.3, 30.0)
    ]
    + [
        pytest.param(*CASES[0], 0.3, "chunked", marks=pytest.mark.slow),
        pytest.param((7, 7), "float32", 0.3, "chunks below the size", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_shared_retraction_is_that_of_each_manifold(shape, dtype, length, size):
    """Also where steps are long and the Newton-Schulz iteration takes the safe branch."""
    mixture, x, w = batch(shape, COUNTS[size], dtype, MIX)
    expected, ratio = piecewise(lambda m, x, w: displace(m, x, w, None, False), mixture, x, length * w)
    displacement, found = displace(mixture, x, length * w, None, False)
    # Rounding x to float32 changes v by eps, relative to which a long step forgets where it came from.
    tolerance = (32 + 32 * length) * h.EPS[dtype]
    np.testing.assert_allclose(displacement, expected, atol=tolerance)
    np.testing.assert_allclose(found, ratio, rtol=1e-3 if dtype == "float32" else 1e-9)
    y = np.asarray(x + displacement, "float64")
    violation = mixture.violation(jnp.asarray(y, dtype))
    assert np.max(violation) <= 8 * h.EPS[dtype]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_a_tangent_vector_needs_no_projection_and_the_new_radius_is_exact(dtype):
    mixture, x, w = batch((3, 3), COUNTS["whole"], dtype, MIX)
    new = mixture.radius * 1.5
    v = project(mixture, x, w)
    both = displace(mixture, x, w, new, False)[0]
    np.testing.assert_allclose(displace(mixture, x, v, new, True)[0], both, atol=16 * h.EPS[dtype])
    constrained = np.asarray(mixture.kind) != 3
    assert np.max(np.asarray(mixture.at(new).violation(x + both))[constrained]) <= 16 * h.EPS[dtype]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_matrix_without_a_step_keeps_its_place_and_harms_no_other(bad):
    mixture, x, w = batch((3, 3), COUNTS["whole"], "float32", MIX[:3])
    spoilt = w.at[7].set(bad)
    displacement, _ = displace(mixture, x, spoilt, None, True)
    clean, _ = displace(mixture, x, w, None, True)
    others = np.arange(len(w)) != 7
    np.testing.assert_allclose(np.asarray(displacement)[others], np.asarray(clean)[others], atol=1e-7)
    assert np.all(np.isfinite(displacement))
    assert np.max(np.asarray(mixture.violation(x + displacement))) < 1e-6


def test_coarser_or_finer_steps_than_points():
    mixture, x, w = batch((3, 3), COUNTS["chunked"], "float32", MIX)
    expected = project(mixture, x, w)
    finer = jnp.asarray(np.asarray(w, "float64"))
    assert project(mixture, x, finer).dtype == "float64"
    np.testing.assert_allclose(project(mixture, x, finer), expected, atol=1e-7)
    found, _ = displace(mixture, jnp.asarray(np.asarray(x, "float64")), w, None, False)
    np.testing.assert_allclose(found, displace(mixture, x, w, None, False)[0], atol=1e-6)


def test_batches_over_two_axes_and_under_vmap():
    """Two axes may be sharded and stay apart; under `vmap` every branch runs."""
    mixture, x, w = batch((3, 3), COUNTS["chunked"], "float32", MIX)
    expected = project(mixture, x, w)

    def split(a):
        return a.reshape(4, -1, *a.shape[1:])

    def each(kind, radius, x, w):
        return Mixture(MIX, kind, radius).project(x, w)

    parts = Mixture(MIX, split(mixture.kind), split(mixture.radius))
    np.testing.assert_allclose(project(parts, split(x), split(w)), split(expected), atol=1e-7)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(each))(parts.kind, parts.radius, split(x), split(w)), split(expected), atol=1e-7
    )


def test_weights_that_differ_by_device():
    """As an ensemble's under `shard_map`, whose types say so."""
    mesh = jax.make_mesh((1,), ("seed",), axis_types=(jax.sharding.AxisType.Auto,))
    _, x, w = batch((3, 3), COUNTS["whole"], "float32", (fg.Stiefel(),), 1.0)
    spec = jax.sharding.PartitionSpec("seed")

    def step(x, w):
        return fg.Stiefel().retract(x[0], fg.Stiefel().project(x[0], w[0]))[None]

    found = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))(x[None], w[None])[0]
    assert np.max(np.asarray(fg.Stiefel().violation(found))) < 1e-6


def test_large_matrices_are_taken_one_or_a_few_at_a_time():
    assert chunks_of((24, 768, 3072)) == 24
    assert chunks_of((1200, 32, 32)) == 20
    assert chunks_of((4, 128, 256)) == 1
    assert chunks_of((3, 8, 768, 768)) == 1
    assert chunks_of((0, 768, 768)) == chunks_of((5, 0, 768)) == 1


@pytest.mark.parametrize(
    ("kinds", "shape"),
    [
        (MIX, (12, 8)),
        ((fg.Stiefel(),), (8, 12)),
        ((fg.Stiefel(),), (130, 3)),
        ((fg.Sphere(), fg.Stiefel(retraction="qr")), (12, 8)),
    ],
    ids=str,
)
def test_large_matrices_by_chunks_are_handled_as_the_whole(kinds, shape, monkeypatch):
    mixture, x, w = batch(shape, 6, "float32", kinds)
    new = mixture.radius * 1.5
    methods = {
        "project": lambda mixture, x, w: mixture.measured_projection(x, w),
        "displace": lambda mixture, x, w: mixture.displace(x, w, new, False, 0.7),
        "gradient": jax.grad(lambda m, x, w: jnp.sum(jnp.sin(100 * m.displace(x, w)[0])), argnums=(1, 2)),
    }

    def found():
        return {name: jax.jit(lambda *args, f=method: f(*args)) for name, method in methods.items()}

    whole = {name: method(mixture, x, w) for name, method in found().items()}
    assert not any("scan[" in str(jax.make_jaxpr(f)(mixture, x, w)) for f in found().values())
    monkeypatch.setattr(_products, "_FEW_NUMBERS", 0)
    monkeypatch.setattr(_products, "_NUMBERS", 2 * math.prod(shape))
    assert chunks_of(x.shape) == 3
    for name, method in found().items():
        assert "scan[" in str(jax.make_jaxpr(method)(mixture, x, w)), name
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if name == "gradient" else {"atol": 1e-6}
        jax.tree.map(
            lambda a, b, t=tolerance: np.testing.assert_allclose(a, b, **t), method(mixture, x, w), whole[name]
        )
    # A rate in float64, as NumPy's are.
    displacement, _ = displace_by(mixture, x, w, new, jnp.float64(0.7))
    np.testing.assert_allclose(displacement, whole["displace"][0], atol=1e-6)


def test_large_weights_that_differ_by_device_at_radii_that_do_not(monkeypatch):
    monkeypatch.setattr(_products, "_FEW_NUMBERS", 0)
    monkeypatch.setattr(_products, "_NUMBERS", 2 * 12 * 8)
    mesh = jax.make_mesh((1,), ("seed",), axis_types=(jax.sharding.AxisType.Auto,))
    mixture, x, w = batch((12, 8), 6, "float32", (fg.Stiefel(),))
    spec, same = jax.sharding.PartitionSpec("seed"), jax.sharding.PartitionSpec()

    def step(mixture, x, w):
        return mixture.displace(x[0], mixture.project(x[0], w[0]))[0][None]

    found = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(same, spec, spec), out_specs=spec))
    assert np.max(np.asarray(mixture.violation(x + found(mixture, x[None], w[None])[0]))) < 1e-6

    # And rates that differ, from one start.
    def at_rate(x, w, rate):
        return mixture.displace(x, w, factor=rate[0])[0][None]

    rates = jax.jit(jax.shard_map(at_rate, mesh=mesh, in_specs=(same, same, spec), out_specs=spec))
    np.testing.assert_allclose(
        rates(x, w, jnp.full(1, 0.5, x.dtype))[0], displace_by(mixture, x, w, None, 0.5)[0], atol=1e-6
    )


@pytest.mark.slow
def test_gradient_through_a_shared_step():
    mixture, x, w = batch((3, 3), COUNTS["whole"], "float64", MIX)

    def loss(w, displace):
        return jnp.sum(jnp.sin(100 * displace(w)[0]))

    shared = jax.jit(jax.grad(lambda w: loss(w, lambda w: mixture.displace(x, w))))(w)
    each = jax.jit(jax.grad(lambda w: loss(w, lambda w: mixture._displace_each(x, w, None, False, 1.0))))(w)
    np.testing.assert_allclose(shared, each, atol=1e-9)
