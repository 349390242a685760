"""What seeds and models can detect, before spending GPU-hours: power of the stratified sign-flip test. Pure functions.

A design is M models with N seeds each, tested in a family of `size` comparisons at Holm's first and strictest step,
ALPHA / size. Differences are assumed normal with one standard deviation and the same mean on every model. Effects that
vary between models cost little power, because the statistic uses the noise within models. Only a spread enters, never
an observed difference, so a plan made from spreads does not change the error rate of the later test (an internal
pilot).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import stats

from analysis.stats.families import is_rejected
from analysis.stats.stratified import ALPHA, RIDGE, Array, finite, smallest_p

POWER = 0.8
SD_CONFIDENCE = 0.8
"""One-sided level of the upper bound on a standard deviation (Browne 1995). A plan from the sd of three runs falls
short of its power more often than not; a plan from this bound, one time in five."""
SIMULATIONS = 1000
"""Samples that simulate the power: its standard error is 1.3 points at a power of 80 %."""
_MAX_PATTERNS = 4096
"""Sign patterns per simulated test: in a family of five, the standard error of its level is 0.2 points."""
MAX_SEEDS = 200


@dataclass(frozen=True)
class Spread:
    """Standard deviation of paired differences with `df` degrees of freedom, and its upper bound at SD_CONFIDENCE."""

    sd: float
    df: float
    sd_high: float


def spread(groups: Iterable[npt.ArrayLike], sharing: int = 1) -> Spread:
    """Pooled sd = sqrt(sum of squares within groups / sum of (n - 1)): about each group's own mean.

    Values within a group vary by seed only: one method pair on one model and data set. A group of one difference
    carries no information on spread and is ignored. sd_high = sd sqrt(df / chi2 quantile), for normal differences.

    sharing: number of groups that share one method's runs, as all comparisons with BNN++ on a model do. If all runs
    have the same spread, such differences correlate by 1/2 and their squares by 1/4, so df = sum of (n - 1) divided by
    1 + (sharing - 1) / 4 (Satterthwaite).

    Raises:
        ValueError: no group of two or more differences, or a value that is not finite.
    """
    arrays = [finite(group) for group in groups]
    num_free = sum(len(array) - 1 for array in arrays)
    if num_free == 0:
        raise ValueError("no spread to plan with: a standard deviation takes two paired differences or more")
    sd = float(np.sqrt(sum(((array - array.mean()) ** 2).sum() for array in arrays) / num_free))
    df = num_free / (1 + (sharing - 1) / 4)
    return Spread(sd, df, float(sd * np.sqrt(df / stats.chi2.isf(SD_CONFIDENCE, df))))


def power(num_models: int, num_seeds: int, difference: float, sd: float, size: int = 1) -> float:
    """Probability that the test of num_models x num_seeds pairs gives p <= ALPHA / size.

    difference and sd (of the paired differences, ddof 1) share a unit; the sign of the difference does not matter.

    Raises:
        ValueError: num_models or num_seeds < 1, sd not positive, size < 1, or a value that is not finite.
    """
    _check(num_models, num_seeds, difference, sd, size)
    if not is_rejected(size * smallest_p(num_models * num_seeds)):
        return 0.0
    effects = np.full(SIMULATIONS, abs(difference) / sd)
    return float(_samples(num_models, num_seeds).rejects(effects, size).mean())


def detectable(num_models: int, num_seeds: int, sd: float, size: int = 1, wanted_power: float = POWER) -> float | None:
    """The difference, in sd's unit, detected with wanted_power; None if no difference can be. Errors: as power."""
    _check(num_models, num_seeds, 0.0, sd, size)
    if not is_rejected(size * smallest_p(num_models * num_seeds)):
        return None
    return float(np.quantile(_rejected_from(num_models, num_seeds, size), wanted_power) * sd)


def seeds_for(num_models: int, difference: float, sd: float, size: int = 1, wanted_power: float = POWER) -> int | None:
    """Fewest seeds per model that detect a difference with wanted_power; None above MAX_SEEDS.

    Raises:
        ValueError: a difference of 0, which no number of seeds detects; else as power.
    """
    _check(num_models, 1, difference, sd, size)
    if difference == 0:
        raise ValueError("no number of seeds detects a difference of 0")

    def enough(num_seeds: int) -> bool:
        return power(num_models, num_seeds, difference, sd, size) >= wanted_power

    low, high = 0, 1  # low is too few
    while not enough(high):
        if high == MAX_SEEDS:
            return None
        low, high = high, min(2 * high, MAX_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@lru_cache(maxsize=256)
def _rejected_from(num_models: int, num_seeds: int, size: int) -> Array:
    """For each of SIMULATIONS samples, the true difference in sd above which the test rejects, within 0.2 %. [S]"""
    samples = _samples(num_models, num_seeds)
    low, high = np.full(SIMULATIONS, 0.02), np.full(SIMULATIONS, 50.0)
    for _ in range(12):
        middle = np.sqrt(low * high)
        rejects = samples.rejects(middle, size)
        low, high = np.where(rejects, low, middle), np.where(rejects, middle, high)
    return high


@lru_cache(maxsize=4)
def _samples(num_models: int, num_seeds: int) -> "_Samples":
    return _Samples(num_models, num_seeds, np.random.default_rng(0))


class _Samples:
    """Simulated differences z of a design and, for each sign pattern, the sums that determine t of z + d.

    A shift d of all differences shifts a pattern's means by its mean signs times d, so the sums are computed once for
    all d, like in `stratified.SignFlip`, for many samples at a time. S samples, P patterns.
    """

    def __init__(self, num_models: int, num_seeds: int, rng: np.random.Generator) -> None:
        signs_PMN = _patterns(num_models * num_seeds, rng).reshape(-1, num_models, num_seeds)
        z_SMN = rng.standard_normal((SIMULATIONS, num_models, num_seeds))
        self.v = 1 / (num_models**2 * (num_seeds - 1)) if num_seeds > 1 else 0.0
        self.w = 1 / (num_models**2 * num_seeds)
        self.sums_S, self.squares_S = z_SMN.sum(axis=(1, 2)), (z_SMN**2).sum(axis=(1, 2))
        self.num_models, self.num_seeds = num_models, num_seeds
        b_PM = signs_PMN.mean(axis=2)
        self.b, self.bb = b_PM.mean(axis=1), self.v * (b_PM**2).sum(axis=1)
        self.a = np.zeros((SIMULATIONS, len(signs_PMN)))
        self.aa, self.ab = np.zeros_like(self.a), np.zeros_like(self.a)
        for m in range(num_models):
            own = z_SMN[:, m] @ signs_PMN[:, m].T / num_seeds
            self.a += own / num_models
            self.aa += self.v * own * own
            self.ab += self.v * own * b_PM[:, m]

    def rejects(self, difference_S: Array, size: int) -> npt.NDArray[np.bool_]:
        """Whether p <= ALPHA / size, for each sample shifted by its difference. [S]"""
        d = difference_S[:, None]
        total = self.squares_S + 2 * difference_S * self.sums_S
        total = (total + self.num_models * self.num_seeds * difference_S**2)[:, None] / self.num_seeds
        bottom = (self.v + RIDGE * self.w) * total - (self.aa + 2 * d * self.ab + d * d * self.bb)
        t = (self.a + d * self.b) ** 2 / bottom
        as_large = (t >= t[:, :1] * (1 - 1e-9)).sum(axis=1)
        return np.asarray(as_large <= ALPHA / size * t.shape[1] * (1 + 1e-9))


def _patterns(n: int, rng: np.random.Generator) -> Array:
    """Sign patterns, the data's own first: one of each opposite pair if there are few, else random ones. [P, n]"""
    if 2 ** (n - 1) > _MAX_PATTERNS:
        signs: Array = 1.0 - 2.0 * rng.integers(0, 2, size=(_MAX_PATTERNS, n)).astype(np.float64)
        signs[0] = 1.0
        return signs
    bits = (np.arange(2 ** (n - 1))[:, None] >> np.arange(n - 1)) & 1
    return np.asarray(np.hstack([np.ones((len(bits), 1)), 1.0 - 2.0 * bits]))


def _check(num_models: int, num_seeds: int, difference: float, sd: float, size: int) -> None:
    finite([difference, sd])
    if num_models < 1 or num_seeds < 1:
        raise ValueError(f"{num_models} models x {num_seeds} seeds; expected one of each at least")
    if sd <= 0:
        raise ValueError(f"sd {sd:g}; expected a positive spread")
    if size < 1:
        raise ValueError(f"family of {size}; expected one or more comparisons")
