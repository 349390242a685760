"""Many comparisons at once: Holm over a declared family, and methods compared across models. Pure functions.

Across models a block is one model on one data set, and its value for a method is the mean over the method's seeds
there, taken by the caller. Seeds are never pooled with models: five seeds of one model say nothing about a second
model, and a test of 8 models x 5 seeds as 40 pairs would take them for forty models.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import stats

from analysis.stats.paired import ALPHA, CONFIDENCE, Array, Difference, finite, is_underpowered, paired_difference

MIN_BLOCKS = 5
"""Blocks from which Friedman's and Nemenyi's tests are used: both are approximations for many blocks."""
NUM_RESAMPLES = 2000
"""Bootstrap samples for the probability of improvement, as in rliable."""

Comparison = TypeVar("Comparison", bound=Hashable)


class TooFewBlocksError(ValueError):
    """Fewer than MIN_BLOCKS blocks; the message says so to people."""


@dataclass(frozen=True)
class Family(Generic[Comparison]):
    """Comparisons of a declared family of `size` members: each one's Holm-adjusted p, and which are rejected."""

    size: int
    adjusted: Mapping[Comparison, float]
    rejected: frozenset[Comparison]


@dataclass(frozen=True)
class AcrossModels:
    """One difference per model, candidate minus baseline: `difference.n` counts models.

    `wilcoxon_p` is two-sided; None where no data from so many non-zero differences could reach ALPHA.
    """

    difference: Difference
    wilcoxon_p: float | None


@dataclass(frozen=True)
class Friedman:
    """Friedman's test that all methods are alike: `chi2` and its p; Iman and Davenport's `f`, less conservative."""

    num_blocks: int
    num_methods: int
    chi2: float
    chi2_p: float
    f: float
    f_p: float


@dataclass(frozen=True)
class Ranking:
    """Methods from best to worst by average rank over the blocks (1 is best), with Nemenyi's test of all pairs.

    Two methods are separable when their average ranks differ by `critical_difference` or more. `groups` are the largest
    sets of methods of which no two are separable, best first: the bars of a critical-difference diagram. `pairwise_p`
    has the p of every two, by rows and columns in the order of `methods`.
    """

    methods: tuple[str, ...]
    average_ranks: tuple[float, ...]
    critical_difference: float
    groups: tuple[tuple[str, ...], ...]
    pairwise_p: tuple[tuple[float, ...], ...]
    friedman: Friedman


@dataclass(frozen=True)
class Improvement:
    """P(X > Y) averaged over the tasks, and its interval at level CONFIDENCE, None where the runs show no spread."""

    probability: float
    low: float | None
    high: float | None
    num_tasks: int


def holm(p: Mapping[Comparison, float], family_size: int) -> Family[Comparison]:
    """Adjusted p(i) = max over j <= i of min(1, (size - j + 1) p(j)), where p(1) <= p(2) <= ...; rejected if <= ALPHA.

    Holm (1979): the chance that any true null hypothesis of the family is rejected is at most ALPHA, however the
    comparisons depend on each other. The family is declared before the results are seen: its size counts the members
    that have no p (runs failed or missing) as p = 1, so that a failed run cannot make the others significant.

    Raises:
        ValueError: a p that is no probability, or more of them than the family has members.
    """
    if len(p) > family_size:
        raise ValueError(f"{len(p)} comparisons in a family declared with {family_size}")
    values = finite(list(p.values()), at_least=0)
    if ((values < 0) | (values > 1)).any():
        raise ValueError(f"p from {values.min():g} to {values.max():g}; expected probabilities")
    if not len(values):
        return Family(family_size, {}, frozenset())
    from statsmodels.stats.multitest import multipletests

    padded = np.concatenate([values, np.ones(family_size - len(values))])
    rejected, adjusted, *_ = multipletests(padded, alpha=ALPHA, method="holm")
    return Family(
        family_size,
        dict(zip(p, adjusted.tolist(), strict=False)),  # the padding has no name
        frozenset(key for key, is_rejected in zip(p, rejected.tolist(), strict=False) if is_rejected),
    )


def across_models(
    candidate: Mapping[str, float], baseline: Mapping[str, float], rng: np.random.Generator
) -> AcrossModels:
    """Candidate minus baseline over the models that both have; the arguments map model -> mean over its seeds.

    Raises:
        ValueError: no model in common, or a value that is not finite.
    """
    difference = paired_difference(candidate, baseline, rng)
    models = sorted(candidate.keys() & baseline.keys())
    # To twelve decimals, so that what differs by rounding only is a tie, and 0.8 - 0.8 is zero.
    differences = np.round([candidate[model] - baseline[model] for model in models], 12)
    if is_underpowered(int(np.count_nonzero(differences))):  # the test leaves out zeros
        return AcrossModels(difference, wilcoxon_p=None)
    return AcrossModels(difference, float(stats.wilcoxon(differences).pvalue))


def friedman(mean_MQ: npt.ArrayLike) -> Friedman:
    """Friedman's test on means of M blocks (axis 0: models) by Q methods (axis 1), ranked within each block.

    chi2 = (Q - 1) sum_q (R_q - M (Q + 1) / 2)^2 / sum of the squared ranks' deviations, R_q the sum of ranks: corrected
    for ties; Q - 1 degrees of freedom. It is conservative, so Iman and Davenport (1980), as Demsar (2006) advises:
    F = (M - 1) chi2 / (M (Q - 1) - chi2) with Q - 1 and (Q - 1) (M - 1).

    Raises:
        TooFewBlocksError: M < MIN_BLOCKS.
        ValueError: Q < 3, or a value that is not finite.
    """
    means = _blocks(mean_MQ)
    num_blocks, num_methods = means.shape
    if (means == means[:, :1]).all():  # 0 / 0 to scipy
        return Friedman(num_blocks, num_methods, chi2=0.0, chi2_p=1.0, f=0.0, f_p=1.0)
    test = stats.friedmanchisquare(*means.T)
    chi2, limit = float(test.statistic), num_blocks * (num_methods - 1)
    agree = limit - chi2 <= 1e-9 * limit  # all blocks rank the methods alike
    f = np.inf if agree else (num_blocks - 1) * chi2 / (limit - chi2)
    f_p = float(stats.f.sf(f, num_methods - 1, (num_methods - 1) * (num_blocks - 1)))
    return Friedman(num_blocks, num_methods, chi2, float(test.pvalue), float(f), f_p)


def critical_difference(num_methods: int, num_blocks: int, alpha: float = ALPHA) -> float:
    """CD = q_alpha sqrt(Q (Q + 1) / (6 M)), q_alpha the studentised range's quantile / sqrt(2) (Nemenyi 1963).

    In ranks: average ranks over M blocks that differ by CD or more are separable at level alpha, over all pairs of the
    Q methods together.
    """
    q_alpha = stats.studentized_range.isf(alpha, num_methods, np.inf) / np.sqrt(2)
    return float(q_alpha * np.sqrt(num_methods * (num_methods + 1) / (6 * num_blocks)))


def rank_methods(
    mean_MQ: npt.ArrayLike, methods: Sequence[str], alpha: float = ALPHA, *, higher_is_better: bool = True
) -> Ranking:
    """Average ranks of Q methods over M blocks, ties averaged, with Friedman's and Nemenyi's tests.

    Axis 0 of mean_MQ are the blocks, axis 1 the methods, in the order of `methods`. A method's rank, and so the
    difference of two, depends on which other methods are ranked (Benavoli 2016): for BNN++ against each of the others,
    across_models and holm.

    Raises:
        TooFewBlocksError: M < MIN_BLOCKS.
        ValueError: Q < 3 or not len(methods), or a value that is not finite.
    """
    from scikit_posthocs import posthoc_nemenyi_friedman

    means = _blocks(mean_MQ)
    if means.shape[1] != len(methods):
        raise ValueError(f"{means.shape[1]} columns for {len(methods)} methods ({', '.join(methods)})")
    average_Q = stats.rankdata(-means if higher_is_better else means, axis=1).mean(axis=0)
    order = np.argsort(average_Q, kind="stable")
    names = tuple(methods[position] for position in order)
    ranks = average_Q[order]
    difference = critical_difference(len(methods), len(means), alpha)
    p_QQ = np.asarray(posthoc_nemenyi_friedman(means), dtype=np.float64)[np.ix_(order, order)]
    return Ranking(
        methods=names,
        average_ranks=tuple(ranks.tolist()),
        critical_difference=difference,
        groups=_groups(names, ranks, difference),
        pairwise_p=tuple(tuple(row) for row in p_QQ.tolist()),
        friedman=friedman(means),
    )


def _groups(methods: Sequence[str], ranks: Array, critical: float) -> tuple[tuple[str, ...], ...]:
    """The longest runs of two or more methods whose first and last are less than `critical` apart; ranks ascend."""
    groups: list[tuple[str, ...]] = []
    previous_end = 0
    for start, rank in enumerate(ranks):
        end = int(np.searchsorted(ranks, rank + critical, side="left"))
        if end > max(previous_end, start + 1):  # else it is part of the run before, or alone
            groups.append(tuple(methods[start:end]))
        previous_end = max(previous_end, end)
    return tuple(groups)


def probability_of_improvement(
    x: Mapping[str, npt.ArrayLike], y: Mapping[str, npt.ArrayLike], rng: np.random.Generator
) -> Improvement:
    """Mean over tasks of P(X > Y) + P(X = Y) / 2, X and Y runs drawn at random: the Mann-Whitney U / (n_x n_y).

    Agarwal et al. (2021), Deep RL at the edge of the statistical precipice; as in rliable. The arguments map a task (a
    model on a data set) to its runs, any number of them. Runs are not paired, by definition: it is the chance that a
    new run of X beats a new run of Y. The interval is the percentile bootstrap's, over runs within each task. From few
    runs it is too narrow: docs/statistics.md has its coverage.

    Raises:
        ValueError: not the same tasks on both sides, none at all, one without runs, or a value that is not finite.
    """
    if x.keys() != y.keys() or not x:
        raise ValueError(f"tasks must be the same, one or more: {', '.join(x) or 'none'}; {', '.join(y) or 'none'}")
    total, resampled = 0.0, np.zeros(NUM_RESAMPLES)
    for task in sorted(x):
        ours, theirs = finite(x[task]), finite(y[task])
        wins_XY = (ours[:, None] > theirs) + (ours[:, None] == theirs) / 2
        total += stats.mannwhitneyu(ours, theirs, alternative="greater").statistic / wins_XY.size
        counts_BX, counts_BY = (rng.multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES) for n in wins_XY.shape)
        resampled += np.einsum("bx,xy,by->b", counts_BX, wins_XY, counts_BY) / wins_XY.size
    probability = float(total / len(x))
    if np.ptp(resampled) <= 1e-9 * len(x):  # complete separation, or one run each: no spread to resample
        return Improvement(probability, low=None, high=None, num_tasks=len(x))
    low, high = np.quantile(resampled / len(x), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Improvement(probability, float(low), float(high), num_tasks=len(x))


def _blocks(mean_MQ: npt.ArrayLike) -> Array:
    """As float64 [M, Q], every value finite; M >= MIN_BLOCKS and Q >= 3, else ValueError."""
    means = np.asarray(mean_MQ, dtype=np.float64)
    if means.ndim != 2 or means.shape[1] < 3:  # noqa: PLR2004 - two methods have one difference per model: across_models
        raise ValueError(f"shape {means.shape}; expected blocks by methods, of which three or more")
    if len(means) < MIN_BLOCKS:
        raise TooFewBlocksError(f"too few blocks: {len(means)} of the {MIN_BLOCKS} that ranks over models need")
    finite(means.ravel())
    return means
