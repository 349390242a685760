"""`power` predicts what more seeds would detect, from the spread of the runs, before they are trained."""

import pytest
from analysis_samples import cells_of, example, results_of

from analysis.compare import plans
from analysis.compare.table import tabulate
from analysis.stats.power import detectable, seeds_for
from suite.errors import UserError

WISH = plans.Wish(0.01, (3, 10, 20))


def plan_of(*groups: list[dict[str, object]]) -> plans.Plan:
    (found,) = plans.plans(tabulate(results_of(*groups)))
    return found


def test_a_heading_has_one_plan_with_the_spread_pooled_over_models() -> None:
    found = plan_of(
        cells_of("bc", [0.5, 0.5, 0.5], model="a"),
        cells_of("bnn++", [0.5, 0.6, 0.7], model="a"),
        cells_of("bc", [0.5, 0.5, 0.5], model="b"),
        cells_of("bnn++", [0.5, 0.7, 0.9], model="b"),
    )
    assert found.spread.sd == pytest.approx((0.05 / 2) ** 0.5)
    assert (found.num_models, found.num_seeds, found.family_size) == (2, 3, 1)


def test_failed_seeds_are_findings_and_comparisons_without_two_pairs_are_passed_over() -> None:
    results = example()
    text = plans.to_markdown(plans.plans(tabulate(results)), WISH, results.findings)
    assert "- finding: " in text
    assert "failed: oom" in text
    assert "| digits | 2 | 3 |" in text


def test_the_table_has_what_is_found_by_the_spread_and_by_its_bound_and_no_mean() -> None:
    plan = plan_of(cells_of("bc", [0.5, 0.5, 0.5]), cells_of("bnn++", [0.5, 0.6, 0.7]))
    found, bound = (detectable(1, 10, sd) for sd in (plan.spread.sd, plan.spread.sd_high))
    needed = [seeds_for(1, 0.01, sd) for sd in (plan.spread.sd, plan.spread.sd_high)]
    assert found is not None
    assert bound is not None
    text = plans.to_markdown([plan], WISH)
    row = next(line for line in text.splitlines() if line.startswith("| digits"))
    columns = [column.strip() for column in row.strip("|").split("|")]
    assert columns[4] == "—"
    assert columns[5] == f"{100 * found:.2f} to {100 * bound:.2f}"
    assert columns[-1] == " to ".join(dict.fromkeys("over 200" if n is None else str(n) for n in needed))
    assert "leaves the error rate of the later test as it is" in text


def test_without_two_seeds_that_differ_the_error_says_what_to_do() -> None:
    for ours, theirs in (
        ([0.6], [0.5]),
        ([0.6, 0.6], [0.5, 0.5]),
        ([0.9, 0.8], [0.8, 0.7]),
    ):
        with pytest.raises(UserError, match="run two, or assume a spread with --sd POINTS"):
            plan_of(cells_of("bc", theirs), cells_of("bnn++", ours))


def test_an_assumed_spread_is_taken_as_known() -> None:
    text = plans.to_markdown([plans.assumed(0.4, 2, 5)], plans.wish(0.3, "3,5", 0.8))
    found = detectable(2, 5, 0.4, 5)
    assert f"| Before any run | 2 | — | 0.40 | — | {found:.2f} | {seeds_for(2, 0.3, 0.4, 5)} |" in text
    assert "Ranges" not in text
    assert "Fewest seeds: 4 for 2 models and 5 comparisons." in text


@pytest.mark.parametrize(
    ("points", "seeds", "chance", "message"),
    [
        (1.0, "3,x", 0.8, "--seeds '3,x': expected numbers from 2 on"),
        (1.0, "1", 0.8, "--seeds '1'"),
        (1.0, "3", 1.0, "--power 1: expected a chance"),
        (0.0, "3", 0.8, "--difference 0: expected percentage points"),
        (float("nan"), "3", 0.8, "--difference nan"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(points: float, seeds: str, chance: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plans.wish(points, seeds, chance)
