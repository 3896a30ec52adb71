"""Exponential, logarithm, distance and curvature."""

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from geometries import DTYPES, KINDS, cases, cast, close, manifold, radius_for, seed, tol, unit_of
from scipy import optimize

# --- geodesics

# Norms of tangent vectors in radii; the injectivity radius is pi on the sphere and above 0.89 pi on Stiefel.
LENGTHS = {"float32": [1e-2, 0.5, 1.0, 0.3, 1.5, 2.0], "float64": [1e-4, 0.5, 2.5, 0.0, 1.5, 2.0]}


@jax.jit
def geodesic_laws(m, x, v):
    y = m.exp(x, v)
    w = m.log(x, y)
    half = m.exp(x, v / 2)
    return {
        "end": y,
        "log": w,
        "end again": m.exp(x, w),
        "length": m.norm(x, w),
        "there": m.dist(x, y),
        "back": m.dist(y, x),
        "first half": m.dist(x, half),
        "second half": m.dist(half, y),
        "nowhere": m.dist(x, x),
        "log to itself": m.log(x, x),
    }


@cases(["kind"], *((kind,) for kind in h.KINDS))
def test_geodesic_laws(kind, shape, dtype):
    s, rng = radius_for(shape), seed(kind, shape)
    eps = 4 * tol(dtype, shape)
    m = manifold(kind, s, dtype)
    s = unit_of(kind, s)
    x = h.point(kind, rng, shape, s)
    lengths = s * np.asarray(LENGTHS[dtype]) if np.ndim(s) else s * 0.7
    v = h.tangent(kind, rng, x, s, length=lengths)
    out = geodesic_laws(m, *cast(dtype, x, v))
    out = {name: np.asarray(value, np.float64) for name, value in out.items()}

    close(out["end"], h.exp(kind, x, v, s), s, eps)
    close(out["log"], v, s, 4 * eps)
    close(out["end again"], out["end"], s, 4 * eps)
    length = h.norm(v)
    # acos and sqrt(1 - cos^2) lose half the digits near 0 and pi: dist must not be made of them.
    for name in ("there", "back", "length"):
        close(out[name], length, s, 4 * eps)
    for name in ("first half", "second half"):
        close(out[name], length / 2, s, 4 * eps)
    close(out["nowhere"], 0 * length, s, eps)
    close(out["log to itself"], 0 * x, s, eps)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("shape", [(3, 3), (6, 3), (2, 5), (4, 1)], ids=str)
def test_geodesics_have_constant_speed_and_normal_acceleration(kind, shape):
    """Together they say: geodesics of the embedded metric. Any other metric's fail the second."""
    s, rng = 0.5, seed(kind, shape)
    x = h.point(kind, rng, shape, s)
    v = h.tangent(kind, rng, x, s, length=1.3)

    @jax.jit
    def motion(m, x, v, times):
        def position(t):
            return m.exp(x, t * v)

        def velocity(t):
            return jax.jvp(position, (t,), (jnp.ones_like(t),))[1]

        def both(t):
            return jax.jvp(velocity, (t,), (jnp.ones_like(t),))

        return jax.vmap(lambda t: (position(t), *both(t)))(times)

    times = jnp.array([0.0, 0.3, 1.0, 2.0])
    at, velocity, acceleration = (np.asarray(a) for a in motion(manifold(kind, s), *cast("float64", x, v), times))
    np.testing.assert_allclose(h.norm(velocity), 1.3, rtol=1e-9)
    np.testing.assert_allclose(velocity[0], v, atol=1e-12)
    np.testing.assert_allclose(h.project(kind, at, acceleration, s), 0 * at, atol=1e-8)
    if kind != "euclidean":
        assert np.all(h.norm(acceleration) > 0.1)  # it does turn: the line above is not vacuous


@jax.jit
def pair_laws(m, x, y):
    w = m.log(x, y)
    return w, m.exp(x, w), m.dist(x, y), m.dist(y, x), m.norm(x, w)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sphere", "oblique"])
@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (4, 1)], ids=str)
def test_log_of_random_pairs_is_minimal(kind, shape):
    rng = seed(kind, shape)
    x, y = (h.point(kind, rng, (200, *shape), 0.3) for _ in range(2))
    w, end, there, back, length = (np.asarray(a) for a in pair_laws(manifold(kind, 0.3), *cast("float64", x, y)))
    axis = (-2, -1) if kind == "sphere" else -2
    angles = np.arccos(np.clip(np.sum(x * y, axis=axis) / 0.09, -1, 1))
    expected = 0.3 * (angles if kind == "sphere" else np.linalg.norm(angles, axis=-1))
    np.testing.assert_allclose(end, y, atol=1e-12)
    np.testing.assert_allclose(h.project(kind, x, w, 0.3), w, atol=1e-12)
    for value in (there, back, length):
        np.testing.assert_allclose(value, expected, atol=1e-9)


@pytest.mark.slow
def test_stiefel_log_of_random_rotations_is_the_matrix_logarithm():
    """On O(3) geodesics are one-parameter groups, so the distance is sqrt(2) x the angle, up to sqrt(2) pi."""
    rng = seed("rotations")
    x = h.point("stiefel", rng, (200, 3, 3))
    y = h.point("stiefel", rng, (200, 3, 3))
    y = y * np.sign(np.linalg.det(y) * np.linalg.det(x))[:, None, None]
    _, end, there, back, length = (np.asarray(a) for a in pair_laws(manifold("stiefel"), *cast("float64", x, y)))
    cosines = (np.trace(h.transpose(x) @ y, axis1=-2, axis2=-1) - 1) / 2
    expected = np.sqrt(2) * np.arccos(np.clip(cosines, -1, 1))
    np.testing.assert_allclose(end, y, atol=1e-8)
    for value in (there, back, length):
        np.testing.assert_allclose(value, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 3), (5, 2), (2, 5), (4, 3)], ids=str)
def test_stiefel_log_of_random_pairs_is_right_or_nan(shape):
    """The iteration may give up on far points, never answer wrongly; nearly all random pairs are within its reach."""
    rng = seed("stiefel pairs", shape)
    x, y = (h.point("stiefel", rng, (100, *shape), 0.3) for _ in range(2))
    w, end, there, back, length = (np.asarray(a) for a in pair_laws(manifold("stiefel", 0.3), *cast("float64", x, y)))
    found = np.isfinite(length)
    assert np.mean(found) >= 0.9
    np.testing.assert_allclose(end[found], y[found], atol=1e-8)
    np.testing.assert_allclose(h.project("stiefel", x, w, 0.3)[found], w[found], atol=1e-9)
    np.testing.assert_allclose(there[found], length[found], atol=1e-9)
    both = found & np.isfinite(back)
    np.testing.assert_allclose(there[both], back[both], atol=1e-7)
    assert np.all(there[found] >= h.norm(x - y)[found] - 1e-9)  # no shorter than the chord


@DTYPES
def test_antipodes(dtype):
    """Every direction leads there; log picks one that does, of the right length."""
    rng = seed("antipodes")
    for kind, count in (("sphere", 1), ("oblique", 3)):
        x = h.point(kind, rng, (5, 4, 3), 0.3)
        w, end, there, back, length = pair_laws(manifold(kind, 0.3, dtype), *cast(dtype, x, -x))
        for value in (there, back, length):
            np.testing.assert_allclose(value, 0.3 * np.pi * count**0.5, rtol=1e-3 if dtype == "float32" else 1e-7)
        np.testing.assert_allclose(end, -x, atol=0.3 * (1e-3 if dtype == "float32" else 1e-7))
        np.testing.assert_allclose(h.project(kind, x, np.asarray(w, np.float64), 0.3), w, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("stiefel", (3, 3)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("stiefel", (1, 1)), ("sphere", (1, 1)), ("oblique", (1, 1)), ("oblique", (1, 4)))
        ),
    ],
    ids=str,
)
def test_components_are_infinitely_far_apart(kind, shape):
    """And one such pair in a batch leaves its neighbours alone."""
    rng = seed(kind, shape)
    x = h.point(kind, rng, (3, *shape), 0.3)
    y = x.copy()
    y[1, :, -1] *= -1
    w, _, there, back, _ = (np.asarray(a) for a in pair_laws(manifold(kind, 0.3), *cast("float64", x, y)))
    np.testing.assert_allclose(there, [0, np.inf, 0], atol=1e-9)
    np.testing.assert_allclose(back, [0, np.inf, 0], atol=1e-9)
    assert np.any(np.isnan(w[1]))
    np.testing.assert_allclose(w[[0, 2]], 0, atol=1e-9)


@jax.jit
def gradients_of_half_squared_distance(m, x, y):
    return jax.grad(lambda x, y: m.dist(x, y) ** 2 / 2, (0, 1))(x, y)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("shape", [(3, 3), (5, 2), pytest.param((2, 5), marks=pytest.mark.slow)], ids=str)
def test_gradient_of_half_squared_distance_is_minus_log(kind, shape):
    """Riemannian gradient of dist^2/2 at x is -log_x(y); and it is finite where x = y, as sqrt's is not."""
    rng, s = seed(kind, shape), 0.3
    m = manifold(kind, s)
    x = h.point(kind, rng, shape, s)
    v = h.tangent(kind, rng, x, s, length=0.8 * s)
    y = h.exp(kind, x, v, s)
    at_x, at_y = gradients_of_half_squared_distance(m, *cast("float64", x, y))
    np.testing.assert_allclose(h.project(kind, x, np.asarray(at_x), s), -v, atol=1e-7)
    # The geodesic arrives at y with the velocity that its own logarithm, reversed, leaves with.
    step = 1e-5
    arriving = (h.exp(kind, x, (1 + step) * v, s) - h.exp(kind, x, (1 - step) * v, s)) / (2 * step)
    np.testing.assert_allclose(h.project(kind, y, np.asarray(at_y), s), arriving, atol=1e-7)
    for g in gradients_of_half_squared_distance(m, *cast("float64", x, x)):
        np.testing.assert_allclose(h.project(kind, x, np.asarray(g), s), 0 * x, atol=1e-7)


# --- curvature


def bounds_of(kind, shape, s=1.0):
    return tuple(float(b) for b in manifold(kind, s).curvature_bounds(shape))


def plane(kind, rng, x, s, count):
    return (h.tangent(kind, rng, np.broadcast_to(x, (count, *x.shape)), s) for _ in range(2))


# Extremes found by climbing on the sampled curvature itself. {kind, shape: (lowest, highest) x s^2}.
EXTREMES = {
    ("sphere", (3, 3)): (1, 1),
    ("sphere", (1, 3)): (1, 1),
    ("oblique", (3, 1)): (1, 1),
    ("oblique", (3, 2)): (0, 1),
    ("stiefel", (4, 1)): (1, 1),
    ("stiefel", (3, 3)): (1 / 8, 1 / 8),
    ("stiefel", (4, 2)): (-1 / 2, 1),
    ("stiefel", (5, 3)): (-1 / 2, 1),
    ("stiefel", (6, 3)): (-1 / 2, 1),
    ("stiefel", (3, 6)): (-1 / 2, 1),
}


@pytest.mark.parametrize(("kind", "shape"), EXTREMES, ids=str)
def test_curvature_bounds_are_reached(kind, shape):
    """No bound could be tighter: some plane comes within 1% of it (of 1)."""
    s, rng = 0.5, seed("climb", kind, shape)
    lowest, highest = (bound / s**2 for bound in EXTREMES[kind, shape])
    lo, hi = bounds_of(kind, shape, s)
    assert (lo, hi) == pytest.approx((lowest, highest), rel=1e-5, abs=1e-5)
    x = h.point(kind, rng, shape, s)

    def curvature(z, sign):
        u, v = (h.project(kind, x, w, s) for w in z.reshape(2, *shape))
        return sign * float(h.sectional_curvature(kind, x, u, v, s))

    for sign, bound in ((1, lo), (-1, hi)):
        found = [
            sign
            * optimize.minimize(
                curvature, rng.standard_normal(2 * x.size), (sign,), method="BFGS", options={"maxiter": 60}
            ).fun
            for _ in range(4)
        ]
        assert min(sign * (f - bound) for f in found) < 0.01 / s**2
        assert all(lo - 1e-6 <= f <= hi + 1e-6 for f in found)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize(
    "shape",
    [(2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (5, 5), (5, 2), (8, 3), (2, 5), (1, 4), (4, 1), (2, 1)],
    ids=str,
)
@pytest.mark.parametrize("s", [1.0, 0.004])
def test_sampled_curvatures_are_within_bounds(kind, shape, s):
    lo, hi = bounds_of(kind, shape, s)
    if h.dim(kind, *shape) < 2:
        return  # there are no planes
    assert lo <= hi
    rng = seed("sample", kind, shape)
    x = h.point(kind, rng, shape, s)
    u, v = plane(kind, rng, x, s, 2000)
    # Random planes crowd around the mean; those of few entries do not.
    sparse_u, sparse_v = (h.project(kind, x, w * (rng.random(w.shape) < 0.4), s) for w in (u, v))
    u, v = np.concatenate([u, sparse_u]), np.concatenate([v, sparse_v])
    with np.errstate(invalid="ignore", divide="ignore"):
        sampled = h.sectional_curvature(kind, x, u, v, s)
        area = h.inner(u, u) * h.inner(v, v) - h.inner(u, v) ** 2
        sampled = sampled[area > 1e-6 * h.inner(u, u) * h.inner(v, v)]
    assert len(sampled) > 1000
    slack = 1e-5 / s**2
    assert np.min(sampled) >= lo - slack
    assert np.max(sampled) <= hi + slack
