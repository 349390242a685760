import gc
import itertools
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.stats.families import (
    MIN_BLOCKS,
    TooFewBlocksError,
    across_models,
    critical_difference,
    friedman,
    holm,
    probability_of_improvement,
    rank_methods,
)

METHODS = ("bc", "pc", "bnn", "bnn++")
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=8)
tables = st.integers(MIN_BLOCKS, 8).flatmap(
    lambda blocks: st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=blocks, max_size=blocks)
)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def no_garbage_collection() -> Iterator[None]:
    """Statsmodels collects garbage in every call of Holm's method: a tenth of a second and more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)
        yield


@given(probabilities, st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_holm_keeps_the_order_and_never_lowers_a_p(p: list[float], num_missing: int) -> None:
    family = holm(dict(enumerate(p)), len(p) + num_missing)
    assert all(0 <= raw <= family.adjusted[key] <= 1 for key, raw in enumerate(p))
    in_order = [family.adjusted[key] for key in np.argsort(p, kind="stable").tolist()]
    assert in_order == sorted(in_order)
    assert all(family.adjusted[key] == pytest.approx(0.05) or (family.adjusted[key] < 0.05) for key in family.rejected)


@given(probabilities, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_holm_does_not_depend_on_the_order_of_the_comparisons(p: list[float], random: Random) -> None:
    items = list(enumerate(p))
    random.shuffle(items)
    family, shuffled = holm(dict(enumerate(p)), len(p)), holm(dict(items), len(p))
    assert shuffled.adjusted == pytest.approx(dict(family.adjusted))
    assert shuffled.rejected == family.rejected


@given(probabilities, st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_members_without_a_p_count_as_not_significant(p: list[float], num_missing: int) -> None:
    named = dict(enumerate(p))
    complete = holm({**named, **dict.fromkeys(range(100, 100 + num_missing), 1.0)}, len(p) + num_missing)
    family = holm(named, len(p) + num_missing)
    assert family.size == len(p) + num_missing
    assert family.adjusted == pytest.approx({key: complete.adjusted[key] for key in named})
    assert family.rejected == complete.rejected


def test_a_failed_comparison_cannot_make_another_significant() -> None:
    assert holm({"bc": 0.02, "pc": 0.9}, 2).rejected == {"bc"}
    assert holm({"bc": 0.02}, 3).rejected == frozenset()


def test_a_family_without_results_has_its_size_all_the_same() -> None:
    family = holm(dict[str, float](), 5)
    assert (family.size, dict(family.adjusted), family.rejected) == (5, {}, frozenset())


@pytest.mark.parametrize(
    ("p", "size", "message"),
    [
        ([0.1, 0.2, 0.3], 2, "3 comparisons in a family declared with 2"),
        ([0.1, float("nan")], 2, "not finite"),
        ([0.1, 1.5], 2, "p from 0.1 to 1.5"),
    ],
)
def test_what_is_no_family_is_refused(p: list[float], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        holm(dict(enumerate(p)), size)


def test_across_models_there_is_one_difference_per_model() -> None:
    ours = {"resnet20": 0.90, "resnet56": 0.92, "vit_tiny": 0.80}
    theirs = {"resnet20": 0.89, "resnet56": 0.90, "vit_tiny": 0.77, "vgg11": 0.5}
    found = across_models(ours, theirs, rng())
    assert (found.difference.n, found.difference.p) == (3, 0.25)
    assert found.difference.mean == pytest.approx(0.02)
    assert found.wilcoxon_p is None


@pytest.mark.parametrize(("num_models", "p"), [(5, None), (6, 0.03125), (7, 0.015625)])
def test_wilcoxon_is_used_where_it_can_reach_alpha(num_models: int, p: float | None) -> None:
    ours = {f"model{position}": 0.8 + position / 100 for position in range(num_models)}
    found = across_models(ours, dict.fromkeys(ours, 0.7), rng())
    assert found.wilcoxon_p == (None if p is None else pytest.approx(p))


def test_models_without_a_difference_do_not_count_for_wilcoxon() -> None:
    ours = {f"model{position}": 0.8 + position / 100 for position in range(8)}
    theirs = {name: value if name in {"model0", "model1", "model2"} else 0.7 for name, value in ours.items()}
    assert across_models(ours, theirs, rng()).wilcoxon_p is None


@given(tables, st.permutations(range(4)), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_ranks_depend_on_neither_the_order_of_methods_nor_of_models(
    table: list[list[int]], columns: list[int], random: Random
) -> None:
    ranking = rank_methods(table, METHODS)
    rows = list(table)
    random.shuffle(rows)
    other = rank_methods(np.array(rows)[:, columns], [METHODS[column] for column in columns])
    as_map = dict(zip(ranking.methods, ranking.average_ranks, strict=True))
    assert dict(zip(other.methods, other.average_ranks, strict=True)) == pytest.approx(as_map)
    assert (other.friedman.chi2, other.friedman.f_p) == pytest.approx((ranking.friedman.chi2, ranking.friedman.f_p))


@given(tables)
@settings(deadline=None, max_examples=30)
def test_groups_are_the_largest_sets_that_cannot_be_separated(table: list[list[int]]) -> None:
    """Against all subsets of the methods; and p of Nemenyi's test says the same of each pair as its critical rank."""
    ranking = rank_methods(table, METHODS)
    ranks = dict(zip(ranking.methods, ranking.average_ranks, strict=True))
    alike = {
        subset
        for size in (2, 3, 4)
        for subset in itertools.combinations(ranking.methods, size)
        if max(ranks[name] for name in subset) - min(ranks[name] for name in subset) < ranking.critical_difference
    }
    largest = {subset for subset in alike if not any(set(subset) < set(other) for other in alike)}
    # Methods of equal rank may be exchanged in a group's place: compare the ranks of what is in it.
    assert {tuple(ranks[name] for name in group) for group in ranking.groups} == {
        tuple(ranks[name] for name in group) for group in largest
    }
    for (row, one), (column, two) in itertools.permutations(enumerate(ranking.methods), 2):
        separable = abs(ranks[one] - ranks[two]) >= ranking.critical_difference
        assert (ranking.pairwise_p[row][column] <= 0.05) == separable


def test_the_best_method_has_rank_one_whichever_way_is_better() -> None:
    means = np.array([[0.1, 0.2, 0.3, 0.4]] * 6) + np.arange(6)[:, None] / 10
    ranking = rank_methods(means, METHODS)
    assert ranking.methods == ("bnn++", "bnn", "pc", "bc")
    assert ranking.average_ranks == (1, 2, 3, 4)
    assert rank_methods(means, METHODS, higher_is_better=False).methods == METHODS


def test_models_that_all_agree_leave_no_doubt() -> None:
    found = friedman([[0.1, 0.2, 0.3, 0.4]] * 6)
    assert found.chi2 == pytest.approx(18.0)
    assert (found.f, found.f_p) == (np.inf, 0.0)


def test_methods_that_never_differ_are_alike() -> None:
    found = friedman([[0.5] * 4] * 6)
    assert (found.chi2, found.chi2_p, found.f, found.f_p) == (0.0, 1.0, 0.0, 1.0)
    assert rank_methods([[0.5] * 4] * 6, METHODS).groups == (METHODS,)


def test_methods_that_are_all_separable_have_no_group() -> None:
    assert rank_methods([[0.1, 0.2, 0.3, 0.4]] * 60, METHODS).groups == ()


def test_fewer_than_five_models_are_refused_and_told_so() -> None:
    for refuses in (friedman, lambda table: rank_methods(table, METHODS)):
        with pytest.raises(TooFewBlocksError, match="too few blocks: 4 of the 5 that ranks over models need"):
            refuses([[0.1, 0.2, 0.3, 0.4]] * 4)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(6, 2\); expected blocks by methods, of which three or more"):
        friedman([[0.1, 0.2]] * 6)
    with pytest.raises(ValueError, match="1 of 24 values are not finite"):
        rank_methods([[0.1, 0.2, 0.3, 0.4]] * 5 + [[0.1, float("nan"), 0.3, 0.4]], METHODS)
    with pytest.raises(ValueError, match="4 columns for 2 methods"):
        rank_methods([[0.1, 0.2, 0.3, 0.4]] * 6, METHODS[:2])


def test_more_models_separate_closer_ranks() -> None:
    assert critical_difference(6, 20) == pytest.approx(critical_difference(6, 5) / 2)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.lists(st.integers(0, 9), min_size=1, max_size=6))
@settings(deadline=None, max_examples=25)
def test_improvement_of_one_over_the_other_adds_up_to_one(x: list[int], y: list[int]) -> None:
    forth = probability_of_improvement({"resnet20": x}, {"resnet20": y}, rng())
    back = probability_of_improvement({"resnet20": y}, {"resnet20": x}, rng())
    assert forth.probability + back.probability == pytest.approx(1)
    if forth.low is not None and forth.high is not None:
        assert 0 <= forth.low <= forth.high <= 1


def test_tasks_weigh_alike_however_many_runs_they_have() -> None:
    found = probability_of_improvement({"a": [1.0, 2.0], "b": [0.0] * 9}, {"a": [0.0], "b": [1.0] * 5}, rng())
    assert (found.probability, found.num_tasks) == (0.5, 2)
    assert (found.low, found.high) == (None, None)


def test_the_interval_of_improvement_is_the_bootstraps() -> None:
    """Against scipy's bootstrap of the same statistic, of one task."""
    x, y = rng().normal(0.5, size=12), rng().normal(size=9)
    expected = stats.bootstrap(
        (x, y), lambda a, b: (a[:, None] > b).mean(), vectorized=False, n_resamples=4000, method="percentile", rng=rng()
    ).confidence_interval
    found = probability_of_improvement({"task": x}, {"task": y}, rng())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_tasks_must_be_the_same_on_both_sides() -> None:
    for x, y in (({"a": [1.0]}, {"b": [1.0]}), ({}, {})):
        with pytest.raises(ValueError, match="tasks must be the same, one or more"):
            probability_of_improvement(x, y, rng())
