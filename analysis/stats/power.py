"""What n seeds can detect, and how many seeds a wanted difference takes. Pure functions.

Of differences between two methods that share their seeds, taken as normal. `family_size` comparisons are tested at
ALPHA / family_size each, Holm's first and hardest step. `sign_flip_...` are of the sign-flip test, whose p the tables
show: few pairs can only just reject, and less often than Student's. `power`, `detectable_difference` and `pairs_needed`
are of Student's paired test, two-sided; statsmodels does the work.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from analysis.stats.paired import ALPHA, Array, finite, is_underpowered

POWER = 0.8
SD_CONFIDENCE = 0.8
"""One-sided level of the upper bound on a standard deviation (Browne 1995): a plan made with the sd of three runs falls
short of its power more often than not, one made with this bound one time in five."""
SIMULATIONS = 4000
"""Samples that the sign-flip test's power is simulated with: its standard error is 0.6 points at a power of 80 %."""
MAX_SIMULATED = 16
"""Pairs up to which it is; beyond, Student's power is taken: 2 points too high for 40 comparisons, less for fewer."""


@dataclass(frozen=True)
class Spread:
    """Standard deviation of paired differences from `df` degrees of freedom, and its upper bound at SD_CONFIDENCE."""

    sd: float
    df: float
    sd_high: float


def spread(groups: Iterable[npt.ArrayLike], sharing: int = 1) -> Spread:
    """Pooled sd = sqrt(sum of squares within groups / sum of (n - 1)): about each group's own mean.

    A group is what varies by seed only: one method pair on one model and data set. Groups of one difference say
    nothing of spread and count nothing. sd_high = sd sqrt(df / chi2 quantile), for normal differences.

    sharing: how many groups have the runs of one method in common, as all comparisons with BNN++ on a model have.
    Where runs spread alike, such differences correlate by 1/2 and their squares by 1/4: df = sum of (n - 1) divided by
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


def power(num_pairs: int, difference: float, sd: float, family_size: int = 1) -> float:
    """Chance that num_pairs pairs give p <= ALPHA / family_size with the true difference's sign.

    difference and sd (of the paired differences, ddof 1) are in the same unit; the difference's sign does not matter.

    Raises:
        ValueError: num_pairs < 2, sd not positive, family_size < 1, or a value that is not finite.
    """
    from statsmodels.stats.power import TTestPower

    _check(num_pairs, difference, sd, family_size)
    # The mirror image on purpose: statsmodels' upper tail, and so its two-sided power, is NaN for some large effects.
    effect = -abs(difference) / sd
    return float(TTestPower().power(effect, num_pairs, ALPHA / family_size / 2, alternative="smaller"))


def detectable_difference(num_pairs: int, sd: float, family_size: int = 1, wanted_power: float = POWER) -> float:
    """The difference, in sd's unit, that num_pairs pairs find with wanted_power. Errors: as power."""
    _check(num_pairs, 0.0, sd, family_size)
    high = 1.0
    while power(num_pairs, high, 1.0, family_size) < wanted_power:
        high *= 2
    # Not statsmodels' solve_power: from three pairs in a family of forty it answers 5.5 where 20.7 is right.
    effect = optimize.brentq(lambda d: power(num_pairs, d, 1.0, family_size) - wanted_power, 0.0, high)
    return float(effect * sd)


def pairs_needed(difference: float, sd: float, family_size: int = 1, wanted_power: float = POWER) -> int:
    """The fewest pairs that find a difference with wanted_power.

    Raises:
        ValueError: a difference of 0, which no number of pairs finds; or as power.
    """
    _check(2, difference, sd, family_size)
    if difference == 0:
        raise ValueError("no number of pairs detects a difference of 0")
    return _fewest(2, lambda n: power(n, difference, sd, family_size) >= wanted_power)


def sign_flip_power(num_pairs: int, difference: float, sd: float, family_size: int = 1) -> float:
    """Chance that the sign-flip test of num_pairs pairs gives p <= ALPHA / family_size. Arguments, errors: as power."""
    _check(num_pairs, difference, sd, family_size)
    if num_pairs > MAX_SIMULATED:
        return power(num_pairs, difference, sd, family_size)
    return float((_rejected_from(num_pairs, family_size) < abs(difference) / sd).mean())


def sign_flip_detectable(num_pairs: int, sd: float, family_size: int = 1, wanted_power: float = POWER) -> float | None:
    """The difference that it finds with wanted_power; None where it can find none. Errors: as power."""
    _check(num_pairs, 0.0, sd, family_size)
    if is_underpowered(num_pairs, family_size):
        return None
    if num_pairs > MAX_SIMULATED:
        return detectable_difference(num_pairs, sd, family_size, wanted_power)
    return float(np.quantile(_rejected_from(num_pairs, family_size), wanted_power) * sd)


def sign_flip_pairs(difference: float, sd: float, family_size: int = 1, wanted_power: float = POWER) -> int:
    """The fewest pairs with which it finds a difference with wanted_power. Errors: as pairs_needed."""
    least = pairs_needed(difference, sd, family_size, wanted_power)  # Student's test takes no more
    return _fewest(least, lambda n: sign_flip_power(n, difference, sd, family_size) >= wanted_power)


@lru_cache(maxsize=64)
def _rejected_from(num_pairs: int, family_size: int) -> Array:
    """The true difference, in sd, from which on each of SIMULATIONS samples of num_pairs differences is rejected.

    Differences d + z_i reject if at most c of their 2^n sign patterns, c = ALPHA 2^n / (2 family_size), have a sum as
    large as the observed; by symmetry as many are as small. To flip the subset S lowers the sum by 2 sum_S (d + z_i):
    it stays as large where d <= -mean of z over S. So d must exceed the c-th largest of these 2^n - 1 numbers.
    """
    num_patterns = int(ALPHA / family_size * 2 ** (num_pairs - 1) * (1 + 1e-12))
    if num_patterns == 0:
        return np.full(SIMULATIONS, np.inf)
    z_SN = np.random.default_rng(0).standard_normal((SIMULATIONS, num_pairs), dtype=np.float32)
    subsets_PN = (np.arange(1, 2**num_pairs)[:, None] >> np.arange(num_pairs) & 1).astype(np.float32)
    subsets_PN /= subsets_PN.sum(axis=1, keepdims=True)
    parts = np.array_split(z_SN, max(1, SIMULATIONS * 2**num_pairs // 2**24))
    found = [np.partition(-part @ subsets_PN.T, -num_patterns, axis=1)[:, -num_patterns] for part in parts]
    return np.concatenate(found).astype(np.float64)


def _fewest(least: int, enough: Callable[[int], bool]) -> int:
    """The smallest number from `least` on that is enough, found by doubling and halving."""
    if enough(least):
        return least
    low, high = least, 2 * least  # low is too few
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _check(num_pairs: int, difference: float, sd: float, family_size: int) -> None:
    finite([difference, sd])
    if num_pairs < 2:  # noqa: PLR2004 - one pair has no spread
        raise ValueError(f"{num_pairs} pairs; a paired t test takes two or more")
    if sd <= 0:
        raise ValueError(f"sd {sd:g}; expected a positive spread")
    if family_size < 1:
        raise ValueError(f"family of {family_size}; expected one or more comparisons")
