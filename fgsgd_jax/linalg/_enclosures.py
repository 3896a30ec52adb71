"""Norms between two numbers that are certain: float64 arithmetic with every rounding accounted for.

They are NumPy, not JAX: without its x64 mode, on TPUs and after rewriting by a compiler JAX does not do IEEE float64
arithmetic, and a certificate is not for the inner loop. Each is an interval of exact norms of the matrices as stored.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

# Largest relative error of one rounding to nearest.
_UNIT = 2.0**-53


class Interval(NamedTuple):
    """Lower and upper bounds of what was measured."""

    lower: Float64[np.ndarray, " *batch"]
    upper: Float64[np.ndarray, " *batch"]


def enclosed_frobenius(x: Float64[np.ndarray, "*batch n p"]) -> Interval:
    """Frobenius norm of each matrix; up to inf where an entry is not finite."""
    return _rescaled(x, lambda y: _root(np.sum(y * y, axis=(-2, -1)), y.shape[-2] * y.shape[-1]))


def enclosed_two_to_one(x: Float64[np.ndarray, "*batch n p"]) -> Interval:
    """Sum of the Euclidean norms of the rows of each matrix; up to inf where an entry is not finite."""

    def of_scaled(y: np.ndarray) -> Interval:
        lower, upper = _root(np.sum(y * y, axis=-1), y.shape[-1])
        slack = (y.shape[-2] + 4) * _UNIT
        return Interval(np.sum(lower, axis=-1) * (1 - slack), np.sum(upper, axis=-1) * (1 + slack))

    return _rescaled(x, of_scaled)


def enclosed_spectral(x: Float64[np.ndarray, "*batch n p"]) -> Interval:
    """Largest singular value of each matrix; up to inf where an entry is not finite.

    Eigenvectors V of the smaller Gram matrix G come from LAPACK and are not trusted. For whatever V is near to
    orthonormal, the eigenvalues of G lie where those of M = VᵀGV do, to a factor within 1 ± ‖VᵀV - I‖ (Ostrowski),
    and those of the nearly diagonal M near its diagonal (Gershgorin).
    """
    return _rescaled(x, _spectral_of_scaled)


def _spectral_of_scaled(y: np.ndarray) -> Interval:
    adjoint = np.swapaxes(y, -1, -2)
    gram = y @ adjoint if y.shape[-2] <= y.shape[-1] else adjoint @ y
    gram = (gram + np.swapaxes(gram, -1, -2)) / 2
    terms, size = max(y.shape[-2:]), gram.shape[-1]
    _, vectors = np.linalg.eigh(gram)
    transposed = np.swapaxes(vectors, -1, -2)
    rotated = transposed @ gram @ vectors
    overlap = transposed @ vectors
    # Rounding moves G by at most (terms + 1) units of Σy² in the spectral norm, M by 2.1 size² more, the columns of V
    # being of length about 1, and the sums of Gershgorin's theorem by size more. More than twice that is left for the
    # higher orders.
    slack = 8 * (terms + size**2 + 8) * _UNIT * np.sum(y * y, axis=(-2, -1))
    defect = np.max(np.sum(np.abs(overlap - np.eye(size)), axis=-1), axis=-1) + 8 * (size**2 + 8) * _UNIT
    diagonal = np.diagonal(rotated, axis1=-2, axis2=-1)
    # A row's absolute sum less |M_ii| is the radius of its disc.
    discs = diagonal + np.sum(np.abs(rotated), axis=-1) - np.abs(diagonal)
    lower = (np.max(diagonal, axis=-1) - slack) / (1 + defect)
    upper = np.where(defect < 1, (np.max(discs, axis=-1) + slack) / np.maximum(1 - defect, _UNIT), np.inf)
    return Interval(np.sqrt(np.maximum(lower, 0)) * (1 - 4 * _UNIT), np.sqrt(upper) * (1 + 4 * _UNIT))


def _root(squares: np.ndarray, terms: int) -> Interval:
    """Roots of sums of squares of so many terms, each rounded in any order."""
    # The root halves the relative error of its sum; the rest is for its own rounding and those of the last line.
    slack = (terms / 2 + 4) * _UNIT
    root = np.sqrt(squares)
    return Interval(root * (1 - slack), root * (1 + slack))


def _rescaled(x: np.ndarray, of_scaled) -> Interval:
    """`of_scaled` of the matrices divided by powers of two, which rounds nothing, and its answer brought back."""
    batch, x = x.shape[:-2], x.reshape(-1, *x.shape[-2:])
    finite = np.all(np.isfinite(x), axis=(-2, -1))
    x = np.where(finite[..., None, None], x, 0.0)
    _, exponent = np.frexp(np.max(np.abs(x), axis=(-2, -1), initial=0.0))
    lower, upper = of_scaled(np.ldexp(x, -exponent[..., None, None]))
    zero = upper == 0
    # Outwards at the end, where a result without a normal exponent would be rounded.
    lower = np.where(zero, 0.0, np.nextafter(np.ldexp(lower, exponent), 0))
    with np.errstate(over="ignore"):
        upper = np.where(zero, 0.0, np.nextafter(np.ldexp(upper, exponent), np.inf))
    lower, upper = np.where(finite, lower, 0.0), np.where(finite, upper, np.inf)
    return Interval(lower.reshape(batch), upper.reshape(batch))
