"""Runs against a published number: two one-sided t tests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.stats.equivalence import Published, Verdict, equivalence


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.902, 0.900, 0.899, 0.901], Verdict.reproduced),
        ([0.852, 0.850, 0.849, 0.851], Verdict.differs),
        ([0.952, 0.950, 0.949, 0.951], Verdict.differs),
        ([0.93, 0.87, 0.95, 0.85], Verdict.inconclusive),
        ([0.906, 0.904, 0.905, 0.9051], Verdict.inconclusive),
        ([0.90], Verdict.untestable),
        ([0.90, 0.90, 0.90], Verdict.untestable),
    ],
)
def test_runs_against_a_published_number(values: list[float], verdict: Verdict) -> None:
    found = equivalence(values, Published(0.90), margin=0.005)
    assert found.verdict is verdict
    assert found.difference == pytest.approx(np.mean(values) - 0.90)
    assert (found.low is None) == (verdict is Verdict.untestable)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8, unique=True), st.floats(0.001, 2), st.floats(-1, 1))
@settings(deadline=None, max_examples=100)
def test_the_interval_gives_the_verdict(values: list[float], margin: float, mean: float) -> None:
    found = equivalence(values, Published(mean), margin)
    if found.low is None or found.high is None or found.p_equivalent is None or found.p_different is None:
        assert np.ptp(values) < 1e-14
        return
    low, high = stats.ttest_1samp(values, mean).confidence_interval(0.95)
    inside = -margin < found.low and found.high < margin
    outside = low - mean > margin or high - mean < -margin
    if min(abs(found.p_equivalent - 0.05), abs(found.p_different - 0.05)) > 1e-9:
        assert (found.verdict is Verdict.reproduced) == inside == (found.p_equivalent <= 0.05)
        assert (found.verdict is Verdict.differs) == outside == (found.p_different <= 0.05)
    mirrored = equivalence([-value for value in values], Published(-mean), margin)
    assert mirrored.verdict is found.verdict


def test_a_published_number_of_few_runs_is_harder_to_confirm_and_to_contradict() -> None:
    near, far = [0.902, 0.900, 0.899], [0.912, 0.910, 0.909]
    exact, one_run = Published(0.90), Published(0.90, n=1)
    assert equivalence(near, exact, 0.005).verdict is Verdict.reproduced
    assert equivalence(near, one_run, 0.005).verdict is Verdict.inconclusive
    assert equivalence(far, exact, 0.005).verdict is Verdict.differs
    assert equivalence(far, one_run, 0.005).verdict is Verdict.inconclusive


@pytest.mark.parametrize(
    ("values", "published", "margin", "message"),
    [
        ([0.9, float("nan")], Published(0.9), 0.01, "1 of 2 values are not finite"),
        ([0.9, 0.8], Published(float("nan")), 0.01, "not finite"),
        ([0.9, 0.8], Published(0.9), 0.0, "margin 0; expected a positive number, declared beforehand"),
        ([0.9, 0.8], Published(0.9, sd=0.1), 0.01, "published sd 0.1 with n = None"),
        ([0.9, 0.8], Published(0.9, sd=-0.1, n=3), 0.01, "published sd -0.1 is negative"),
        ([0.9, 0.8], Published(0.9, n=0), 0.01, "published n = 0"),
        ([], Published(0.9), 0.01, "at least 1 value"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    values: list[float], published: Published, margin: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        equivalence(values, published, margin)
