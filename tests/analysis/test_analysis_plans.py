"""`power` tells what more seeds would find, from the runs' own spread, before they are paid for."""

from pathlib import Path

import numpy as np
import pytest
from analysis_samples import cells_of, example, frame_of

from analysis.compare import plans
from analysis.runs.frame import Results, findings
from analysis.stats.power import sign_flip_detectable, sign_flip_pairs
from suite.errors import UserError

WISH = plans.Wish(0.01, (3, 10, 20))


def _results(*groups: list[dict[str, object]]) -> Results:
    frame = frame_of(*groups)
    return Results(frame, findings(frame))


def test_each_model_has_a_plan_of_its_own_spread_and_the_block_one_of_all() -> None:
    results = _results(
        cells_of("bc", [0.5, 0.5, 0.5], model="a"),
        cells_of("bnn++", [0.5, 0.6, 0.7], model="a"),
        cells_of("bc", [0.5, 0.5, 0.5], model="b"),
        cells_of("bnn++", [0.5, 0.7, 0.9], model="b"),
    )
    found = {plan.name: plan for plan in plans.plans(results)}
    assert {name: plan.spread.sd for name, plan in found.items()} == pytest.approx(
        {"a": 0.1, "b": 0.2, "all models": (0.05 / 2) ** 0.5}
    )
    assert [(plan.num_seeds, plan.family_size) for plan in found.values()] == [(3, 2)] * 3
    assert {plan.family_size for plan in plans.plans(results, family_size=7)} == {7}


def test_failed_seeds_are_findings_and_comparisons_without_two_pairs_are_passed_over() -> None:
    frame = example()
    results = Results(frame, findings(frame))
    text = plans.to_markdown(plans.plans(results), WISH, results.findings)
    assert "- finding: " in text
    assert "failed: oom" in text
    assert "| resnet20 | 3 |" in text


def test_the_table_has_what_is_found_by_the_spread_and_by_its_bound() -> None:
    (plan,) = plans.plans(_results(cells_of("bc", [0.5, 0.5, 0.5]), cells_of("bnn++", [0.5, 0.6, 0.7])))
    found, bound = (sign_flip_detectable(10, sd) for sd in (plan.spread.sd, plan.spread.sd_high))
    needed = [sign_flip_pairs(0.01, sd) for sd in (plan.spread.sd, plan.spread.sd_high)]
    assert found is not None
    assert bound is not None
    row = next(line for line in plans.to_markdown([plan], WISH).splitlines() if line.startswith("| resnet20"))
    columns = [column.strip() for column in row.strip("|").split("|")]
    assert columns[3] == "—"
    assert columns[4] == f"{100 * found:.2f} to {100 * bound:.2f}"
    assert columns[-1] == f"{needed[0]} to {needed[1]}"


def test_without_two_seeds_that_differ_the_error_says_what_to_do() -> None:
    for ours, theirs in (
        ([0.6], [0.5]),
        ([0.6, 0.6], [0.5, 0.5]),
        ([0.9, 0.8], [0.8, 0.7]),
    ):
        with pytest.raises(UserError, match="run two, or assume a spread with --sd POINTS"):
            plans.plans(_results(cells_of("bc", theirs), cells_of("bnn++", ours)))


def test_an_assumed_spread_is_taken_as_known() -> None:
    text = plans.to_markdown([plans.assumed(0.4, 10)], plans.wish(0.3, "5,10", 0.8))
    found = sign_flip_detectable(10, 0.4, 10)
    assert f"| assumed | — | 0.40 | — | {found:.2f} | {sign_flip_pairs(0.3, 0.4, 10)} |" in text
    assert "Ranges" not in text


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


def test_the_picture_starts_where_a_test_can_reject_and_its_file_is_what_its_name_says(tmp_path: Path) -> None:
    found = plans.plans(_results(cells_of("bc", [0.5, 0.5, 0.5]), cells_of("bnn++", [0.5, 0.6, 0.7])))
    figure = plans.draw(found, WISH)
    first, value = np.asarray(figure.axes[0].lines[0].get_xydata())[0]
    assert first == 6
    expected = sign_flip_detectable(6, found[0].spread.sd)
    assert expected is not None
    assert value == pytest.approx(100 * expected)
    for name, head in (("p.png", b"\x89PNG"), ("p.pdf", b"%PDF")):
        plans.write(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(head)
    with pytest.raises(UserError, match=r"p\.jpg: expected a file\.png or a file\.pdf"):
        plans.write(figure, tmp_path / "p.jpg")
