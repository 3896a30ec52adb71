"""Against pymanopt, an independent implementation in float64 NumPy, of radius 1 and one point at a time.

Its Stiefel manifold has the same embedded metric as ours (its metric is `tensordot`, its exponential the geodesic of
Edelman et al.), so projection, transport and exponential must agree and not only be similar. Its Stiefel has no log.
"""

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pymanopt import manifolds as pymanopt

import fgsgd_jax as fg

CASES = {
    "sphere 3x3": (fg.Sphere(), lambda n, p: pymanopt.Sphere(n, p), (3, 3)),
    "sphere 2x5": (fg.Sphere(), lambda n, p: pymanopt.Sphere(n, p), (2, 5)),
    "sphere 7x1": (fg.Sphere(), lambda n, p: pymanopt.Sphere(n, p), (7, 1)),
    "oblique 3x3": (fg.Oblique(), lambda n, p: pymanopt.Oblique(n, p), (3, 3)),
    "oblique 2x5": (fg.Oblique(), lambda n, p: pymanopt.Oblique(n, p), (2, 5)),
    "oblique 6x2": (fg.Oblique(), lambda n, p: pymanopt.Oblique(n, p), (6, 2)),
    "polar 3x3": (fg.Stiefel(), lambda n, p: pymanopt.Stiefel(n, p, retraction="polar"), (3, 3)),
    "polar 6x3": (fg.Stiefel(), lambda n, p: pymanopt.Stiefel(n, p, retraction="polar"), (6, 3)),
    "qr 3x3": (fg.Stiefel(retraction="qr"), lambda n, p: pymanopt.Stiefel(n, p, retraction="qr"), (3, 3)),
    "qr 8x5": (fg.Stiefel(retraction="qr"), lambda n, p: pymanopt.Stiefel(n, p, retraction="qr"), (8, 5)),
}
COUNT = 5


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """(theirs, ours, radius, points x, y, tangent vectors u, v at x, ambient g), ours batched over the points."""
    ours, theirs, shape = CASES[request.param]
    kind = type(ours).__name__.lower()
    rng = np.random.default_rng(list(request.param.encode()))
    x = h.point(kind, rng, (COUNT, *shape))
    y = h.point(kind, rng, (COUNT, *shape))
    u, v = (h.tangent(kind, rng, x) for _ in range(2))
    return theirs(*shape), ours, x, y, u, v, rng.standard_normal(x.shape)


@pytest.mark.parametrize("s", [1.0, 0.004])
def test_agrees_with_pymanopt(case, s):
    """Theirs at radius 1, ours at s: geometry scales with the radius."""
    theirs, ours, x, y, u, v, g = case
    ours = ours.with_radius(s)
    ours_at = jnp.asarray(s * x), jnp.asarray(s * y), jnp.asarray(s * u), jnp.asarray(s * v), jnp.asarray(g)

    @jax.jit
    def all_of(m, x, y, u, v, g):
        return {
            "projection": m.project(x, g) * s,
            "to_tangent_space": m.project(x, g) * s,
            "retraction": m.retract(x, v),
            "exp": m.exp(x, v),
            "transport": m.transport(x, y, v),
            "inner_product": m.inner(x, u, v) / s,
            "norm": m.norm(x, v),
        }

    found = {name: np.asarray(value) / s for name, value in all_of(ours, *ours_at).items()}
    for i in range(COUNT):
        expected = {
            "projection": theirs.projection(x[i], g[i]),
            "to_tangent_space": theirs.to_tangent_space(x[i], g[i]),
            "retraction": theirs.retraction(x[i], v[i]),
            "exp": theirs.exp(x[i], v[i]),
            "transport": theirs.transport(x[i], y[i], v[i]),
            "inner_product": theirs.inner_product(x[i], u[i], v[i]),
            "norm": theirs.norm(x[i], v[i]),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][i], value, rtol=1e-10, atol=1e-10, err_msg=name)
    assert ours.dim(x.shape[-2:]) == theirs.dim


def test_distance_and_logarithm_agree_with_pymanopt(case):
    theirs, ours, x, y, *_ = case
    if isinstance(ours, fg.Stiefel):
        # pymanopt has no logarithm there: this fails when it gets one, which is to be compared then.
        with pytest.raises(NotImplementedError):
            theirs.log(x[0], y[0])
        return
    log, dist = jax.jit(lambda m, x, y: (m.log(x, y), m.dist(x, y)))(ours, jnp.asarray(x), jnp.asarray(y))
    for i in range(COUNT):
        np.testing.assert_allclose(log[i], theirs.log(x[i], y[i]), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(dist[i], theirs.dist(x[i], y[i]), rtol=1e-10, atol=1e-10)


def test_points_and_tangent_vectors_are_pymanopts_too(case):
    """Drawn by each, they satisfy the other's definition."""
    theirs, ours, *_ = case
    drawn = np.stack([theirs.random_point() for _ in range(COUNT)])
    np.testing.assert_allclose(ours.violation(jnp.asarray(drawn)), 0, atol=1e-12)
    for point in drawn:
        vector = theirs.random_tangent_vector(point)
        np.testing.assert_allclose(ours.project(jnp.asarray(point), jnp.asarray(vector)), vector, atol=1e-12)
    mine = ours.random_point(jax.random.key(0), drawn.shape, "float64")
    tangent = ours.random_tangent(jax.random.key(1), mine)
    for point, vector in zip(np.asarray(mine), np.asarray(tangent), strict=True):
        np.testing.assert_allclose(theirs.retraction(point, 0 * point), point, atol=1e-12)
        np.testing.assert_allclose(theirs.projection(point, vector), vector, atol=1e-12)


@pytest.mark.parametrize("kind", ["sphere", "oblique", "stiefel"])
@pytest.mark.parametrize("shape", [(3, 3), (5, 2)], ids=str)
def test_curvatures_agree_with_pymanopts_weingarten_map(kind, shape):
    """The oracle of the curvature tests is itself judged: <W(u, n), v> = <II(u, v), n> for a normal n."""
    rng = np.random.default_rng(0)
    theirs = {"sphere": pymanopt.Sphere, "stiefel": pymanopt.Stiefel}.get(kind)
    if theirs is None:
        pytest.skip("pymanopt's oblique manifold has no Weingarten map")
    x = h.point(kind, rng, shape)
    u, v = (h.tangent(kind, rng, x) for _ in range(2))
    g = rng.standard_normal(shape)
    normal = g - h.project(kind, x, g)
    np.testing.assert_allclose(
        h.inner(theirs(*shape).weingarten(x, u, normal), v),
        h.inner(h.second_form(kind, x, u, v), normal),
        rtol=1e-10,
    )
