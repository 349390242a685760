import pandas as pd
import pytest
from analysis_samples import cells_of, example, frame_of

from analysis.runs.frame import findings, natural_key, one_per_cell, validate


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
        (example().drop(columns="cause"), "columns are"),
        (example().astype({"seed": "float64"}), "column seed is float64; the schema says int64"),
        (example().assign(top1_soft=97.1), "top1_soft of digits/resnet20/fp/s0 is 97.1; accuracies are fractions"),
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
    assert finding.startswith("digits/resnet20/bc/s0 has 3 runs in the store that disagree on top1_hard (0.5, 0.6)")
    assert finding.endswith("; the newest done one is used")


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
    runs = frame_of(cells_of("bc", [0.5, 0.6]), cells_of("pc", [0.7], git_commit="decaf"), cells_of("fp", ["queued"]))
    assert findings(runs)[0] == "digits: done cells come from 2 versions of the code: c0ffee (2), decaf (1)"


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
