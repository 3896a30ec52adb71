"""Manifolds as batches, under JAX's transformations, as pytrees, and as products."""

import dataclasses
import itertools

import helpers as h
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from geometries import CLASSES, KINDS, RADII, SMALL, STEPS, cast, close, manifold, seed

import fgsgd_jax as fg
from fgsgd_jax.manifolds import Mixture

# --- n < p, transformations, pytrees


@pytest.mark.slow
@pytest.mark.parametrize("retraction", h.RETRACTIONS)
def test_wide_stiefel_is_tall_stiefel_transposed(retraction):
    rng, t = seed("wide"), h.transpose
    x = h.point("stiefel", rng, (4, 2, 5), 0.3)
    y = h.point("stiefel", rng, (4, 2, 5), 0.3)
    v = h.tangent("stiefel", rng, x, 0.3, length=0.2)
    m = manifold("stiefel", 0.3, retraction=retraction)
    assert m.dim((2, 5)) == m.dim((5, 2)) == 7
    np.testing.assert_allclose(x @ t(x), 0.09 * np.broadcast_to(np.eye(2), (4, 2, 2)), atol=1e-12)
    x_, y_, v_, xt, yt, vt = cast("float64", x, y, v, t(x), t(y), t(v))
    for wide, tall in (
        (m.project(x_, y_), m.project(xt, yt)),
        (m.retract(x_, v_), m.retract(xt, vt)),
        (m.exp(x_, v_), m.exp(xt, vt)),
        (m.log(x_, m.exp(x_, v_)), m.log(xt, m.exp(xt, vt))),
        (m.transport(x_, y_, v_), m.transport(xt, yt, vt)),
        (m.nearest(v_ + x_), m.nearest(vt + xt)),
    ):
        np.testing.assert_allclose(t(np.asarray(wide)), tall, atol=1e-12)
    np.testing.assert_allclose(m.violation(1.1 * x_), 0.21, atol=1e-12)
    np.testing.assert_array_equal(*(np.stack(m.curvature_bounds(shape)) for shape in ((2, 5), (5, 2))))


@pytest.mark.slow
@STEPS
def test_vmap_over_manifolds_is_batching(kind, retraction):
    """One manifold of a radius per point, mapped, is the manifold of that batched radius; jit changes nothing."""
    rng = seed("vmap", kind)
    x = h.point(kind, rng, SMALL["tall"], RADII)
    v = h.tangent(kind, rng, x, RADII, length=0.5 * RADII)
    m = manifold(kind, RADII, retraction=retraction)
    x, v = cast("float64", x, v)
    for method in ("project", "retract", "exp", "log"):
        other = m.exp(x, v) if method == "log" else v
        whole = getattr(m, method)(x, other)
        mapped = jax.jit(jax.vmap(lambda m, x, v, method=method: getattr(m, method)(x, v)))(m, x, other)
        close(mapped, whole, RADII, 1e-12)
    close(jax.vmap(lambda m, x: m.violation(x))(m, 1.1 * x), m.violation(1.1 * x), 1.0, 1e-12)


@pytest.mark.slow
@KINDS
def test_radius_broadcasts_over_leading_axes(kind):
    """As radii of shape (inputs, 1) do over a plan's grid."""
    rng = seed("broadcast", kind)
    full = np.broadcast_to(np.array([[1.0], [0.004]]), (2, 3))
    x = h.point(kind, rng, (2, 3, 4, 2), full)
    v = h.tangent(kind, rng, x, full, length=full)
    m, m_full = manifold(kind, [[1.0], [0.004]]), manifold(kind, full)
    x, v = cast("float64", x, v)
    for method in ("project", "retract", "exp"):
        np.testing.assert_allclose(getattr(m, method)(x, v), getattr(m_full, method)(x, v), rtol=1e-12, atol=1e-15)
    assert m.violation(x).shape == m.norm(x, v).shape == m.dist(x, m.exp(x, v)).shape == (2, 3)
    drawn = m.random_point(jax.random.key(0), (2, 3, 4, 2), "float64")
    assert np.max(h.violation(kind, drawn, full)) < 1e-12


def test_manifolds_of_different_classes_have_different_structures():
    """Else a jitted function compiled for one may run for another."""
    manifolds = [fg.Euclidean(), fg.Sphere(), fg.Oblique(), *(fg.Stiefel(retraction=r) for r in h.RETRACTIONS)]
    structures = [jax.tree.structure(m) for m in manifolds]
    assert not any(a == b for a, b in itertools.combinations(structures, 2))
    assert structures == [jax.tree.structure(m.with_radius(2.0)) for m in manifolds]


@STEPS
def test_a_manifold_is_a_pytree_of_its_radius(kind, retraction):
    m = manifold(kind, 0.5, retraction=retraction)
    leaves, treedef = jax.tree.flatten(m)
    assert [float(leaf) for leaf in leaves] == [0.5]
    assert jax.tree.unflatten(treedef, [2.0]).radius == 2.0
    assert isinstance(m, CLASSES[kind])
    with pytest.raises(dataclasses.FrozenInstanceError):
        m.radius = 1.0
    if retraction:
        assert m.with_radius(2.0).retraction == retraction
        others = [jax.tree.structure(CLASSES[kind](retraction=r)) for r in h.RETRACTIONS]
        assert len(set(others)) == len(h.RETRACTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", h.KINDS[1:])
def test_a_manifold_is_carried_through_scan_and_rescaled(kind):
    m = manifold(kind, 1.0)
    x = m.random_point(jax.random.key(0), (5, 3, 2), "float64")
    tangents = jnp.asarray(seed("scan").standard_normal((6, 5, 3, 2)))

    @jax.jit
    def run(m, x):
        def step(carry, g):
            m, x = carry
            x = m.retract(x, -0.1 * m.project(x, g))
            half = m.with_radius(m.radius / 2)
            return (half, half.nearest(x)), m.violation(x)

        return jax.lax.scan(step, (m, x), tangents)

    (last, x), violations = run(m, x)
    assert float(last.radius) == 2.0**-6
    assert np.max(violations) < 1e-13
    assert np.max(h.violation(kind, x, 2.0**-6)) < 1e-13


def test_radius_is_a_number_or_left_out():
    x = jnp.asarray(h.point("sphere", seed("number"), (2, 3, 3), 0.5), jnp.float32)
    assert float(jnp.max(fg.Sphere(radius=0.5).violation(x))) < 1e-6
    assert float(jnp.max(fg.Sphere().violation(x / 0.5))) < 1e-6
    # Without the radius, the plan's gamma has to be able to tell: a stated 1 is not a radius left out.
    assert float(fg.Sphere().with_radius(1.0).radius) == 1.0


def test_unknown_retraction_names_the_choices(monkeypatch):
    # The suite's own type check would come first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="polar") as error:
        fg.Stiefel(retraction="svd")
    assert all(name in str(error.value) for name in ("svd", *h.RETRACTIONS))


@pytest.mark.slow
@KINDS
def test_bf16_points_reach_bf16_roundoff(kind):
    """Arithmetic is float32 inside: a bf16 Gram matrix would be wrong by a percent."""
    rng = seed("bf16", kind)
    m = manifold(kind, 0.5, "float32")
    x = jnp.asarray(h.point(kind, rng, (64, 3, 3), 0.5), jnp.bfloat16)
    v = jnp.asarray(h.tangent(kind, rng, np.asarray(x, np.float64), 0.5, length=1.0), jnp.bfloat16)
    y = m.retract(x, v)
    assert y.dtype == m.project(x, v).dtype == jnp.bfloat16
    # Each entry is within half a unit in the last place (2^-9, relative) of a point.
    assert np.max(h.violation(kind, np.asarray(y, np.float64), 0.5)) <= 2 * 3 * 2.0**-9


@pytest.mark.slow
@STEPS
def test_products_run_at_full_precision(kind, retraction):
    """Whatever a backend's default is: GPUs would use TF32, TPUs bf16."""
    m = manifold(kind, 0.5, "float32", retraction)
    x = jnp.zeros((4, 3, 3), jnp.float32)

    def everything(m, x, v):
        return (
            m.project(x, v), m.retract(x, v), m.exp(x, v), m.log(x, v), m.dist(x, v), m.transport(x, v, v),
            m.inner(x, v, v), m.norm(x, v), m.nearest(v), m.violation(x),
        )  # fmt: skip

    highest = (jax.lax.Precision.HIGHEST,) * 2
    dots = [e for e in h.equations(jax.make_jaxpr(everything)(m, x, x).jaxpr) if e.primitive.name == "dot_general"]
    assert all(e.params["precision"] == highest for e in dots)
    assert dots or kind != "stiefel"


# --- products


@pytest.mark.slow
def test_product_acts_by_component_and_adds_norms():
    """Eq. 6: the norm on a product is the root of the sum of the squared norms."""
    rng = seed("product")
    parts = [("sphere", (3, 3), 0.5), ("stiefel", (5, 2), 1.0), ("euclidean", (2, 2), 1.0)]
    m = fg.Product(tuple(manifold(kind, s) for kind, _, s in parts))
    x = tuple(h.point(kind, rng, (4, *shape), s) for kind, shape, s in parts)
    u = tuple(h.tangent(kind, rng, p, s) for p, (kind, _, s) in zip(x, parts, strict=True))
    v = tuple(h.tangent(kind, rng, p, s, length=0.3) for p, (kind, _, s) in zip(x, parts, strict=True))
    g = tuple(rng.standard_normal(p.shape) for p in x)
    x_, u_, v_, g_ = (cast("float64", *t) for t in (x, u, v, g))

    y = jax.jit(lambda m, x, v: m.exp(x, v))(m, x_, v_)
    assert isinstance(y, tuple)
    components = list(zip(m.manifolds, x_, v_, g_, y, strict=True))
    for i, (component, xi, vi, gi, yi) in enumerate(components):
        np.testing.assert_allclose(m.project(x_, g_)[i], component.project(xi, gi), atol=1e-14)
        np.testing.assert_allclose(m.retract(x_, v_)[i], component.retract(xi, vi), atol=1e-14)
        np.testing.assert_allclose(yi, component.exp(xi, vi), atol=1e-14)
        np.testing.assert_allclose(m.log(x_, y)[i], vi, atol=1e-9)
        np.testing.assert_allclose(m.transport(x_, y, v_)[i], component.transport(xi, yi, vi), atol=1e-14)
        np.testing.assert_allclose(m.nearest(g_)[i], component.nearest(gi), atol=1e-14)
    np.testing.assert_allclose(m.norm(x_, u_), np.sqrt(sum(h.inner(a, a) for a in u)), rtol=1e-12)
    np.testing.assert_allclose(m.inner(x_, u_, v_), sum(map(h.inner, u, v)), rtol=1e-12)
    np.testing.assert_allclose(m.dist(x_, y), np.sqrt(3 * 0.3**2), rtol=1e-9)
    np.testing.assert_allclose(m.violation(x_), 0, atol=1e-13)
    off = (1.5 * x_[0], *x_[1:])
    np.testing.assert_allclose(m.violation(off), 0.5, rtol=1e-12)
    shapes = tuple(shape for _, shape, _ in parts)
    assert m.dim(shapes) == 8 + 7 + 4
    # Planes across components are flat, so 0 is always among a product's curvatures.
    assert tuple(map(float, m.curvature_bounds(shapes))) == (-0.5, 4.0)
    drawn = m.random_point(jax.random.key(0), tuple(p.shape for p in x), "float64")
    np.testing.assert_allclose(m.violation(drawn), 0, atol=1e-13)
    tangents = m.random_tangent(jax.random.key(1), drawn)
    for t, d, (kind, _, s) in zip(tangents, drawn, parts, strict=True):
        t, d = np.asarray(t), np.asarray(d)
        np.testing.assert_allclose(h.project(kind, d, t, s), t, atol=1e-12)


def test_a_radius_is_measured_to_round_off_where_the_sum_is_fused():
    """XLA on CPU sums the squares of a point one after the other if they are made in the same loop."""
    on = Mixture((fg.Stiefel(),), None)
    moved = jax.jit(lambda x, u: x + (on.rescale(x + u) - x))
    for number in range(8):
        x = fg.Stiefel().random_point(jax.random.key(number), (3, 32, 32), jnp.float32)
        found = np.asarray(moved(x, 1e-3 * (number + 1) * x), np.float64)
        np.testing.assert_allclose(np.linalg.norm(found, axis=(1, 2)), 32**0.5, rtol=1.7e-7)
