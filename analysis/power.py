"""What n seeds can detect, and how many seeds a wanted difference takes. Pure functions; statsmodels does the work.

The test is Student's paired test, two-sided, of differences between two methods that share their seeds. `family_size`
comparisons are tested at ALPHA / family_size each, Holm's first and hardest step. The exact sign-flip test needs more:
`analysis.statistics.fewest_pairs` at least.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from analysis.statistics import ALPHA, finite

POWER = 0.8
SD_CONFIDENCE = 0.8
"""One-sided level of the upper bound on a standard deviation (Browne 1995): a plan made with the sd of three runs falls
short of its power more often than not, one made with this bound one time in five."""


@dataclass(frozen=True)
class Spread:
    """Standard deviation of paired differences from `df` degrees of freedom, and its upper bound at SD_CONFIDENCE."""

    sd: float
    df: int
    sd_high: float


def spread(groups: Iterable[npt.ArrayLike]) -> Spread:
    """Pooled sd = sqrt(sum of squares within groups / df), df = sum of (n - 1): about each group's own mean.

    A group is what varies by seed only: one method pair on one model and data set. Groups of one difference say
    nothing of spread and count nothing. sd_high = sd sqrt(df / chi2 quantile), for normal differences.

    Raises:
        ValueError: no group of two or more differences, or a value that is not finite.
    """
    arrays = [finite(group) for group in groups]
    df = sum(len(array) - 1 for array in arrays)
    if df == 0:
        raise ValueError("no spread to plan with: a standard deviation takes two paired differences or more")
    sd = float(np.sqrt(sum(((array - array.mean()) ** 2).sum() for array in arrays) / df))
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
    high = 2
    while power(high, difference, sd, family_size) < wanted_power:
        high *= 2
    low = high // 2  # too few, or 1
    while high - low > 1:
        middle = (low + high) // 2
        enough = power(middle, difference, sd, family_size) >= wanted_power
        low, high = (low, middle) if enough else (middle, high)
    return high


def _check(num_pairs: int, difference: float, sd: float, family_size: int) -> None:
    finite([difference, sd])
    if num_pairs < 2:  # noqa: PLR2004 - one pair has no spread
        raise ValueError(f"{num_pairs} pairs; a paired t test takes two or more")
    if sd <= 0:
        raise ValueError(f"sd {sd:g}; expected a positive spread")
    if family_size < 1:
        raise ValueError(f"family of {family_size}; expected one or more comparisons")
