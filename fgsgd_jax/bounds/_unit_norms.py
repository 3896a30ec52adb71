"""What is known of the norms of one matrix from its manifold alone, at radius 1."""

from typing import Any, NamedTuple

import numpy as np

from ..manifolds import Euclidean, Manifold, Oblique, Sphere, Stiefel


class Norms(NamedTuple):
    """The three norms of the paper's Tables 1 and 2: numbers, or arrays of one number per group."""

    frobenius: Any
    spectral: Any
    two_to_one: Any
    """the sum of the Euclidean norms of the rows"""


def unit_bounds(manifold: Manifold, shape: tuple[int, int]) -> Norms:
    """Upper bounds of the norms of a matrix of `shape` (A, B) on the manifold of radius 1; inf if it has none.

    * Sphere: F = 1, σ ≤ 1, 2→1 ≤ √A. Stiefel: F = √B, σ = 1, 2→1 ≤ √(AB). Oblique: F = √B, σ ≤ √B, 2→1 ≤ √(AB).
      (Wide Stiefel matrices have √A for √B.)
    * The spectral norm is at most the Frobenius norm, and by Cauchy and Schwarz the 2→1 norm at most √A times it.
    """
    if isinstance(manifold, Euclidean):
        return Norms(np.inf, np.inf, np.inf)
    frobenius = manifold._squared_length(shape) ** 0.5
    spectral = 1.0 if isinstance(manifold, Stiefel) else frobenius
    return Norms(frobenius, spectral, shape[0] ** 0.5 * frobenius)


def table2(manifold: Manifold, shape: tuple[int, int]) -> Norms:
    """The paper's Table 2 as printed, for a matrix of `shape` (A, B); NaN where it has no entry.

    `spectral` is None where the table has σ(ω), the measured spectral norm itself. The 2→1 row is no bound of the norm
    that the caption of Table 1 defines: that of a 3×3 Stiefel matrix is 3, the entry is 3^¼.
    """
    columns = float(shape[1])
    match manifold:
        case Sphere():
            return Norms(1.0, None, 1.0)
        case Stiefel():
            return Norms(columns**0.5, 1.0, columns**0.25)
        case Oblique():
            return Norms(columns**0.5, None, columns**0.25)
    return Norms(np.nan, np.nan, np.nan)
