"""Points where nothing is unique, and steps without end: some valid point, the same each time, never NaN."""

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgsgd_jax as fg
from fgsgd_jax import kernels
from fgsgd_jax.manifolds import Mixture

MANIFOLDS = {
    "sphere": fg.Sphere(),
    "oblique": fg.Oblique(),
    **{f"stiefel {name}": fg.Stiefel(retraction=name) for name in h.RETRACTIONS},
}
SQUARE, TALL, WIDE, COLUMN = (3, 3), (5, 3), (2, 4), (4, 1)
# In float32 at radius 1; the figure of the whole project is 1e-6.
LIMIT = {"float32": 1e-6, "float64": 1e-14}


def degenerate(shape, rng):
    """Matrices of which the nearest point is not unique, or which overflow or vanish where they are squared."""
    n, p = shape
    regular = rng.standard_normal(shape)
    column, row = rng.standard_normal((n, 1)), rng.standard_normal((1, p))
    return {
        "zero": np.zeros(shape),
        "ones": np.ones(shape),
        "one entry": np.eye(n, p) * (np.arange(p) == 0),
        "rank one": column @ row,
        "repeated columns": np.repeat(column, p, axis=1),
        "opposite columns": np.repeat(column, p, axis=1) * (-1.0) ** np.arange(p),
        "a zero column": regular * (np.arange(p) > 0),
        "a zero row": regular * (np.arange(n) > 0)[:, None],
        "nearly rank one": column @ row + 1e-12 * regular,
        "graded": regular * 10.0 ** (-12 * np.arange(p)),
        "denormal": 1e-40 * regular,
        "tiny": 1e-30 * regular,
        "huge": 1e30 * regular,
        "largest": 3e38 * np.sign(regular),
        "a rank above nothing": np.eye(n, p) * np.where(np.arange(p) == p - 1, 1e-30, 1),
    }


@jax.jit
def nearest(m, a):
    return m.nearest(a)


@jax.jit
def retract(m, x, v):
    return m.retract(x, v)


def check(m, kind, answers, names, dtype):
    """Every answer is on the manifold, by the library's own figure and by another."""
    assert answers.dtype == dtype
    broken = [name for name, answer in zip(names, answers, strict=True) if not np.all(np.isfinite(answer))]
    assert broken == []
    violations = h.violation(kind, np.asarray(answers, np.float64))
    off = {name: float(found) for name, found in zip(names, violations, strict=True) if found > LIMIT[dtype]}
    assert off == {}
    worst = float(np.max(np.asarray(m.violation(answers), np.float64)))
    assert worst <= LIMIT[dtype]
    return max(worst, float(np.max(violations)))


CASES = [
    pytest.param(
        name, shape, dtype, marks=() if (shape, dtype) == (TALL, "float32") and "exp" not in name else pytest.mark.slow
    )
    for name in MANIFOLDS
    for shape in (SQUARE, TALL, WIDE, COLUMN)
    for dtype in LIMIT
]


@pytest.mark.parametrize(("name", "shape", "dtype"), CASES, ids=str)
def test_degenerate_points_and_endless_steps(name, shape, dtype, record_property):
    m, kind, rng = MANIFOLDS[name], name.split()[0], np.random.default_rng(0)
    matrices = degenerate(shape, rng)
    points = jnp.asarray(np.stack(list(matrices.values())), dtype)
    answers = nearest(m, points)
    worst = check(m, kind, answers, matrices, dtype)
    np.testing.assert_array_equal(answers, nearest(m, points))
    # A point's own nearest is itself.
    np.testing.assert_allclose(nearest(m, answers), answers, atol=4 * LIMIT[dtype])

    # From points of the manifold: to nowhere, to the antipode, into every degenerate matrix, and far beyond.
    starts, steps, names = [], [], []

    def add(what, x, v):
        starts.append(np.broadcast_to(x, shape))
        steps.append(np.broadcast_to(v, shape))
        names.append(what)

    x = h.point(kind, rng, shape)
    add("stay", x, 0 * x)
    add("to zero", x, -x)
    add("antipode", x, -2 * x)
    for what, a in matrices.items():
        add(f"onto: {what}", x, a - x)
        add(f"along: {what}", x, a)
        # And from there: no point of the manifold.
        add(f"from: {what}", a, 0 * x)
        add(f"away from: {what}", a, x)
    tangent = h.tangent(kind, rng, x)
    for exponent in range(-42, 39, 4):
        add(f"1e{exponent} radii", x, 10.0**exponent * tangent)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = tangent.copy()
        spoilt[0, 0] = bad
        add(f"{bad} in a step", x, spoilt)
        add(f"{bad} throughout a point", np.full(shape, bad), tangent)
    with np.errstate(over="ignore"):
        starts, steps = (jnp.asarray(np.stack(arrays), dtype) for arrays in (starts, steps))
    ends = retract(m, starts, steps)
    worst = max(worst, check(m, kind, ends, names, dtype))
    np.testing.assert_array_equal(ends, retract(m, starts, steps))
    # Where no step can be taken, the point keeps its place; on the oblique manifold that is a column's.
    own = (slice(None), slice(0, 1) if kind == "oblique" else slice(None))
    for what in ("nan in a step", "inf in a step", "-inf in a step", "stay"):
        np.testing.assert_allclose(ends[names.index(what)][own], x[own], atol=4 * LIMIT[dtype], err_msg=what)
    record_property("inputs tried", len(matrices) + len(names))
    record_property("worst violation", worst)


@jax.jit
def displace(mixture, x, v):
    ((displacement,),), _ = kernels.step([mixture], [[x]], [[v]], is_tangent=True)
    return displacement


@pytest.mark.slow
def test_steps_far_larger_than_the_radius_among_many_small_matrices(record_property):
    """The path on which small matrices share their products: one chooses its iterations for all."""
    rng, count = np.random.default_rng(1), 1100
    kinds = tuple(MANIFOLDS[name] for name in ("sphere", "oblique", "stiefel polar"))
    kind = rng.integers(0, 3, count).astype(np.int8)
    radius = 10.0 ** rng.uniform(-3, 3, count)
    names = ("sphere", "oblique", "stiefel")
    x = np.stack([h.point(names[k], rng, SQUARE, s) for k, s in zip(kind, radius, strict=True)])
    direction = np.stack(
        [h.tangent(names[k], rng, point, s, length=s) for k, point, s in zip(kind, x, radius, strict=True)]
    )
    mixture = Mixture(kinds, jnp.asarray(kind), jnp.asarray(radius, jnp.float32))
    x, worst = jnp.asarray(x, jnp.float32), 0.0
    # Alone (so that near steps are among themselves) and mixed.
    exponents = [np.full(count, float(e)) for e in range(-6, 15, 2)] + [rng.uniform(-30, 14, count)]
    for exponent in exponents:
        v = jnp.asarray(10.0 ** exponent[:, None, None] * direction, jnp.float32)
        displacement = displace(mixture, x, v)
        assert np.all(np.isfinite(displacement))
        # The displacement is added in float32, which rounds each entry by half an ulp.
        worst = max(worst, float(jnp.max(mixture.violation(x + displacement))))
    assert worst <= 1e-6
    record_property("inputs tried", count * len(exponents))
    record_property("worst violation", worst)
