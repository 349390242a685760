"""Holm's method, the level it applies, and what a design can reach."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from analysis.stats.families import holm, is_rejected, levels, reachable, seeds_needed

probabilities = st.dictionaries(st.integers(0, 20), st.floats(0.0001, 1.0), min_size=1, max_size=8)


@given(p=probabilities, more=st.integers(0, 5))
def test_a_member_is_rejected_exactly_where_its_p_is_within_its_level(p: dict[int, float], more: int) -> None:
    size = len(p) + more
    adjusted, level = holm(p, size), levels(p, size)
    for member, value in p.items():
        if abs(value / level[member] - 1) > 1e-9:  # at the level itself, rounding decides
            assert is_rejected(adjusted[member]) == (value <= level[member])
        assert 0.05 / size <= level[member] <= 0.05


def test_missing_members_count_as_p_1() -> None:
    assert holm({"a": 0.01, "b": 0.02}, 2) == pytest.approx({"a": 0.02, "b": 0.02})
    assert holm({"a": 0.01, "b": 0.02}, 5) == pytest.approx({"a": 0.05, "b": 0.08})


def test_a_family_smaller_than_its_members_or_a_p_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="2 comparisons in a family declared with 1"):
        holm({"a": 0.1, "b": 0.2}, 1)
    with pytest.raises(ValueError, match="expected probabilities"):
        holm({"a": 1.5}, 1)
    with pytest.raises(ValueError, match="not finite"):
        holm({"a": float("nan")}, 1)


def test_eight_pairs_are_enough_for_a_family_of_six_and_not_of_seven() -> None:
    """2 / 2^8 = 0.0078: six times that is 0.047, seven times is 0.055."""
    assert is_rejected(reachable({"a": 8}, 6)["a"])
    assert not is_rejected(reachable({"a": 8}, 7)["a"])
    assert [seeds_needed(2, 5), seeds_needed(6, 5), seeds_needed(1, 5), seeds_needed(1, 1)] == [4, 2, 8, 6]


def test_members_with_fewer_pairs_may_be_reached_at_a_later_step() -> None:
    """Holm's last step tests at 0.05: if the other nine are rejected, six pairs are enough."""
    found = reachable({**dict.fromkeys(range(9), 20), "last": 6}, 10)
    assert is_rejected(found["last"])


def test_holm_of_many_is_statsmodels() -> None:
    p = np.random.default_rng(0).uniform(size=12) ** 3
    _, theirs, *_ = multipletests(p, method="holm")
    assert list(holm(dict(enumerate(p.tolist())), 12).values()) == pytest.approx(theirs.tolist())
