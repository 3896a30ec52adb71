"""Matrix functions against SciPy and NumPy in float64, and on the inputs where such functions break."""

import os
import subprocess
import sys

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings, strategies as st

from fgsgd_jax import linalg

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
SHAPES = pytest.mark.parametrize("shape", [(3, 3), (7, 3), (4, 1), (1, 1), (60, 40)], ids=str)

polar, qf, expm, cayley = (jax.jit(f) for f in (linalg.polar, linalg.qf, linalg.expm, linalg.cayley))
orthonormalize, norm = jax.jit(linalg.orthonormalize), jax.jit(linalg.norm, static_argnums=(1, 2))


def orthonormality(q):
    q = np.asarray(q, np.float64)
    return np.max(np.abs(h.transpose(q) @ q - np.eye(q.shape[-1])), initial=0)


def limit(dtype, shape=(3, 3)):
    return 8 * h.EPS[dtype] * max(3, shape[0] ** 0.5)


def conditioned(shape, condition, count=4):
    """Matrices of a chosen condition number, of largest singular value 1."""
    rng = np.random.default_rng(0)
    n, p = shape
    return np.stack([h.with_singular_values(rng, np.geomspace(1, 1 / condition, p), n, p) for _ in range(count)])


@SHAPES
@DTYPES
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
def test_polar_factor(shape, dtype, condition):
    a = conditioned(shape, condition)
    u = polar(jnp.asarray(a, dtype))
    assert u.dtype == dtype
    assert orthonormality(u) <= limit(dtype, shape)
    np.testing.assert_allclose(u, h.polar(a), atol=condition * limit(dtype, shape))
    np.testing.assert_allclose(
        h.transpose(scipy.linalg.polar(a[0])[0]),
        h.transpose(np.asarray(u[0])),
        atol=condition * limit(dtype, shape),
    )


@SHAPES
@DTYPES
@pytest.mark.parametrize("spread", [0.01, 0.19, 0.2, 0.3, 0.6, 0.9, 3.0, 1e4])
def test_orthonormalize_is_polar_at_any_distance(shape, dtype, spread):
    """Newton-Schulz takes a number of steps that it measures: at every distance the answer is the polar factor."""
    rng = np.random.default_rng(1)
    x = h.point("stiefel", rng, (4, *shape))
    v = h.tangent("stiefel", rng, x)
    v = v / np.maximum(np.linalg.norm(v, 2, axis=(-2, -1)), 1e-30)[:, None, None] * spread if v.any() else v
    a = x + v
    u = orthonormalize(jnp.asarray(a, dtype), jnp.asarray(x, dtype))
    assert orthonormality(u) <= limit(dtype, shape)
    # x + v has singular values from 1 to sqrt(1 + spread^2).
    np.testing.assert_allclose(u, h.polar(a), atol=(1 + spread) * limit(dtype, shape))


def test_orthonormalize_has_no_bias_in_large_matrices():
    # Off-diagonal entries of 1e-4 beside ones: summed with them, they would all be rounded the same way.
    rng = np.random.default_rng(0)
    x = np.linalg.qr(rng.standard_normal((512, 256)))[0]
    v = 0.002 * rng.standard_normal(x.shape)
    u = orthonormalize(jnp.asarray(x + v, jnp.float32), jnp.asarray(x, jnp.float32))
    u = np.asarray(u, np.float64)
    residual = u.T @ u - np.eye(256)
    assert abs(residual).max() < 1e-6
    assert abs(np.diag(residual).mean()) < 1e-7


def test_orthonormalize_falls_back_one_by_one():
    """What has no polar factor becomes the fallback, and its neighbours in the batch do not notice."""
    rng = np.random.default_rng(2)
    x = h.point("stiefel", rng, (6, 4, 3))
    y = x + 0.1 * rng.standard_normal(x.shape)
    y[1, 0, 0] = np.nan
    y[2, 0, 0] = np.inf
    y[3] = 0
    y[4, :, 1] = y[4, :, 0]
    u = orthonormalize(jnp.asarray(y), jnp.asarray(x))
    np.testing.assert_array_equal(u[1:4], x[1:4])
    good = [0, 5]
    np.testing.assert_allclose(u[np.array(good)], h.polar(y[good]), atol=1e-12)
    assert orthonormality(u) < 1e-12


@SHAPES
@DTYPES
def test_qf_is_the_q_with_positive_r(shape, dtype):
    a = conditioned(shape, 10.0)
    q = qf(jnp.asarray(a, dtype))
    assert q.dtype == dtype
    assert orthonormality(q) <= limit(dtype, shape)
    np.testing.assert_allclose(q, h.qf(a), atol=30 * limit(dtype, shape))
    r = h.transpose(np.asarray(q, np.float64)) @ a
    assert np.all(np.diagonal(r, axis1=-2, axis2=-1) > 0)
    np.testing.assert_allclose(np.tril(r, -1), 0, atol=4 * limit(dtype, shape))


def test_cayley_of_long_steps():
    """The system's condition grows with the square of the length."""
    rng = np.random.default_rng(3)
    x = h.point("stiefel", rng, (4, 16, 8))
    v = h.tangent("stiefel", rng, x, length=1e4)
    np.testing.assert_allclose(cayley(jnp.asarray(x), jnp.asarray(v)), h.cayley(x, v), atol=1e-7)


@SHAPES
@DTYPES
def test_cayley(shape, dtype):
    rng = np.random.default_rng(3)
    x = h.point("stiefel", rng, (4, *shape))
    v = h.tangent("stiefel", rng, x, length=1.5)
    y = cayley(jnp.asarray(x, dtype), jnp.asarray(v, dtype))
    assert y.dtype == dtype
    np.testing.assert_allclose(y, h.cayley(x, v), atol=4 * limit(dtype, shape))
    assert orthonormality(y) <= 4 * limit(dtype, shape)


@pytest.mark.parametrize("size", [0.0, 1e-8, 0.1, 1.0, 10.0])
@DTYPES
def test_expm(size, dtype):
    rng = np.random.default_rng(4)
    a = rng.standard_normal((5, 4, 4))
    a = size * a / np.linalg.norm(a, 2, axis=(-2, -1))[:, None, None]
    expected = scipy.linalg.expm(a)
    np.testing.assert_allclose(
        expm(jnp.asarray(a, dtype)), expected, atol=8 * (1 + size) * limit(dtype) * np.max(np.abs(expected))
    )
    skew = a - h.transpose(a)
    assert orthonormality(expm(jnp.asarray(skew, dtype))) <= 8 * (1 + size) * limit(dtype)


# --- degenerate inputs

DEGENERATE = {
    "zero": np.zeros((4, 3)),
    "zero column": np.eye(4, 3) * [1, 0, 1],
    "repeated columns": np.repeat(np.arange(1.0, 5)[:, None], 3, axis=1),
    "rank 1": np.outer(np.arange(1.0, 5), [1, -2, 3]),
    "rank 2": np.outer(np.arange(1.0, 5), [1, -2, 3]) + np.outer([1, 0, 0, 1], [0, 1, 0]),
    "nearly rank 2": np.eye(4, 3) * [1, 1, 1e-20],
    "one tiny entry": np.eye(4, 3) + 1e-38 * np.ones((4, 3)),
    "huge": 1e30 * np.random.default_rng(5).standard_normal((4, 3)),
    "tiny": 1e-30 * np.random.default_rng(6).standard_normal((4, 3)),
    "graded": np.random.default_rng(7).standard_normal((4, 3)) * [1e15, 1, 1e-15],
}


@pytest.mark.parametrize("a", DEGENERATE.values(), ids=DEGENERATE.keys())
@DTYPES
def test_degenerate_matrices_have_an_orthonormal_factor(a, dtype):
    """Some valid answer, never NaN, and the same each time, alone or in a batch."""
    a = jnp.asarray(a, dtype)
    x = jnp.asarray(np.eye(4, 3), dtype)
    for name, answer in {"polar": polar(a), "qf": qf(a), "orthonormalize": orthonormalize(a, x)}.items():
        assert np.all(np.isfinite(answer)), name
        assert orthonormality(answer) <= limit(dtype, (4, 3)), name
    np.testing.assert_array_equal(polar(a), polar(a))
    batch = jnp.stack([x, a, x])
    np.testing.assert_allclose(polar(batch)[0], x, atol=limit(dtype))
    assert orthonormality(polar(batch)) <= limit(dtype, (4, 3))


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
@DTYPES
def test_factors_do_not_depend_on_scale(scale, dtype):
    a = conditioned((4, 3), 10.0)
    big = jnp.asarray(scale * a, dtype)
    np.testing.assert_allclose(polar(big), h.polar(a), atol=30 * limit(dtype))
    np.testing.assert_allclose(qf(big), h.qf(a), atol=30 * limit(dtype))
    # Made for what a step leads to, it squares what it is given: beyond that the fallback is an answer too.
    x = jnp.broadcast_to(jnp.eye(4, 3, dtype=dtype), a.shape)
    found = orthonormalize(big, x)
    if scale in (1e-10, 1e10) or np.any(found != x):
        np.testing.assert_allclose(found, h.polar(a), atol=30 * limit(dtype))


@given(st.integers(0, 2**31), st.integers(1, 3), st.floats(-30, 30))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_matrix_of_any_rank_and_scale_has_an_orthonormal_polar_factor(seed, rank, exponent):
    rng = np.random.default_rng(seed)
    a = 10.0**exponent * rng.standard_normal((4, rank)) @ rng.standard_normal((rank, 3))
    u = polar(jnp.asarray(a, jnp.float32))
    assert orthonormality(u) <= limit("float32", (4, 3))
    if rank == 3:  # the maximiser of <u, a>, which is the sum of the singular values
        sigma = np.linalg.svd(a, compute_uv=False)
        np.testing.assert_allclose(np.sum(np.asarray(u, np.float64) * a), np.sum(sigma), rtol=1e-5)


# --- derivatives


@pytest.mark.parametrize("shape", [(3, 3), (5, 2)], ids=str)
def test_polar_derivative_where_singular_values_coincide(shape):
    """The derivative of SVD's factors divides by differences of singular values; that of the polar factor does not."""
    rng = np.random.default_rng(8)
    q = h.point("stiefel", rng, shape)
    e, c = rng.standard_normal((2, *shape))
    for a in (q, 2 * q, q + 0.5 * rng.standard_normal(shape)):
        step = 1e-6
        expected = np.sum(c * (h.polar(a + step * e) - h.polar(a - step * e))) / (2 * step)
        for f in (polar, lambda y: orthonormalize(y, jnp.asarray(q))):
            gradient = jax.grad(lambda y, f=f: jnp.sum(jnp.asarray(c) * f(y)))(jnp.asarray(a))
            np.testing.assert_allclose(np.sum(np.asarray(gradient) * e), expected, rtol=1e-6, atol=1e-8)


# --- norms and products


@DTYPES
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_norm_neither_overflows_nor_vanishes(dtype, scale):
    a = scale * np.random.default_rng(9).standard_normal((5, 4, 3))
    a = np.asarray(jnp.asarray(a, dtype), np.float64)
    x = jnp.asarray(a, dtype)
    np.testing.assert_allclose(
        norm(x, (-2, -1)), np.sqrt(np.sum((a / (scale or 1)) ** 2, (-2, -1))) * scale, rtol=limit(dtype)
    )
    np.testing.assert_allclose(
        norm(x, -2, True)[:, 0], np.linalg.norm(a / (scale or 1), axis=-2) * scale, rtol=limit(dtype)
    )
    gradient = jax.grad(lambda x: jnp.sum(norm(x, (-2, -1))))(x)
    assert np.all(np.isfinite(gradient))


def test_norm_of_nothing_and_of_what_is_not_finite():
    assert norm(jnp.zeros((0, 3, 3)), (-2, -1)).shape == (0,)
    assert np.isnan(norm(jnp.array([[1.0, np.nan]]), (-2, -1)))
    assert np.isinf(norm(jnp.array([[1.0, np.inf]]), (-2, -1)))


def test_products():
    rng = np.random.default_rng(10)
    a, b = rng.standard_normal((2, 5, 4, 3))
    c = rng.standard_normal((5, 3, 2))
    np.testing.assert_allclose(linalg.gram(jnp.asarray(a), jnp.asarray(b)), h.transpose(a) @ b, atol=1e-14)
    np.testing.assert_allclose(linalg.matmul(jnp.asarray(a), jnp.asarray(c)), a @ c, atol=1e-14)
    np.testing.assert_array_equal(linalg.transpose(jnp.asarray(a)), h.transpose(a))
    np.testing.assert_array_equal(linalg.identity(jnp.asarray(a)), np.broadcast_to(np.eye(4, 3), a.shape))
    square = h.transpose(a) @ b
    np.testing.assert_allclose(linalg.symmetric(jnp.asarray(square)), h.sym(square), atol=1e-15)
    np.testing.assert_allclose(linalg.deviation(jnp.asarray(a)), h.transpose(a) @ a - np.eye(3), atol=1e-14)


@pytest.mark.parametrize("shape", [(768, 64), (1027, 8), (3072, 256), (6144, 1)], ids=str)
def test_deviation_of_tall_matrices_is_not_rounded_like_their_sums_of_squares(shape):
    """By a product alone it is 1e-6 off in float32."""
    x = np.linalg.qr(np.random.default_rng(12).standard_normal(shape))[0].astype(np.float32)
    deviation = jax.jit(linalg.deviation)
    for y in (x, np.eye(*shape, dtype=np.float32), 1.001 * x):
        exact = y.astype(np.float64).T @ y.astype(np.float64) - np.eye(shape[1])
        np.testing.assert_allclose(deviation(jnp.stack([y, y])), np.stack([exact, exact]), atol=5e-7)


@pytest.mark.parametrize("name", ["matmul", "gram", "polar", "qf", "cayley", "expm", "orthonormalize"])
def test_products_run_at_full_precision(name):
    """Whatever a backend's default is: GPUs would use TF32, TPUs bf16."""
    function = getattr(linalg, name)
    arguments = (jnp.ones((3, 3), jnp.float32),) * (1 if name in ("polar", "qf", "expm") else 2)
    with jax.default_matmul_precision("tensorfloat32"):
        jaxpr = jax.make_jaxpr(function)(*arguments)
    dots = [eqn for eqn in h.equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert all(eqn.params["precision"] == highest for eqn in dots), {str(eqn.params["precision"]) for eqn in dots}
    assert dots or name == "qf"


@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("shape", [(5,), (4096,), (3, 3, 4096), (4096, 3, 3)], ids=str)
def test_the_largest_entry_is_never_less_than_a_nan(shape, place):
    """`jnp.max` loses a NaN among thousands of numbers on CPU; every guard of the package depends on this one."""
    x = np.full(shape, 0.5, np.float32)
    x.reshape(-1)[place] = np.nan
    assert jax.jit(lambda x: linalg.largest(jnp.abs(2 * x - 1)))(x) == np.inf
    assert jax.jit(linalg.largest)(np.nan_to_num(x, nan=7)) == 7
    assert linalg.largest(jnp.zeros((0, 3)), 0).tolist() == [0, 0, 0]


def test_constraints_are_not_computed_in_integers():
    assert linalg.compute_dtype() == linalg.compute_dtype(jnp.bfloat16, jnp.float16) == jnp.float32
    assert linalg.compute_dtype(jnp.float32, np.float64) == jnp.float64
    for integers in (jnp.int32, np.uint8, bool):
        with pytest.raises(ValueError, match="not inexact"):
            linalg.compute_dtype(jnp.float32, integers)


@pytest.mark.parametrize("count", [4, 4096])
def test_orthonormalize_among_many_takes_the_fallback_for_the_bad_one(count):
    x = np.broadcast_to(np.eye(3, dtype=np.float32), (count, 3, 3))
    for bad in (np.nan, np.inf, 0.0):
        y = np.array(x) * 1.1
        y[-1] = bad
        np.testing.assert_allclose(orthonormalize(y, x), x, atol=1e-6)


SIDE_BY_SIDE = """
import jax
import numpy as np
import fgsgd_jax as fg
from fgsgd_jax.linalg import expm

rng = np.random.default_rng(0)
a = rng.standard_normal((28672, 6, 6)).astype(np.float32) / 3
first, second = jax.jit(lambda a: (expm(a), expm(-a)))(a)
assert np.max(np.abs(np.asarray(first) @ np.asarray(second) - np.eye(6))) < 1e-3
x = np.linalg.qr(rng.standard_normal((2, 28672, 6, 3)))[0].astype(np.float32)
v = fg.Stiefel().project(x, rng.standard_normal(x.shape).astype(np.float32))
for retraction in ("cayley", "exp", "qr", "polar"):
    m = fg.Stiefel(retraction=retraction)
    for y in jax.jit(lambda x, v: (m.retract(x[0], v[0]), m.retract(x[1], v[1])))(x, v):
        assert np.max(m.violation(y)) < 1e-5
for y in jax.jit(lambda x: (m.nearest(x[0]), m.nearest(x[1])))(x + v):
    assert np.max(m.violation(y)) < 1e-5
"""


@pytest.mark.slow
def test_many_matrices_side_by_side_come_to_an_end():
    """Two LU solves of so many in one program never do on CPU with several threads.

    Nor do two decompositions of which R is read while Q is made. Hence a process of its own.
    """
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    subprocess.run([sys.executable, "-c", SIDE_BY_SIDE], env=environment, timeout=200, check=True)
