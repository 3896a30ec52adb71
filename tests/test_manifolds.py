"""One battery of geometric laws for manifold x retraction x shape x dtype x radius.

The library's numbers are judged by float64 NumPy formulas (helpers.py) and by laws that need no formula. Each law is
one jitted function at module level that takes the manifold as a pytree argument: a case compiles once, whatever its
radius. Tolerances are multiples of the dtype's eps, relative to the radius.
"""

import dataclasses
import itertools
from functools import partial

import helpers as h
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy import optimize, stats

import fgsgd_jax as fg

CLASSES = {"euclidean": fg.Euclidean, "sphere": fg.Sphere, "oblique": fg.Oblique, "stiefel": fg.Stiefel}

# Radii across a batch: the array radius. The unbatched and the scalar-radius cases are below.
RADII = np.array([1.0, 0.004, 30.0, 1.0, 0.004, 30.0])
BATCH = len(RADII)

SMALL = {
    "square": (BATCH, 3, 3),
    "tall": (BATCH, 6, 3),
    "wide": (BATCH, 2, 5),
    "column": (BATCH, 4, 1),
    "row": (BATCH, 1, 4),
    "entry": (BATCH, 1, 1),
}
EMPTY = {"empty batch": (0, 3, 3)}
BIG = {"many": (4096, 3, 3), "large": (512, 128)}

KINDS = pytest.mark.parametrize("kind", h.KINDS)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
ALL = {**SMALL, **EMPTY, **BIG}

# A case costs seconds of compilation and milliseconds of arithmetic: `make test` runs one dtype of the small shapes,
# `make test-all` the whole table.
FAST = {("square", "float32"), ("wide", "float64"), ("entry", "float32")}
FAST_EXP = {("square", "float32")}


def cases(names, *manifolds):
    """`names`, a shape and a dtype for each of `manifolds`, marked slow where `make test` leaves them out."""
    found = []
    for which in manifolds:
        for (name, shape), dtype in itertools.product(ALL.items(), ("float32", "float64")):
            fast = (name, dtype) in (FAST_EXP if "exp" in which else FAST)
            words = (*filter(None, which), name, dtype)
            found.append(pytest.param(*which, shape, dtype, id="-".join(words), marks=() if fast else pytest.mark.slow))
    return pytest.mark.parametrize((*names, "shape", "dtype"), found)


RETRACTIONS = [("euclidean", None), ("sphere", None), ("oblique", None), *(("stiefel", r) for r in h.RETRACTIONS)]
STEPS = pytest.mark.parametrize(
    ("kind", "retraction"), RETRACTIONS, ids=["-".join(filter(None, pair)) for pair in RETRACTIONS]
)


def seed(*words):
    """The same in every process: Python's own string hash is salted."""
    return np.random.default_rng(list(repr(words).encode()))


def manifold(kind, radius=1.0, dtype="float64", retraction=None):
    settings = {"retraction": retraction} if retraction else {}
    return CLASSES[kind](**settings).with_radius(jnp.asarray(radius, dtype))


def radius_for(shape):
    """The array radius on small batches; one small number on the big ones."""
    return RADII if shape[0] == BATCH and len(shape) == 3 else 0.004


def unit_of(kind, s):
    """What lengths are measured in: the radius, where a manifold has one."""
    return s if kind != "euclidean" else np.ones_like(s)


def tol(dtype, shape):
    """Round-off of a sum over the matrix, with slack; for 3 x 3 in float32 it is 3e-6."""
    return h.EPS[dtype] * 8 * max(3, (shape[-2] * shape[-1]) ** 0.5)


def cast(dtype, *arrays):
    return tuple(jnp.asarray(np.asarray(a), dtype) for a in arrays)


def close(a, b, s, limit):
    """|a - b| in units of the radius."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.all(np.isfinite(a))
    gap = np.abs(a - b) / (h.spread(s) if a.ndim >= 2 else np.asarray(s))
    assert np.max(gap, initial=0) <= limit, f"{np.max(gap, initial=0):.3e} > {limit:.3e}"


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


# --- random points: statistical tests with fixed seeds. Under the claim, each p-value is uniform, so that each of these
# assertions would fail for one seed in ten thousand.
LEAST_P = 1e-4


@partial(jax.jit, static_argnums=(2, 3))
def draw(m, key, shape, dtype):
    return m.random_point(key, shape, dtype)


def sphere_marginal(n):
    """(1 + an entry of a uniform unit vector of R^n) / 2 is Beta((n-1)/2, (n-1)/2)."""
    return stats.beta((n - 1) / 2, (n - 1) / 2, loc=-1, scale=2)


def p_of(sample, distribution):
    return stats.kstest(np.asarray(sample, np.float64), distribution.cdf).pvalue


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (5, 1)], ids=str)
def test_random_points_of_the_sphere(shape):
    x = np.asarray(draw(manifold("sphere", 0.5), jax.random.key(1), (4000, *shape), "float64")) / 0.5
    n = shape[0] * shape[1]
    for i, j in ((0, 0), (-1, -1)):
        assert p_of(x[:, i, j], sphere_marginal(n)) > LEAST_P
    # A direction that is not an axis: uniform means the same law in all of them.
    direction = h.point("sphere", seed("direction"), shape)
    assert p_of(h.inner(x, direction), sphere_marginal(n)) > LEAST_P
    # Entries squared, two at a time, are uncorrelated up to the constraint's -1/(n - 1).
    assert abs(np.corrcoef(x[:, 0, 0] ** 2, x[:, -1, -1] ** 2)[0, 1] + 1 / (n - 1)) < 4 / 4000**0.5


@pytest.mark.parametrize("shape", [(3, 2), (2, 4)], ids=str)
def test_random_points_of_the_oblique_manifold(shape):
    x = np.asarray(draw(manifold("oblique", 0.5), jax.random.key(2), (4000, *shape), "float64")) / 0.5
    n, p = shape
    direction = h.point("sphere", seed("direction"), (n, 1))[:, 0]
    for j in range(p):
        assert p_of(x[:, 0, j], sphere_marginal(n)) > LEAST_P
        assert p_of(direction @ x[:, :, j].T, sphere_marginal(n)) > LEAST_P
    # Columns are independent: the product of two of them along an axis has its law, not only no correlation.
    rng = seed("columns")
    expected = sphere_marginal(n).rvs((2, 20000), random_state=rng).prod(axis=0)
    assert stats.ks_2samp(x[:, 0, 0] * x[:, 0, 1], expected).pvalue > LEAST_P


@pytest.mark.parametrize("shape", [(3, 3), (2, 2), (6, 3), (2, 5)], ids=str)
def test_random_points_of_stiefel(shape):
    x = np.asarray(draw(manifold("stiefel", 0.5), jax.random.key(3), (4000, *shape), "float64")) / 0.5
    n = max(shape)
    # QR without its signs fixed fails here: its first entry is never positive.
    for i, j in ((0, 0), (-1, -1), (0, -1)):
        assert p_of(x[:, i, j], sphere_marginal(n)) > LEAST_P
    # Columns (rows, where wide) in a direction that is not an axis.
    columns = x if shape[0] >= shape[1] else h.transpose(x)
    direction = h.point("sphere", seed("direction"), (n, 1))[:, 0]
    assert p_of(direction @ columns[:, :, -1].T, sphere_marginal(n)) > LEAST_P


def test_random_points_of_the_orthogonal_group():
    x = np.asarray(draw(manifold("stiefel"), jax.random.key(4), (4000, 3, 3), "float64"))
    det = np.sign(np.linalg.det(x))
    assert stats.binomtest(int(np.sum(det > 0)), 4000).pvalue > LEAST_P
    # The angle of a Haar rotation has density (1 - cos t) / pi: more than the marginals of its entries.
    rotations = x * det[:, None, None]
    angle = np.arccos(np.clip((np.trace(rotations, axis1=-2, axis2=-1) - 1) / 2, -1, 1))
    assert stats.kstest(angle, lambda t: (t - np.sin(t)) / np.pi).pvalue > LEAST_P
    # Haar measure is invariant: the same law relative to any fixed rotation.
    fixed = h.point("stiefel", seed("fixed"), (3, 3))
    turned = np.trace(fixed @ x, axis1=-2, axis2=-1)
    assert stats.ks_2samp(turned[:2000], np.trace(x, axis1=-2, axis2=-1)[2000:]).pvalue > LEAST_P


@pytest.mark.parametrize("kind", h.KINDS[1:])
def test_random_signs(kind):
    """{-s, s}: both, equally often."""
    x = np.asarray(draw(manifold(kind, 0.5), jax.random.key(5), (4000, 1, 1), "float32"))
    np.testing.assert_array_equal(np.abs(x), 0.5)
    assert stats.binomtest(int(np.sum(x > 0)), 4000).pvalue > LEAST_P


@cases(["kind"], *((kind,) for kind in h.KINDS))
def test_random_points_are_points(kind, dtype, shape):
    s = radius_for(shape)
    m = manifold(kind, s, dtype)
    x = draw(m, jax.random.key(6), shape, dtype)
    assert x.shape == shape
    assert x.dtype == dtype
    assert np.all(np.isfinite(x))
    assert np.all(h.violation(kind, x, s) <= tol(dtype, shape))
    again, other = draw(m, jax.random.key(6), shape, dtype), draw(m, jax.random.key(7), shape, dtype)
    np.testing.assert_array_equal(x, again)
    if h.dim(kind, *shape[-2:]) and x.size:
        assert not np.any(np.all(np.asarray(x) == np.asarray(other), axis=(-2, -1)))


def test_random_point_is_float32_unless_told():
    assert fg.Sphere().random_point(jax.random.key(0), (2, 3, 3)).dtype == jnp.float32


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
