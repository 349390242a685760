"""Do our runs reproduce a published number? Equivalence within a margin declared in advance. Pure functions."""

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
from scipy import stats

from analysis.stats.stratified import ALPHA, finite


class Verdict(str, Enum):
    """What the runs show about a published number.

    `equivalence` returns one of the first four. The last two are for a number that is not tested, because its protocol
    differs or the grid declares no margin.
    """

    reproduced = "reproduced"
    differs = "differs"
    inconclusive = "inconclusive"
    untestable = "untestable"
    not_comparable = "not comparable"
    no_margin = "no margin declared"


@dataclass(frozen=True)
class Published:
    """A published mean, with the sample standard deviation (ddof 1) and number of its runs if they are known.

    Without n the mean is taken as exact. With n but no sd, the published runs are assumed to spread as ours do.
    """

    mean: float
    sd: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Equivalence:
    """Our mean minus the published one, its interval at level `confidence`, both p values, and the verdict.

    `low`, `high` and both p are None if `verdict` is untestable.
    """

    n: int
    difference: float
    margin: float
    low: float | None
    high: float | None
    confidence: float
    p_equivalent: float | None
    p_different: float | None
    verdict: Verdict


def equivalence(values: npt.ArrayLike, published: Published, margin: float, alpha: float = ALPHA) -> Equivalence:
    """Two one-sided t tests (Schuirmann 1987) of n runs against a published number; the margin has the same unit.

    Let d = mean(values) - published.mean. Its standard error is s / sqrt(n) with n - 1 degrees of freedom, or Welch's
    if the published number has runs of its own. Verdicts:

    - reproduced: the 1 - 2 alpha interval of d lies within (-margin, margin), i.e. p_equivalent, the larger p of the
      two one-sided tests, is <= alpha. A method exactly at the margin is judged reproduced with probability <= alpha.
    - differs: the 1 - alpha interval of d lies wholly outside, i.e. p_different, for H0: |d| <= margin, is <= alpha.
    - inconclusive: neither, because the runs are too few for this margin or the number is close to its edge.
    - untestable: a single run, or all runs equal: there is no spread to judge by.

    A difference that is not found never counts as a reproduction: few runs are inconclusive. For m numbers tested at
    once, alpha = ALPHA / m bounds the probability of any false verdict (Bonferroni); the p values are not adjusted.

    Raises:
        ValueError: no values, a value that is not finite, a margin that is not positive, an sd without its n, or alpha
            outside (0, 1/2).
    """
    ours = finite(values)
    _check(published, margin, alpha)
    confidence = 1 - 2 * alpha
    n, difference = len(ours), float(ours.mean() - published.mean)
    error = _standard_error(ours, published)
    if error is None:
        return Equivalence(n, difference, margin, None, None, confidence, None, None, Verdict.untestable)
    scale, df = error
    from_low, from_high = (difference + margin) / scale, (difference - margin) / scale  # t of d = -margin, d = margin
    p_equivalent = float(max(stats.t.sf(from_low, df), stats.t.cdf(from_high, df)))
    p_different = float(min(1, 2 * stats.t.cdf(from_low, df), 2 * stats.t.sf(from_high, df)))
    low, high = stats.t.interval(confidence, df, loc=difference, scale=scale)
    if p_equivalent <= alpha:
        verdict = Verdict.reproduced
    else:
        verdict = Verdict.differs if p_different <= alpha else Verdict.inconclusive
    return Equivalence(n, difference, margin, float(low), float(high), confidence, p_equivalent, p_different, verdict)


def _standard_error(ours: npt.NDArray[np.float64], published: Published) -> tuple[float, float] | None:
    """Standard error of the difference and its degrees of freedom (Welch-Satterthwaite); None without spread."""
    n = len(ours)
    rounding = 8 * np.finfo(np.float64).eps * np.abs(ours).max()
    variance = float(ours.var(ddof=1)) if n > 1 else 0.0
    if np.ptp(ours) <= rounding or variance == 0:
        return None
    if published.n is None:
        return float(np.sqrt(variance / n)), n - 1
    if published.sd is None:
        return float(np.sqrt(variance / n + variance / published.n)), n - 1
    own, other = variance / n, published.sd**2 / published.n
    df = (own + other) ** 2 / (own**2 / (n - 1) + other**2 / (published.n - 1))
    return float(np.sqrt(own + other)), float(df)


def _check(published: Published, margin: float, alpha: float) -> None:
    if not 0 < alpha < 0.5:  # noqa: PLR2004 - the interval has level 1 - 2 alpha
        raise ValueError(f"alpha {alpha:g}; expected a level between 0 and 0.5")
    if not (np.isfinite(margin) and margin > 0):
        raise ValueError(f"margin {margin:g}; expected a positive number, declared beforehand")
    finite([published.mean])
    if published.n is not None and published.n < 1:
        raise ValueError(f"published n = {published.n}; expected one or more runs")
    if published.sd is not None:
        if published.n is None or published.n < 2:  # noqa: PLR2004 - an sd needs two runs
            raise ValueError(
                f"published sd {published.sd:g} with n = {published.n}; an sd needs the n >= 2 runs it is of"
            )
        if finite([published.sd])[0] < 0:
            raise ValueError(f"published sd {published.sd:g} is negative")
