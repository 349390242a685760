"""Methods compared across models by rank: Friedman's and Nemenyi's tests, on one mean per model and method.

The tests assume that the blocks (models) are an independent sample. Related models such as ResNet-18 and ResNet-50 on
one test set are not: Demsar's blocks are data sets. Use ranks to describe, and `stratified` to decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from analysis.stats.stratified import ALPHA, Array, finite

MIN_BLOCKS = 5
"""Fewest blocks for Friedman's and Nemenyi's tests, which are approximations for many blocks."""


class TooFewBlocksError(ValueError):
    """Fewer than MIN_BLOCKS blocks; the message is fit to show to users."""


@dataclass(frozen=True)
class Friedman:
    """Friedman's test that all methods are alike: `chi2` and its p; Iman and Davenport's `f` is less conservative."""

    num_blocks: int
    num_methods: int
    chi2: float
    chi2_p: float
    f: float
    f_p: float


@dataclass(frozen=True)
class Ranking:
    """Methods from best to worst by average rank over the blocks (1 is best), with Nemenyi's test of all pairs.

    Two methods are separable if their average ranks differ by `critical_difference` or more. `groups` are the largest
    sets of mutually inseparable methods, best first: the bars of a critical-difference diagram. `pairwise_p` holds the
    p of every pair, with rows and columns in the order of `methods`.
    """

    methods: tuple[str, ...]
    average_ranks: tuple[float, ...]
    critical_difference: float
    groups: tuple[tuple[str, ...], ...]
    pairwise_p: tuple[tuple[float, ...], ...]
    friedman: Friedman


def friedman(mean_MQ: npt.ArrayLike) -> Friedman:
    """Friedman's test on the means of M blocks (axis 0: models) and Q methods (axis 1), ranked within each block.

    chi2 = (Q - 1) sum_q (R_q - M (Q + 1) / 2)^2 / sum of the squared ranks' deviations, with R_q the sum of ranks,
    which corrects for ties; Q - 1 degrees of freedom. Because chi2 is conservative, Demsar (2006) advises Iman and
    Davenport's (1980) F = (M - 1) chi2 / (M (Q - 1) - chi2) with Q - 1 and (Q - 1) (M - 1) degrees of freedom.

    Raises:
        TooFewBlocksError: M < MIN_BLOCKS.
        ValueError: Q < 3, or a value that is not finite.
    """
    means = _blocks(mean_MQ)
    num_blocks, num_methods = means.shape
    if (means == means[:, :1]).all():  # scipy would compute 0 / 0
        return Friedman(num_blocks, num_methods, chi2=0.0, chi2_p=1.0, f=0.0, f_p=1.0)
    test = stats.friedmanchisquare(*means.T)
    chi2, limit = float(test.statistic), num_blocks * (num_methods - 1)
    agree = limit - chi2 <= 1e-9 * limit  # all blocks rank the methods alike
    f = np.inf if agree else (num_blocks - 1) * chi2 / (limit - chi2)
    f_p = float(stats.f.sf(f, num_methods - 1, (num_methods - 1) * (num_blocks - 1)))
    return Friedman(num_blocks, num_methods, chi2, float(test.pvalue), float(f), f_p)


def critical_difference(num_methods: int, num_blocks: int, alpha: float = ALPHA) -> float:
    """CD = q_alpha sqrt(Q (Q + 1) / (6 M)), q_alpha the studentised range's quantile / sqrt(2) (Nemenyi 1963).

    Unit: ranks. Average ranks over M blocks that differ by CD or more are separable at level alpha, jointly over all
    pairs of the Q methods.
    """
    q_alpha = stats.studentized_range.isf(alpha, num_methods, np.inf) / np.sqrt(2)
    return float(q_alpha * np.sqrt(num_methods * (num_methods + 1) / (6 * num_blocks)))


def rank_methods(
    mean_MQ: npt.ArrayLike, methods: Sequence[str], alpha: float = ALPHA, *, higher_is_better: bool = True
) -> Ranking:
    """Average ranks of Q methods over M blocks, ties averaged, with Friedman's and Nemenyi's tests.

    Axis 0 of mean_MQ holds the blocks, axis 1 the methods in the order of `methods`. A method's rank, and so the
    difference of two ranks, depends on which other methods are ranked (Benavoli 2016). To compare BNN++ with each other
    method, use `compare.comparison`.

    Raises:
        TooFewBlocksError: M < MIN_BLOCKS.
        ValueError: Q < 3 or Q != len(methods), or a value that is not finite.
    """
    means = _blocks(mean_MQ)
    if means.shape[1] != len(methods):
        raise ValueError(f"{means.shape[1]} columns for {len(methods)} methods ({', '.join(methods)})")
    average_Q = stats.rankdata(-means if higher_is_better else means, axis=1).mean(axis=0)
    order = np.argsort(average_Q, kind="stable")
    names = tuple(methods[position] for position in order)
    ranks = average_Q[order]
    difference = critical_difference(len(methods), len(means), alpha)
    num = len(methods)
    scale = np.sqrt(num * (num + 1) / (12 * len(means)))  # standard error of a difference of average ranks / sqrt(2)
    p_QQ = stats.studentized_range.sf(np.abs(ranks[:, None] - ranks) / scale, num, np.inf)
    return Ranking(
        methods=names,
        average_ranks=tuple(ranks.tolist()),
        critical_difference=difference,
        groups=_groups(names, ranks, difference),
        pairwise_p=tuple(tuple(row) for row in p_QQ.tolist()),
        friedman=friedman(means),
    )


def _groups(methods: Sequence[str], ranks: Array, critical: float) -> tuple[tuple[str, ...], ...]:
    """Maximal runs of two or more methods whose first and last ranks are less than `critical` apart; ranks ascend."""
    groups: list[tuple[str, ...]] = []
    previous_end = 0
    for start, rank in enumerate(ranks):
        end = int(np.searchsorted(ranks, rank + critical, side="left"))
        if end > max(previous_end, start + 1):  # otherwise part of the previous run, or a single method
            groups.append(tuple(methods[start:end]))
        previous_end = max(previous_end, end)
    return tuple(groups)


def _blocks(mean_MQ: npt.ArrayLike) -> Array:
    """Converts to float64 [M, Q]. ValueError unless all values are finite, M >= MIN_BLOCKS and Q >= 3."""
    means = np.asarray(mean_MQ, dtype=np.float64)
    if means.ndim != 2 or means.shape[1] < 3:  # noqa: PLR2004 - for two methods, use a sign-flip test
        raise ValueError(f"shape {means.shape}; expected blocks by methods, of which three or more")
    if len(means) < MIN_BLOCKS:
        raise TooFewBlocksError(f"too few blocks: {len(means)} of the {MIN_BLOCKS} that ranks over models need")
    finite(means.ravel())
    return means
