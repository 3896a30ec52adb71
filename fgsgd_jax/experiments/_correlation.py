from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
CONFIDENCE = 0.95


class Correlation(NamedTuple):
    """A rank correlation with its interval; NaN where one of the two does not vary."""

    rho: float
    lower: float
    upper: float


def spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], seed: int = 0) -> Correlation:
    """Spearman's ρ of n pairs, with the percentile bootstrap interval of 95 % over the pairs.

    Resamples in which one of the two does not vary have no correlation and are left out. Of few pairs the interval is
    wide and only roughly of its confidence.
    """
    resamples = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    found = _correlations(_ranks(x[resamples]), _ranks(y[resamples]))
    found = found[np.isfinite(found)]
    tail = (1 - CONFIDENCE) / 2
    lower, upper = np.quantile(found, (tail, 1 - tail)) if found.size else (np.nan, np.nan)
    (rho,) = _correlations(_ranks(x[None]), _ranks(y[None]))
    return Correlation(float(rho), float(lower), float(upper))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, the mean of those that ties share."""
    below = np.sum(x[..., None, :] < x[..., :, None], axis=-1)
    same = np.sum(x[..., None, :] == x[..., :, None], axis=-1)
    return below + (same - 1) / 2


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = (each - each.mean(axis=-1, keepdims=True) for each in (x, y))
    length = np.sqrt(np.sum(x * x, axis=-1) * np.sum(y * y, axis=-1))
    return np.where(length > 0, np.sum(x * y, axis=-1) / np.where(length > 0, length, 1), np.nan)
