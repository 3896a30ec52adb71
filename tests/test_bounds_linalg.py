"""Operator norms of batches of matrices: measured, bounded from above, and enclosed."""

from decimal import Decimal, localcontext
from fractions import Fraction

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fgsgd_jax import linalg
from fgsgd_jax.linalg import _spectral

SHAPES = pytest.mark.parametrize("shape", [(3, 3), (3, 40), (30, 4), (5, 1), (24, 24)], ids=str)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])

spectral_norm, gram_iteration = jax.jit(linalg.spectral_norm), jax.jit(linalg.gram_iteration, static_argnums=1)


def eps(dtype):
    return float(np.finfo(dtype).eps)


def matrices(rng, shape, dtype, count=6):
    """Gaussian, low-rank, orthonormal and graded ones."""
    n, p = shape

    def draw(*size):
        return rng.standard_normal(size) + (1j * rng.standard_normal(size) if dtype.startswith("c") else 0)

    found = [draw(n, p) for _ in range(count)]
    found.append(np.outer(draw(n), draw(p)))
    u, _, v = np.linalg.svd(draw(n, p), full_matrices=False)
    found += [u @ v, u @ np.diag(10.0 ** -np.arange(min(n, p))) @ v]
    return np.stack(found).astype(dtype)


def exact(x):
    wide = np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    return np.linalg.svd(wide, compute_uv=False).max(axis=-1)


# --- measured


@SHAPES
@DTYPES
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_spectral_norm(shape, dtype, scale):
    x = (scale * matrices(np.random.default_rng(0), shape, dtype)).astype(dtype)
    found = spectral_norm(jnp.asarray(x))
    assert found.dtype == np.finfo(dtype).dtype
    np.testing.assert_allclose(found, exact(x), rtol=8 * eps(dtype) * max(3, min(shape)))


@pytest.mark.parametrize("shape", [(3, 3), (3, 40), (9, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_spectral_norms_of_accelerators_are_those(shape, dtype):
    """Without a decomposition; of equal singular values too."""
    x = matrices(np.random.default_rng(0), shape, dtype)
    found = jax.jit(_spectral._by_rotations)(_spectral.smaller_gram(jnp.asarray(x)))
    np.testing.assert_allclose(jnp.sqrt(found), exact(x), rtol=8 * eps(dtype) * max(3, min(shape)))
    assert np.isnan(_spectral._by_rotations(jnp.full((1, 2, 2), jnp.nan)))


def test_spectral_norm_of_nothing_zero_and_what_is_not_finite():
    assert linalg.spectral_norm(jnp.zeros((0, 3, 4))).shape == (0,)
    np.testing.assert_array_equal(linalg.spectral_norm(jnp.zeros((2, 3, 4))), 0)
    bad = jnp.asarray([[[jnp.nan, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]])
    found = linalg.spectral_norm(bad)
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1], 2)


@SHAPES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_to_one_is_the_sum_of_the_rows_norms(shape, dtype):
    x = matrices(np.random.default_rng(1), shape, dtype)
    expected = [sum(np.sqrt(sum(float(v) ** 2 for v in row)) for row in matrix) for matrix in x]
    np.testing.assert_allclose(linalg.two_to_one(jnp.asarray(x)), expected, rtol=16 * eps(dtype))


def test_two_to_one_of_orthonormal_rows_and_of_the_identity():
    q = h.point("stiefel", np.random.default_rng(2), (3, 3))
    np.testing.assert_allclose(linalg.two_to_one(jnp.asarray(q)), 3)
    np.testing.assert_allclose(linalg.two_to_one(jnp.asarray([[3.0, 4.0], [0.0, 0.0], [5.0, 12.0]])), 18)


# --- bounded by Gram iteration


@SHAPES
@DTYPES
@pytest.mark.parametrize("scale", [1e-35, 1e-10, 1.0, 1e10, 1e35])
def test_gram_iteration_is_never_below_and_close(shape, dtype, scale):
    x = (scale * matrices(np.random.default_rng(3), shape, dtype)).astype(dtype)
    bound = np.asarray(gram_iteration(jnp.asarray(x)), np.float64)
    true = exact(x)
    # By a few units of float64: the SVD that it is judged by rounds too.
    assert np.all(bound >= true * (1 - 1e-14))
    q = min(shape)
    assert np.all(bound <= true * q ** (2.0**-11) * (1 + 64 * max(shape) * q * eps(dtype)) + 1e-35)


def test_gram_iteration_converges_as_stated():
    """Of q equal singular values the bound is q^(2^-t-1) times the norm, and never less."""
    q = jnp.asarray(h.point("stiefel", np.random.default_rng(4), (16, 16)))
    for steps in (1, 2, 4, 8):
        np.testing.assert_allclose(gram_iteration(q, steps), 16 ** (2.0 ** -(steps + 1)), rtol=1e-12)


def test_gram_iteration_of_zero_and_of_what_is_not_finite():
    # Denormal numbers count as zero in XLA, so that the bound of zero must bound them too.
    np.testing.assert_allclose(gram_iteration(jnp.zeros((2, 3, 4), jnp.float32)), 12 * np.finfo(np.float32).tiny)
    bad = jnp.asarray([[[jnp.nan, 0.0], [0.0, 1.0]], [[jnp.inf, 0.0], [0.0, 2.0]]])
    np.testing.assert_array_equal(gram_iteration(bad), np.inf)


@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(-35, 35))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_gram_iteration_bounds_any_matrix_of_any_rank_and_scale(seed, rank, exponent):
    rng = np.random.default_rng(seed)
    x = (10.0**exponent * rng.standard_normal((6, rank)) @ rng.standard_normal((rank, 9)) / 9).astype(np.float32)
    assert float(gram_iteration(jnp.asarray(x))) >= exact(x) * (1 - 1e-14)


@pytest.mark.slow
def test_transforms():
    x = jnp.asarray(matrices(np.random.default_rng(5), (4, 7), "float64"))
    for f in (linalg.spectral_norm, linalg.gram_iteration, linalg.two_to_one):
        np.testing.assert_allclose(jax.vmap(f)(x), f(x), rtol=1e-12)
        np.testing.assert_allclose(jax.jit(f)(x), f(x), rtol=1e-12)


# --- enclosed


def squares(matrix):
    return [[Fraction(float(v)) for v in row] for row in matrix]


def positive_definite(matrix):
    """By exact elimination."""
    a = [row[:] for row in matrix]
    for k in range(len(a)):
        if a[k][k] <= 0:
            return False
        for i in range(k + 1, len(a)):
            factor = a[i][k] / a[k][k]
            a[i] = [x - factor * y for x, y in zip(a[i], a[k], strict=True)]
    return True


def exceeds_spectral(bound, matrix):
    """Whether bound > ‖matrix‖₂, in rational arithmetic: bound² I - ωωᵀ is positive definite."""
    rows = squares(matrix)
    gram = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]
    return positive_definite(
        [[(Fraction(bound) ** 2 if i == j else 0) - g for j, g in enumerate(row)] for i, row in enumerate(gram)]
    )


def hard_cases():
    rng = np.random.default_rng(6)
    cases = [rng.standard_normal((3, 6)).astype(np.float32) for _ in range(10)]
    cases += [h.point("stiefel", rng, (3, 3)).astype(np.float32) for _ in range(10)]
    cases += [np.eye(3), np.ones((3, 3)), np.diag([1.0, 1.0 - 2**-52, 0]), np.diag([1e-200, 1e-201, 0])]
    cases += [1e150 * rng.standard_normal((3, 3)), 1e-160 * rng.standard_normal((3, 3)), np.diag([1, 1e-300, 1e300])]
    cases += [np.outer([1.0, 2.0, 3.0], [1.0, -1.0, 7.0]), np.full((3, 2), 5e-324)]
    return [np.asarray(case, np.float64) for case in cases]


@pytest.mark.parametrize("x", hard_cases(), ids=range(len(hard_cases())))
def test_enclosures_hold_in_rational_arithmetic(x):
    frobenius, spectral, two_to_one = (
        getattr(linalg, f"enclosed_{name}")(x) for name in ("frobenius", "spectral", "two_to_one")
    )
    exact_square = sum(v * v for row in squares(x) for v in row)
    assert Fraction(float(frobenius.lower)) ** 2 <= exact_square <= Fraction(float(frobenius.upper)) ** 2
    assert exceeds_spectral(np.nextafter(float(spectral.upper), np.inf), x)
    assert not exceeds_spectral(float(spectral.lower), x)
    with localcontext(prec=800):
        total = sum((sum((Decimal(float(v)) ** 2 for v in row), Decimal(0)).sqrt() for row in x), Decimal(0))
        assert Decimal(float(two_to_one.lower)) <= total <= Decimal(float(two_to_one.upper))
    if np.abs(x).max() > 1e-300:
        for lower, upper in (frobenius, spectral, two_to_one):
            assert upper <= lower * (1 + 1e-12)


def test_enclosures_do_not_trust_the_eigenvectors(monkeypatch):
    """LAPACK's answer is only a hint: a wrong one makes the interval wide, never wrong."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((20, 4, 6))
    true = exact(x)
    eigh = np.linalg.eigh
    for noise in (1e-6, 1e-2, 0.2, 3.0):

        def wrong(a, noise=noise):
            values, vectors = eigh(a)
            return values, vectors + noise * rng.standard_normal(vectors.shape)

        monkeypatch.setattr(np.linalg, "eigh", wrong)
        found = linalg.enclosed_spectral(x)
        assert np.all(found.lower <= true)
        assert np.all(true <= found.upper)
        assert np.any(found.upper > true * (1 + noise / 100))


def test_enclosures_of_what_is_not_finite_or_zero():
    x = np.stack([np.full((2, 2), np.nan), np.diag([np.inf, 1.0]), np.zeros((2, 2)), np.diag([3.0, 4.0])])
    for of in (linalg.enclosed_frobenius, linalg.enclosed_spectral, linalg.enclosed_two_to_one):
        found = of(x)
        np.testing.assert_array_equal(found.lower[:3], 0)
        np.testing.assert_array_equal(found.upper[:3], [np.inf, np.inf, 0])
        assert found.lower[3] >= 3.9


# --- blocks of a convolution


def test_blocks_of_a_torus_are_the_discrete_fourier_transform():
    """The FFT of the zero-padded kernel, up to the sign of the frequency."""
    rng = np.random.default_rng(8)
    kernel = rng.standard_normal((3, 2, 4, 5))
    rows, cols = linalg.torus_basis(np.arange(3), 1, 7), linalg.torus_basis(np.arange(2), 1, 6)
    found = linalg.block_norms(linalg.spectral_norm, *(jnp.asarray(x) for x in (kernel, rows, cols)))
    expected = np.linalg.norm(np.fft.fft2(kernel, (7, 6), axes=(0, 1)), 2, axis=(-2, -1))
    np.testing.assert_allclose(found, expected[-np.arange(7) % 7][:, -np.arange(6) % 6], rtol=1e-12)
    largest = linalg.largest_block(*(jnp.asarray(x) for x in (kernel[None], rows, cols)))
    np.testing.assert_allclose(largest, expected.max(), rtol=1e-12)


@pytest.mark.parametrize(("size", "twist"), [(1, 0.0), (4, 0.5), (5, 0.0), (5, 0.5)])
def test_half_of_the_frequencies_of_a_real_kernel_has_all_norms(size, twist):
    rng = np.random.default_rng(9)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 2, 3)))
    cols = jnp.asarray(linalg.torus_basis(np.arange(3), 1, 6, twist))
    found = [
        linalg.block_norms(
            linalg.spectral_norm,
            kernel,
            jnp.asarray(linalg.torus_basis(np.arange(3), 1, size, twist, half=half)),
            cols,
        )
        for half in (False, True)
    ]
    assert found[1].shape[0] == (size // 2 + 1 if twist == 0 else (size + 1) // 2)
    np.testing.assert_allclose(np.unique(np.round(found[0], 9)), np.unique(np.round(found[1], 9)), rtol=1e-9)


def test_largest_block_looks_on_where_bounds_mislead():
    """Many blocks of almost one norm: the order of their bounds is not that of their norms."""
    rng = np.random.default_rng(10)
    orthogonal = h.point("stiefel", rng, (40, 6, 6))
    kernel = orthogonal * (1 + 1e-3 * rng.random((40, 1, 1)))
    kernel[3, :, 1:] *= 0.5  # a small bound with a large norm, beside large bounds
    kernel = jnp.asarray(kernel[:, None, None])
    one = jnp.ones((1, 1, 1, 1))
    np.testing.assert_allclose(linalg.largest_block(kernel, one, one), exact(kernel[:, 0, 0]).max(), rtol=1e-12)


@pytest.mark.parametrize("name", ["spectral_norm", "gram_iteration", "block_norms"])
def test_products_run_at_full_precision(name):
    """Whatever a backend's default is: GPUs would use TF32, TPUs bf16."""
    x = jnp.ones((3, 3), jnp.float32)

    def run(x):
        if name == "block_norms":
            return linalg.block_norms(linalg.gram_iteration, x[None, None], x[None, :1, None], x[None, :1, None])
        return getattr(linalg, name)(x)

    with jax.default_matmul_precision("tensorfloat32"):
        jaxpr = jax.make_jaxpr(run)(x)
    dots = [eqn for eqn in h.equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert dots
    assert all(eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for eqn in dots)
