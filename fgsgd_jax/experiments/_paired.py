from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

RESAMPLES = 10_000
CONFIDENCE = 0.95


class Difference(NamedTuple):
    """The mean of paired differences, its bootstrap interval of 95 %, and the p-value of a paired test."""

    mean: float
    lower: float
    upper: float
    p: float


def paired_difference(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], seed: int = 0) -> Difference:
    """The differences x − y over n pairs.

    The interval is the percentile bootstrap's over the pairs. The test flips the signs of the differences (all 2ⁿ ways
    where they are no more than the resamples): of five pairs no two-sided p is below 1/16. NaN for a single pair.
    """
    differences = np.asarray(x, np.float64) - np.asarray(y, np.float64)
    mean = float(differences.mean())
    if len(differences) < 2:
        return Difference(mean, np.nan, np.nan, np.nan)
    if not differences.any():
        return Difference(0.0, 0.0, 0.0, 1.0)
    rng = np.random.default_rng(seed)
    resampled = differences[rng.integers(0, len(differences), (RESAMPLES, len(differences)))].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    lower, upper = np.quantile(resampled, (tail, 1 - tail))
    test = scipy.stats.permutation_test(
        (differences, np.zeros_like(differences)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=rng,
    )
    return Difference(mean, float(lower), float(upper), float(test.pvalue))
