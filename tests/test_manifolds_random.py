"""Random points are points, and uniform."""

from functools import partial

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from geometries import cases, manifold, radius_for, seed, tol
from scipy import stats

import fgsgd_jax as fg

# Statistical tests with fixed seeds. Under the claim, each p-value is uniform, so that each of these assertions would
# fail for one seed in ten thousand.
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
