"""Tangent spaces, nearest points and retractions, judged by float64 NumPy formulas and by laws that need no formula."""

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from geometries import KINDS, RETRACTIONS, STEPS, cases, cast, close, manifold, radius_for, seed, tol, unit_of

from fgsgd_jax import Stiefel

# --- tangent space, constraint, nearest point


@jax.jit
def tangent_laws(m, key, x, y, g, u, v, a):
    projected = m.project(x, g)
    near = m.nearest(a)
    return {
        "projected": projected,
        "projected twice": m.project(x, projected),
        "projected point": m.project(x, x),
        "random tangent": m.random_tangent(key, x),
        "inner": m.inner(x, u, v),
        "norm": m.norm(x, v),
        "transport u": m.transport(x, y, u),
        "transport v": m.transport(x, y, v),
        "transport sum": m.transport(x, y, 2 * u - v),
        "nearest": near,
        "nearest twice": m.nearest(near),
        "violation": m.violation(a),
        "violation of a point": m.violation(x),
    }


@cases(["kind"], *((kind,) for kind in h.KINDS))
def test_tangent_laws(kind, shape, dtype):
    s, rng = radius_for(shape), seed(kind, shape)
    m, eps = manifold(kind, s, dtype), tol(dtype, shape)
    s = unit_of(kind, s)
    x, y = (h.point(kind, rng, shape, s) for _ in range(2))
    u, v = (h.tangent(kind, rng, x, s) for _ in range(2))
    g = rng.standard_normal(shape)
    a = h.spread(s) * rng.standard_normal(shape)
    args = cast(dtype, x, y, g, u, v, a)
    out = tangent_laws(m, jax.random.key(0), *args)

    batch = shape[:-2]
    for name, value in out.items():
        is_number = name in ("inner", "norm", "violation", "violation of a point")
        assert value.shape == (batch if is_number else shape), name
        assert value.dtype == dtype, name
    out = {name: np.asarray(value, np.float64) for name, value in out.items()}

    def tangent(w, at):  # the part of w outside the tangent space
        return w - h.project(kind, at, w, s)

    one = 1.0  # gradients have entries of size 1 whatever the radius
    close(out["projected"], h.project(kind, x, g, s), one, 4 * eps)
    close(tangent(out["projected"], x), 0 * x, one, 4 * eps)
    close(out["projected twice"], out["projected"], one, 4 * eps)
    residual = g - out["projected"]
    assert np.all(np.abs(h.inner(residual, u)) <= 8 * eps * h.norm(g) * np.maximum(h.norm(u), 1))
    if kind != "euclidean":
        close(out["projected point"], 0 * x, s, eps)  # so weight decay does nothing here

    close(
        tangent(out["random tangent"], x),
        0 * x,
        one,
        4 * eps * max(1, np.max(np.abs(out["random tangent"]), initial=0)),
    )
    if h.dim(kind, *shape[-2:]) > 0:
        assert np.all(h.norm(out["random tangent"]) > 0)

    np.testing.assert_allclose(out["inner"], h.inner(u, v), rtol=0, atol=eps * np.max(h.norm(u) * h.norm(v), initial=0))
    np.testing.assert_allclose(out["norm"], h.norm(v), rtol=eps, atol=eps)

    close(tangent(out["transport v"], y), 0 * x, one, 4 * eps)
    close(out["transport sum"], 2 * out["transport u"] - out["transport v"], one, 12 * eps)
    close(out["transport v"], h.project(kind, y, v, s), one, 4 * eps)

    assert np.all(h.violation(kind, out["nearest"], s) <= eps)
    close(out["nearest twice"], out["nearest"], s, eps)
    # The polar factor is as ill-conditioned as the smallest singular value is small.
    if kind == "stiefel":
        eps = eps / np.min(np.linalg.svd(a / h.spread(s), compute_uv=False), initial=1)
    close(out["nearest"], h.nearest(kind, a, s), s, eps)

    np.testing.assert_allclose(
        out["violation"], h.violation(kind, a, s), rtol=tol(dtype, shape), atol=tol(dtype, shape)
    )
    assert np.all(out["violation of a point"] <= tol(dtype, shape))


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("shape", [(3, 3), (6, 3), (2, 5), (1, 4), (1, 1)], ids=str)
def test_dim_is_the_rank_of_the_projection(kind, shape):
    m = manifold(kind)
    (x,) = cast("float64", h.point(kind, seed(kind, shape), shape))
    matrix = jax.jacobian(lambda g: m.project(x, g))(x).reshape(x.size, x.size)
    rank = int(np.sum(np.linalg.svd(matrix, compute_uv=False) > 0.5))
    assert m.dim(shape) == rank == h.dim(kind, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("kind", h.KINDS[1:])
@pytest.mark.parametrize("shape", [(3, 3), (6, 3), (2, 5)], ids=str)
def test_nearest_is_nearest(kind, shape):
    rng = seed(kind, shape)
    a = rng.standard_normal(shape)
    near = np.asarray(manifold(kind, 0.5).nearest(jnp.asarray(a)))
    others = np.concatenate(
        [
            h.point(kind, rng, (500, *shape), 0.5),
            # Close by, where a wrong nearest point would lose.
            h.retract(
                kind,
                "polar",
                *np.broadcast_arrays(near, h.tangent(kind, rng, np.broadcast_to(near, (500, *shape)), 0.5) * 0.05),
                0.5,
            ),
        ]
    )
    assert np.all(h.norm(a - near) <= h.norm(a - others))


# --- retractions

# In units of the radius. The last is what a diverging step looks like: FG-SGD on a small radius takes such steps.
STEP_SIZES = np.array([0.0, 1e-3, 3e-3, 1e-2, 3e-2, 0.3, 1.0, 10.0, 1e3, 1e6])


@jax.jit
def retraction_laws(m, x, v, sizes):
    # In turn, as in training: under vmap a retraction that chooses its iterations by the batch would take all.
    y = jax.lax.map(lambda t: m.retract(x, t * v), sizes)
    return y, jax.vmap(m.violation)(y)


@cases(["kind", "retraction"], *RETRACTIONS)
def test_retraction_laws(kind, retraction, shape, dtype):
    s, rng = radius_for(shape), seed(kind, shape)
    eps = tol(dtype, shape)
    m = manifold(kind, s, dtype, retraction)
    s = unit_of(kind, s)
    x = h.point(kind, rng, shape, s)
    v = h.tangent(kind, rng, x, s, length=s)
    y, reported = retraction_laws(m, *cast(dtype, x, v, STEP_SIZES))
    assert y.dtype == dtype
    assert y.shape == (len(STEP_SIZES), *shape)
    assert np.all(np.isfinite(y))
    y = np.asarray(y, np.float64)

    # Feasible, however long the step; and what the library says of it is true.
    if kind != "euclidean":
        limit = 1e-6 if dtype == "float32" and shape[-2:] != (512, 128) else eps
        for size, point in zip(STEP_SIZES, y, strict=True):
            assert np.max(h.violation(kind, point, s), initial=0) <= limit, f"step of {size} radii"
        assert np.max(reported, initial=0) <= 2 * limit

    close(y[0], x, s, eps)
    for size, point in zip(STEP_SIZES[:7], y[:7], strict=True):
        close(point, h.retract(kind, retraction, x, size * v, s), s, (1 + size) * 2 * eps)

    # First order: the gap to the geodesic shrinks at least as the square of the step.
    if dtype == "float64" and kind != "euclidean" and retraction != "exp" and shape[0] != 0:
        sizes, points = STEP_SIZES[2:5], y[2:5]
        gap = np.stack([h.norm(p - h.exp(kind, x, t * v, s)) / s for t, p in zip(sizes, points, strict=True)])
        gap = gap.reshape(len(sizes), -1).max(axis=1)
        if h.dim(kind, *shape[-2:]) == 0:
            assert np.all(gap == 0)
        else:
            assert h.slope(sizes, gap) >= 1.9


@pytest.mark.slow
@pytest.mark.parametrize("retraction", h.RETRACTIONS)
@pytest.mark.parametrize("n", [2, 3])
def test_retractions_stay_in_their_component(retraction, n):
    rng = seed("component", n)
    x = h.point("stiefel", rng, (64, n, n))
    v = h.tangent("stiefel", rng, x, length=1.0)
    y, _ = retraction_laws(manifold("stiefel", retraction=retraction), *cast("float64", x, v, [0.5, 10.0, 1e4]))
    np.testing.assert_allclose(np.linalg.det(y), np.broadcast_to(np.linalg.det(x), (3, 64)), atol=1e-9)


@pytest.mark.slow
@STEPS
@pytest.mark.parametrize("shape", [(3, 3), (6, 3), (2, 5)], ids=str)
def test_retraction_has_identity_derivative_and_finite_gradients(kind, retraction, shape):
    """d/dv retract(x, v) at v = 0 is the identity on the tangent space: where a norm's gradient would be NaN."""
    s, rng = 0.3, seed(kind, shape)
    m = manifold(kind, s, retraction=retraction)
    x = h.point(kind, rng, shape, s)
    v, u = h.tangent(kind, rng, x, s), h.tangent(kind, rng, x, s)
    c = rng.standard_normal(shape)

    @jax.jit
    def derivatives(m, x, v, u, c):
        def loss(m, x, v):
            return jnp.sum(c * m.retract(x, v))

        _, along = jax.jvp(lambda w: m.retract(x, w), (0 * v,), (u,))
        return along, jax.grad(loss, (0, 1, 2))(m, x, 0 * v), jax.grad(loss, (0, 1, 2))(m, x, v)

    along, at_zero, at_v = derivatives(m, *cast("float64", x, v, u, c))
    np.testing.assert_allclose(along, u, atol=1e-9)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((at_zero, at_v)))

    # Against central differences, at v.
    step = 1e-6
    ahead, behind = (
        h.retract(kind, retraction, x, v + sign * step * u, s) if kind != "euclidean" else x + v + sign * step * u
        for sign in (1, -1)
    )
    np.testing.assert_allclose(h.inner(at_v[2], u), np.sum(c * (ahead - behind)) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 48, 48), (5, 3)], ids=str)
def test_a_few_columns_tell_the_radius_of_a_stiefel_point(shape):
    """Of a whole array only a part is read, and what it tells is no worse than round-off."""
    stiefel = Stiefel()
    x = 0.7 * stiefel.random_point(jax.random.key(0), shape)
    np.testing.assert_allclose(stiefel.radius_of(x), 0.7, rtol=2e-7)
    if min(shape[-2:]) > 16:
        readers = [each for each in jax.make_jaxpr(stiefel.radius_of)(x).eqns if each.invars[0].aval.shape == shape]
        assert [each.primitive.name for each in readers] == ["slice"]
