"""Paired comparison of two methods over seeds: pure functions of arrays; scipy does the work.

Every array has one axis, the runs (seeds) of one method on one data set and model. NaN and infinity are refused, never
dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
Key = TypeVar("Key", int, str)
"""What pairs are made by: a seed, or the name of a model."""

CONFIDENCE = 0.95
ALPHA = 0.05
BCA_FROM = 50
"""Pairs from which the interval is BCa: it covers too little below (0.73 at n = 3, 0.92 at 20), Student's does not."""
MAX_SIGN_FLIPS = 2**16
"""The sign-flip test is exact up to this many flips, n = 16; beyond, it draws this many at random."""


@dataclass(frozen=True)
class Difference:
    """Paired difference, candidate minus baseline, in the unit of the inputs.

    `sd` (ddof 1) is None for n = 1. `low` and `high` bound the mean at level CONFIDENCE. They and `effect` (mean / sd)
    are None where the differences have no spread: n = 1, or all equal (then `sd` is 0, and an interval of width zero
    would claim certainty). `p` is the two-sided sign-flip test's.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    p: float
    effect: float | None


def paired_difference(
    candidate: Mapping[Key, float], baseline: Mapping[Key, float], rng: np.random.Generator
) -> Difference:
    """Candidate minus baseline over the seeds (or models) that both have; the arguments map seed -> value.

    Raises:
        ValueError: no seed in common, or a value that is not finite.
    """
    keys = sorted(candidate.keys() & baseline.keys())
    ours = finite([candidate[key] for key in keys])
    theirs = finite([baseline[key] for key in keys])
    differences = ours - theirs
    n, mean, p = len(keys), float(differences.mean()), sign_flip_p(differences, rng)
    if n == 1:
        return Difference(n, mean, sd=None, low=None, high=None, p=p, effect=None)
    # 0.9 - 0.8 and 0.8 - 0.7 differ in the last bit: equal up to rounding of the inputs is equal.
    rounding = 8 * np.finfo(np.float64).eps * max(np.abs(ours).max(), np.abs(theirs).max())
    if np.ptp(differences) <= rounding:
        return Difference(n, mean, sd=0.0, low=None, high=None, p=p, effect=None)
    sd = sample_sd(differences)
    low, high = t_interval(differences) if n < BCA_FROM else bca_interval(differences, rng)
    return Difference(n, mean, sd, low, high, p, effect=mean / sd)


def sample_sd(values: npt.ArrayLike) -> float:
    """Sample standard deviation, ddof 1. Raises ValueError for fewer than two values."""
    return float(finite(values, at_least=2).std(ddof=1))


def t_interval(values: npt.ArrayLike) -> tuple[float, float]:
    """Student's interval of the mean: mean +- t(n - 1) sd / sqrt(n), level CONFIDENCE. Raises ValueError for n < 2."""
    array = finite(values, at_least=2)
    low, high = stats.t.interval(CONFIDENCE, df=len(array) - 1, loc=array.mean(), scale=stats.sem(array, ddof=1))
    return float(low), float(high)


def bca_interval(values: npt.ArrayLike, rng: np.random.Generator) -> tuple[float, float]:
    """Bias-corrected accelerated bootstrap interval of the mean (Efron 1987) at level CONFIDENCE; n < 2: ValueError."""
    array = finite(values, at_least=2)
    result = stats.bootstrap((array,), np.mean, confidence_level=CONFIDENCE, method="BCa", rng=rng)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def sign_flip_p(differences: npt.ArrayLike, rng: np.random.Generator) -> float:
    """Two-sided p of mean 0 under random signs of the differences; exact for n <= 16, where rng is not used."""
    array = finite(differences)
    if len(array) == 1:  # scipy refuses it: both signs are as extreme
        return 1.0
    test = stats.permutation_test(
        (array,), np.mean, permutation_type="samples", n_resamples=MAX_SIGN_FLIPS, alternative="two-sided", rng=rng
    )
    return float(test.pvalue)


def t_test_p(difference: Difference) -> float | None:
    """Two-sided p of Student's paired test, t = mean / (sd / sqrt(n)) with n - 1 degrees of freedom; None if no spread.

    Exact for normal differences only, where the sign-flip test needs no more than symmetric ones; but it is not
    bounded by 2 / 2^n, and it is the test that `analysis.power` plans with. p <= ALPHA where t_interval excludes 0.
    """
    if difference.effect is None:
        return None
    return float(2 * stats.t.sf(abs(difference.effect) * np.sqrt(difference.n), df=difference.n - 1))


def smallest_p(n: int, family_size: int = 1) -> float:
    """Smallest two-sided p that n sign flips can give: 2 / 2^n, so 0.25 for n = 3, times the size of the family.

    Holm's method multiplies a family's smallest p by its size; if that stays above ALPHA, so do all the others.
    """
    return min(1.0, family_size * 2.0 ** (1 - n))


def is_underpowered(n: int, family_size: int = 1) -> bool:
    """Whether no data whatever could reach p <= ALPHA: n <= 5 alone, n <= 10 in a family of 40 comparisons of n pairs.

    Then p says nothing and is not shown to people.
    """
    return smallest_p(n, family_size) > ALPHA


def fewest_pairs(family_size: int = 1) -> int:
    """Pairs from which the sign-flip test is not underpowered: 6 alone, 8 in a family of 5, 11 in one of 40."""
    n = 1
    while is_underpowered(n, family_size):
        n += 1
    return n


def finite(values: npt.ArrayLike, at_least: int = 1) -> Array:
    """The values as float64, one axis. Raises ValueError for NaN, infinity, or fewer than at_least of them."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < at_least:
        raise ValueError(f"shape {array.shape}; expected one axis with at least {at_least} value{'s' * (at_least > 1)}")
    num_bad = int((~np.isfinite(array)).sum())
    if num_bad:
        raise ValueError(f"{num_bad} of {len(array)} values are not finite; leave out unfinished runs")
    return array
