"""Directions of steepest descent on matrices, beside NumPy in float64 and a convex solver."""

import types

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from direction_examples import MANIFOLDS, directions, examples, steepest

import fgsgd_jax as fg
from fgsgd_jax import linalg
from fgsgd_jax.manifolds import _tangent_ball, check_steepest

msign = jax.jit(linalg.msign, static_argnums=1)


@pytest.mark.parametrize("shape", [(3, 2), (4, 7), (5, 1), (1, 5), (24, 16)], ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-12), ("float32", 2e-5)])
def test_msign_is_the_polar_factor(shape, dtype, limit):
    y = np.random.default_rng(0).standard_normal((3, *shape))
    found = msign(jnp.asarray(y, dtype), False)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, h.polar(y), rtol=0, atol=limit)
    # A CPU's products are exact. Matrices of bfloat16 round more often than the products of a TPU.
    for rough, most in ((dtype, 0.15), ("bfloat16", 0.16)):
        coarse = np.linalg.svd(np.asarray(msign(jnp.asarray(y, rough), True), np.float64), compute_uv=False)
        assert np.abs(coarse - 1).max() <= most


def test_msign_has_no_direction_where_there_is_none():
    """Zero stays zero, and a matrix without full rank gets no singular vectors that are not its own."""
    rng = np.random.default_rng(0)
    skew = rng.standard_normal((3, 3))
    skew = jnp.asarray(skew - skew.T)
    found = msign(skew, False)
    np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False), [1, 1, 0], atol=1e-10)
    np.testing.assert_allclose(found, -found.T, atol=1e-10)
    assert not np.any(msign(jnp.zeros((2, 4, 3)), False))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_msign_takes_any_scale(scale):
    y = np.random.default_rng(0).standard_normal((5, 3))
    np.testing.assert_allclose(msign(jnp.asarray(scale * y, "float32"), False), h.polar(y), rtol=0, atol=1e-5)


# --- each manifold's direction


@pytest.mark.parametrize("kind", h.KINDS)
@pytest.mark.parametrize("tangent", [True, False])
@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 3, 5)], ids=str)
def test_directions_are_those_of_the_rules(kind, tangent, shape):
    s = np.array([0.1, 1.0, 2.0, 30.0])
    x, g = examples(kind, shape, s)
    found = directions(kind, tangent=tangent)(x, g, s)
    np.testing.assert_allclose(found, steepest(kind, x, g, s, tangent), rtol=0, atol=1e-10)


def nuclear_bound(x, g):
    """The least ‖Π(g) + xΛ‖_* over symmetric Λ: no tangent vector of the unit spectral ball has more of g.

    The dual of the problem, smoothed less and less, by SciPy's quasi-Newton method. Any Λ gives an upper bound.
    """
    t = h.project("stiefel", x, g)
    p = x.shape[-1]
    upper = np.triu_indices(p)

    def full(coordinates):
        matrix = np.zeros((p, p))
        matrix[upper] = coordinates
        return matrix + matrix.T

    def smoothed(coordinates, delta):
        u, sigma, vt = np.linalg.svd(t + x @ full(coordinates), full_matrices=False)
        smooth = np.sqrt(sigma**2 + delta**2)
        slope = x.T @ (u * (sigma / smooth)) @ vt
        return smooth.sum(), (slope + slope.T)[upper]

    coordinates = np.zeros(len(upper[0]))
    for delta in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        found = scipy.optimize.minimize(
            smoothed, coordinates, (delta,), jac=True, method="L-BFGS-B", options={"maxiter": 3000, "maxfun": 9000}
        )
        coordinates = found.x
    return np.linalg.svd(t + x @ full(coordinates), compute_uv=False).sum()


@pytest.mark.parametrize("shape", [(3, 2), (4, 2), (5, 3), (6, 3), (9, 3), (4, 4), (3, 3), (2, 4), (6, 1)], ids=str)
def test_dual_attains_the_bound_of_a_convex_solver(shape):
    x, g = examples("stiefel", (3, *shape))
    found = np.asarray(directions("stiefel", "dual")(x, g, 1.0))
    assert np.linalg.norm(found, 2, axis=(-2, -1)).max() <= 1 + 1e-6
    np.testing.assert_allclose(h.project("stiefel", x, found), found, rtol=0, atol=1e-12)
    for point, gradient, direction in zip(x, g, found, strict=True):
        if shape[0] < shape[1]:
            point, gradient, direction = point.T, gradient.T, direction.T
        bound = nuclear_bound(point, gradient)
        value = h.inner(gradient, direction)
        # The solver's own tolerance, at each side of the tolerance that is promised.
        assert (1 - 1.2e-4) * bound <= value <= (1 + 1e-6) * bound


def test_dual_is_steeper_than_the_tangent_part_of_polar():
    x, g = examples("stiefel", (20, 5, 3))
    dual = np.asarray(directions("stiefel", "dual")(x, g, 1.0))
    polar = h.project("stiefel", x, np.asarray(directions("stiefel")(x, g, 1.0)))
    lengths = np.linalg.norm(polar, 2, axis=(-2, -1))
    # The projection makes the Frobenius norm shorter, but the spectral norm longer.
    assert np.all(lengths > 1.001)
    polar /= lengths[:, None, None]
    assert np.all(h.inner(g, dual) >= (1 - 1e-4) * h.inner(g, polar))
    assert np.mean(h.inner(g, dual)) > 1.005 * np.mean(h.inner(g, polar))


def test_dual_takes_tens_to_hundreds_of_times_the_products(monkeypatch):
    """As its docstrings say: a turn has two msigns and three projections, "polar" one of each."""
    turns, loop = [], _tangent_ball.lax.while_loop

    def counted(*args):
        carry = loop(*args)
        turns.append(int(carry[-1]))
        return carry

    monkeypatch.setattr(_tangent_ball, "lax", types.SimpleNamespace(while_loop=counted))
    x, g = map(jnp.asarray, examples("stiefel", (4, 6, 4)))
    fg.Stiefel().steepest(x, g, "dual")
    assert 10 <= turns[0] < 300


def test_dual_in_float32_and_of_hard_gradients():
    """Gradients of rank one, without a tangent part, of six decades, and none."""
    x, _ = examples("stiefel", (4, 6, 4))
    rng = np.random.default_rng(1)
    u, v = np.linalg.qr(rng.standard_normal((6, 4)))[0], np.linalg.qr(rng.standard_normal((4, 4)))[0]
    symmetric = h.sym(rng.standard_normal((4, 4)))
    g = np.stack([np.outer(u[:, 0], v[0]), x[1] @ symmetric, u * np.logspace(0, -6, 4) @ v, 0 * u])
    found = np.asarray(directions("stiefel", "dual")(jnp.asarray(x, "float32"), jnp.asarray(g, "float32"), 1.0), float)
    assert np.all(np.isfinite(found))
    assert np.linalg.norm(found, 2, axis=(-2, -1)).max() <= 1 + 1e-4
    np.testing.assert_allclose(h.project("stiefel", x, found), found, rtol=0, atol=1e-6)
    assert h.inner(g[0], found[0]) >= (1 - 1e-3) * nuclear_bound(x[0], g[0])
    assert not np.any(found[3])


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"method": "dual", "coarse": True}, "leave out coarse=True"),
        ({"method": "dual", "tangent": False}, "leave out tangent=False"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        fg.steepest([("*", None)], **options)


def test_methods_are_named_in_the_refusal_of_another():
    with pytest.raises(ValueError, match=r"choose one of \('polar', 'dual'\)"):
        check_steepest("newton", True, False)


# --- the way back


@pytest.mark.parametrize(
    ("kind", "shape", "count", "retraction"),
    [
        # The shapes are those of the forms that serve CPUs.
        ("stiefel", (3, 3), 64, "polar"),
        ("stiefel", (96, 40), 2, "polar"),
        ("stiefel", (5, 3), 4, "qr"),
        ("stiefel", (5, 3), 4, "cayley"),
        ("stiefel", (3, 5), 4, "cayley"),
        ("stiefel", (5, 3), 4, "exp"),
        ("sphere", (3, 3), 64, "polar"),
        ("sphere", (40, 30), 2, "polar"),
        ("oblique", (3, 3), 64, "polar"),
        ("oblique", (40, 30), 2, "polar"),
    ],
    ids=str,
)
def test_retract_takes_what_is_not_tangent(kind, shape, count, retraction):
    """Polar retractions go to the point nearest to ω + v; those that know tangent vectors alone project v."""
    manifold = fg.Stiefel(radius=2.0, retraction=retraction) if kind == "stiefel" else MANIFOLDS[kind](radius=2.0)
    x, g = examples(kind, (1, count, *shape), 2.0)
    v = -0.7 * steepest(kind, x, g, 2.0, tangent=False)
    link = fg.retract([("w", fg.Each(manifold, view="i o r c -> i o r c"))])
    params, updates = {"w": jnp.asarray(x)}, {"w": jnp.asarray(v)}
    moved, _ = jax.jit(link.update)(updates, link.init(params), params)
    reached = x + np.asarray(moved["w"])
    assert h.violation(kind, reached, 2.0).max() <= 1e-13
    if retraction == "polar":
        expected = h.nearest(kind, x + v, 2.0)
    else:
        own = v if retraction == "qr" else h.project(kind, x, v, 2.0)
        expected = np.stack([h.retract(kind, retraction, *pair, 2.0) for pair in zip(x[0], own[0], strict=True)])[None]
    np.testing.assert_allclose(reached, expected, rtol=0, atol=1e-11)
