"""What part of the gap to full precision does a method close? Interquartile mean and performance profile over runs.

After Agarwal et al. (2021), Deep reinforcement learning at the edge of the statistical precipice: tasks (models) are
fixed, and runs are resampled within each task. Pure functions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from analysis.stats.stratified import CONFIDENCE, Array, Interval, finite

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Profile:
    """One method's interquartile mean over all runs with its interval, and the share of runs above each threshold.

    `low` and `high` bound `shares` pointwise. Scores are shares of the gap: 0 is the reference, 1 full precision.
    """

    iqm: float
    interval: Interval
    thresholds: Array
    shares: Array
    low: Array
    high: Array


def share_of_gap(accuracies: npt.ArrayLike, reference: npt.ArrayLike, full_precision: npt.ArrayLike) -> Array | None:
    """(accuracy - mean reference) / (mean full precision - mean reference) for each run; None unless the gap is > 0.

    Each array holds accuracies (fractions) of runs on one model: the method's, BinaryConnect's (the reference), fp's.
    """
    low, high = float(finite(reference).mean()), float(finite(full_precision).mean())
    return None if high <= low else (finite(accuracies) - low) / (high - low)


def interquartile_mean(scores: Sequence[npt.ArrayLike]) -> float:
    """Mean of the middle half of all scores of all tasks: trims 25 % at either end (scipy's trim_mean)."""
    return float(stats.trim_mean(np.concatenate([finite(task) for task in scores]), 0.25))


def profile(scores: Mapping[str, npt.ArrayLike], thresholds: npt.ArrayLike, rng: np.random.Generator) -> Profile:
    """Profile of one method from its scores by task, with percentile bootstrap intervals over runs within each task.

    With few runs of few tasks the intervals are too narrow: docs/statistics.md gives their coverage.

    Raises:
        ValueError: no task, a task without runs, or a value that is not finite.
    """
    if not scores:
        raise ValueError("no task; expected the runs' scores of one at least")
    tasks, at = [finite(scores[task]) for task in sorted(scores)], finite(thresholds)
    drawn = [task[rng.integers(0, len(task), size=(NUM_RESAMPLES, len(task)))] for task in tasks]
    all_BN = np.concatenate(drawn, axis=1)
    ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.quantile(stats.trim_mean(all_BN, 0.25, axis=1), ends)
    shares_BT = np.stack([(all_BN > threshold).mean(axis=1) for threshold in at], axis=1)
    bounds = np.quantile(shares_BT, ends, axis=0)
    shares = np.array([(np.concatenate(tasks) > threshold).mean() for threshold in at])
    return Profile(
        interquartile_mean(tasks), Interval(float(low), float(high), CONFIDENCE), at, shares, bounds[0], bounds[1]
    )
