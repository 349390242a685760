from pathlib import Path

import pandas as pd
import pytest
from analysis_samples import cells_of, example, frame_of, results_of

from analysis.runs import looks
from analysis.runs.frame import findings, natural_key, one_per_cell, results, validate


def test_models_sort_by_their_numbers() -> None:
    assert sorted(["resnet110", "vit", "resnet20", "resnet56"], key=natural_key) == [
        "resnet20",
        "resnet56",
        "resnet110",
        "vit",
    ]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (example().frame.drop(columns="cause"), "columns are"),
        (example().frame.astype({"seed": "float64"}), "column seed is float64; the schema says int64"),
        (
            example().frame.assign(top1_soft=97.1),
            r"top1_soft of digits/resnet20/\w+/s0 is 97\.1; accuracies are fractions",
        ),
    ],
    ids=["columns", "dtype", "percent"],
)
def test_a_frame_that_breaks_the_schema_is_refused(broken: pd.DataFrame, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(broken)


def test_a_complete_grid_has_no_findings() -> None:
    assert findings(frame_of(cells_of("bc", [0.5, 0.6]), cells_of("bnn++", [0.6, 0.7]))) == ()


def test_cells_that_are_not_done_are_named_with_their_cause() -> None:
    assert findings(frame_of(cells_of("bc", [0.5, "failed: oom", "queued", "failed: oom"]))) == (
        "2 of 4 cells failed: oom (digits/resnet20/bc/s1, digits/resnet20/bc/s3)",
        "1 of 4 cells queued (digits/resnet20/bc/s2)",
    )


def test_a_finding_stays_one_short_line_for_a_large_grid() -> None:
    (finding,) = findings(frame_of(cells_of("bc", ["planned"] * 10_000)))
    assert finding.startswith("10000 of 10000 cells planned (digits/resnet20/bc/s0, ")
    assert finding.endswith("s4 and 9995 more)")


def test_of_duplicate_runs_the_newest_done_one_counts_and_disagreement_is_told() -> None:
    runs = frame_of(cells_of("bc", [0.5]), cells_of("bc", [0.6]), cells_of("bc", ["running"]))
    assert one_per_cell(runs)["top1_hard"].tolist() == [0.6]
    (finding,) = findings(runs)
    assert finding == "digits/resnet20/bc/s0 has 2 done runs that disagree on top1_hard (0.5, 0.6); 0.6 is used"


def test_two_runs_with_one_result_are_no_finding() -> None:
    """As after merging two roots that have the whole plan each, but trained different cells."""
    assert findings(frame_of(cells_of("bc", ["queued", 0.6]), cells_of("bc", [0.5, 0.6]))) == ()


def test_two_versions_of_a_users_module_are_found_within_a_quantizer_and_not_across() -> None:
    old, new = (cells_of("mine:PAIR", [0.5], users_digest=digest, recipe_id="r") for digest in ("a", "b"))
    (found,) = findings(frame_of(old, [{**new[0], "seed": 1, "cell_id": "another"}]))
    assert found == "digits: done cells of mine:PAIR come from 2 versions of the user's own module"
    assert findings(frame_of(old, cells_of("mine:OTHER", [0.5], users_digest="b"))) == ()


def test_one_cell_in_two_grids_is_no_duplicate() -> None:
    runs = frame_of(cells_of("bc", [0.5]), cells_of("bc", [0.5], grid="again"))
    assert findings(runs) == ()
    assert len(one_per_cell(runs)) == 2


def test_mixed_recipes_are_found_within_a_quantizer_and_not_across() -> None:
    (finding,) = findings(frame_of(cells_of("bc", [0.5, 0.6], recipe_id="a"), cells_of("bc", [0.7], recipe_id="b")))
    assert finding.startswith("cells of 2 recipes (a, b) instead of one, so no mean is shown: digits/resnet20/bc/s0, ")
    assert findings(frame_of(cells_of("bc", [0.5], recipe_id="a"), cells_of("pc", [0.7], recipe_id="b"))) == ()


def test_two_cells_of_one_recipe_and_seed_are_found() -> None:
    other_parent = [{**cell, "cell_id": "another"} for cell in cells_of("bc", [0.7])]
    (finding,) = findings(frame_of(cells_of("bc", [0.5]), other_parent))
    assert finding.startswith("several cells of the same recipe and seed")


def test_mixed_versions_of_the_code_are_found_among_done_cells() -> None:
    edited = cells_of("pc", [0.7], code_digest="ed17")
    runs = frame_of(cells_of("bc", [0.5, 0.6]), edited, cells_of("fp", ["queued"]))
    (found,) = (line for line in findings(runs) if "versions of the code" in line)
    assert found.endswith(" 2 versions of the code: c0de (2 cells, commit c0ffee), ed17 (1 cells, commit c0ffee)")


def test_a_commit_that_changes_nothing_that_ran_is_no_finding() -> None:
    assert findings(frame_of(cells_of("bc", [0.5]), cells_of("pc", [0.7], git_commit="readme"))) == ()


def test_several_devices_or_thread_counts_are_remarks_and_no_doubts() -> None:
    found = results_of(cells_of("bc", [0.5]), cells_of("pc", [0.7], device="V100", num_threads="4"))
    assert found.doubts == ()
    assert found.remarks == (
        "digits: done cells ran with 2 kinds of device: cpu (1 cells), V100 (1 cells)",
        "digits: done cells ran with 2 numbers of threads: 1 (1 cells), 4 (1 cells)",
    )


def declaration(primary: str = "bnn++", margin: float | None = 0.5, names: str = "bc pc bnn++") -> dict[str, object]:
    settings = [["digits", "bw", "scratch", "resnet20", name, [0, 1]] for name in names.split()]
    return {"primary": primary, "margin_points": margin, "settings": settings}


def test_the_first_declaration_is_kept_and_what_later_launches_changed_is_a_doubt() -> None:
    later = [declaration(), declaration("bc", 2.0, "bc bnn++")]
    found = results(cells_of("bc", [0.5, 0.6]), launches={"digits": later})
    assert (found.declared["digits"].primary, found.declared["digits"].margin_points) == ("bnn++", 0.5)
    assert len(found.declared["digits"].settings) == 6
    changed = "; ".join(found.doubts)
    assert "the first launch declared the comparison of bnn++, the last one of bc; the first is kept" in changed
    assert "a margin of 0.5, the last one of 2.0 points" in changed
    assert "quantizers that the last one no longer has (pc)" in changed
    grown = results(cells_of("bc", [0.5]), launches={"digits": [declaration(), declaration(names="bc pc bnn++ bnn")]})
    assert grown.doubts == ()


def test_looks_at_incomplete_results_are_recorded_once_and_told(tmp_path: Path) -> None:
    grid_dir = tmp_path / "digits"
    grid_dir.mkdir()
    for done in (["a"], ["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c"]):
        looks.record(grid_dir, done, 3, "tables")
    assert len((grid_dir / "looks.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert looks.remark(grid_dir, ["a", "b", "c"]).startswith(
        "digits: results were looked at 2 times before all 3 cells were done (1, 2 "
    )
    other = tmp_path / "other"
    other.mkdir()
    looks.record(other, ["a"], 1, "report")
    assert looks.remark(other, []) == ""
    assert looks.remark(grid_dir, ["a", "b"]).startswith("digits: results were looked at 1 time before")
    looks.record(tmp_path / "absent", ["a"], 2, "report")  # does nothing if the folder cannot be written


def test_findings_name_cells_as_the_launcher_does() -> None:
    (finding,) = findings(frame_of(cells_of("bnn++", ["queued"], init="finetune")))
    assert finding == "1 of 1 cells queued (digits/resnet20/bnn++/s0/finetune)"


def test_a_seed_that_only_other_quantizers_have_is_found() -> None:
    frame = frame_of(cells_of("bc", [0.5], init="finetune"), cells_of("bnn++", [0.6, 0.7], init="finetune"))
    assert findings(frame) == ("digits/resnet20/bc/finetune has no cell for 1 of 2 seeds (1)",)
    assert findings(frame_of(cells_of("bc", [0.5], model="vit"), cells_of("bnn++", [0.6, 0.7]))) == ()


def test_a_done_cell_without_accuracy_is_found() -> None:
    unmeasured = frame_of(cells_of("bc", [0.5, float("nan")]))
    assert findings(unmeasured) == ("done without test/top1_hard in the store: digits/resnet20/bc/s1",)
