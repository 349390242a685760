"""Tuning: the value of a budget, an honest choice, and comparisons that state how each method was tuned."""

import json
import math
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_cells import put
from tuned_grids import GOOD, LR, TUNE, by_rate, finish, launched, rows_of

from analysis.compare.table import tabulate
from analysis.render import tables, tuning
from analysis.render.style import house_style
from analysis.runs import folders, store
from analysis.runs.frame import Budget
from analysis.stats.tuning import expected_best
from launch.tuning import advance
from suite.errors import UserError
from suite.recipe.choices import Tried, best
from suite.recipe.tune import Knob, Tune
from suite.run.atomic import write_json
from suite.run.directory import RunDir
from suite.run.mlflow_replica import default_uri, sync
from suite.run.tuning import read_choices, write_choices

NOISE = 0.012
"""Standard deviation over seeds of digits' validation accuracy, a fraction: see docs/results/digits-tuned.md."""
RANGE = {"log": [0.0003, 0.03]}


def test_expected_best_is_the_mean_over_all_draws() -> None:
    """By hand, for three scores: every ordered draw with replacement is equally likely."""
    scores = [0.2, 0.9, 0.5]
    found = expected_best(scores)
    for count in (1, 2, 3):
        draws = np.array(np.meshgrid(*[scores] * count)).reshape(count, -1).max(axis=0)
        assert found.mean[count - 1] == pytest.approx(draws.mean(), abs=1e-12)
        assert found.sd[count - 1] == pytest.approx(draws.std(ddof=0), abs=1e-12)


def test_expected_best_rises_with_the_budget_and_never_passes_the_best() -> None:
    scores = np.random.default_rng(0).random(30)
    found = expected_best(scores, [1, 2, 5, 30, 10_000])
    assert found.mean[0] == pytest.approx(scores.mean(), abs=1e-12)
    assert np.all(np.diff(found.mean) > 0)
    assert found.mean[-1] == pytest.approx(scores.max(), abs=1e-9)
    with pytest.raises(ValueError, match="one finite score or more"):
        expected_best([0.5, math.nan])
    with pytest.raises(ValueError, match="one finite score or more"):
        expected_best([])


def accuracy(rate: np.ndarray | float, optimum: float) -> np.ndarray:
    """A method's true accuracy: a parabola in the logarithm of the learning rate, 0.95 at its optimum."""
    return np.asarray(0.95 - 0.08 * (np.log10(rate) - math.log10(optimum)) ** 2)


def drawn(study: int, trials: int) -> list[float]:
    tune = Tune(knobs={LR: Knob.of(LR, RANGE)}, trials=trials, seeds=(study, 10**6 + study), sampler="random")
    return [float(values[LR]) for values in tune.draw("bc", ["bc"])]


@pytest.mark.parametrize("optimum", [0.003, 0.02])
def test_the_choice_is_worth_what_dodges_formula_says(optimum: float) -> None:
    """2,000 simulated studies: the chosen trial's score against the formula on the scores' own distribution."""
    rng = np.random.default_rng(1)
    rates = 10 ** rng.uniform(math.log10(0.0003), math.log10(0.03), 200_000)
    population = accuracy(rates, optimum) + rng.normal(0, NOISE / math.sqrt(2), len(rates))
    space = {LR: Knob.of(LR, RANGE)}
    for trials in (1, 4, 12):
        scores = []
        for study in range(2000):
            outcomes = [_tried(rate, optimum, rng) for rate in drawn(study, trials)]
            index = best(outcomes, space)
            assert index is not None
            scores.append(outcomes[index].mean)
        formula = expected_best(population, [trials])
        error = np.std(scores, ddof=1) / math.sqrt(len(scores))
        assert abs(np.mean(scores) - formula.mean[0]) < 3 * error
        assert np.std(scores) == pytest.approx(formula.sd[0], rel=0.1)  # 6 standard errors of an sd over 2,000


def _tried(rate: float, optimum: float, rng: np.random.Generator) -> Tried:
    scores = accuracy(rate, optimum) + rng.normal(0, NOISE, 2)
    return Tried(values={LR: rate}, cells=("a", "b"), scores=tuple(map(float, scores)))


def test_testing_on_fresh_seeds_is_unbiased_and_the_validation_score_is_not() -> None:
    """2,000 simulated studies of 12 trials x 2 seeds, then 8 fresh seeds with the chosen values."""
    rng = np.random.default_rng(2)
    space = {LR: Knob.of(LR, RANGE)}
    tested, validated = [], []
    for study in range(2000):
        outcomes = [_tried(rate, 0.003, rng) for rate in drawn(study, 12)]
        index = best(outcomes, space)
        assert index is not None
        truth = float(accuracy(float(outcomes[index].values[LR]), 0.003))
        tested.append(np.mean(truth + rng.normal(0, NOISE, 8)) - truth)
        validated.append(outcomes[index].mean - truth)
    error = np.std(tested, ddof=1) / math.sqrt(len(tested))
    assert abs(np.mean(tested)) < 2 * error
    assert np.mean(validated) > 20 * np.std(validated, ddof=1) / math.sqrt(len(validated)), "the best of 12 flatters"


def done(grid_dir: Path) -> Path:
    """The grid's own cells, done: bnn++ 0.9, fp 0.95, slightly better with each seed."""
    finish(grid_dir, GOOD)
    advance(grid_dir)
    for row in rows_of(grid_dir):
        if not row.cell.trial:
            put(RunDir(grid_dir / row.cell.id), state="running")
            hard = {"fp": 0.95}.get(row.cell.quantizer, 0.9) + row.cell.seed / 100
            result = {"top1_hard": hard, "top1_soft": hard, "weights_sha256": row.cell.id}
            sizes = {"num_binary_parameters": 9216, "num_full_precision_parameters": 1274}
            write_json(RunDir(grid_dir / row.cell.id).result_path, {**result, **sizes})
    return grid_dir.parent


def test_tables_have_the_grids_cells_only_and_say_how_each_method_was_tuned(tmp_path: Path) -> None:
    root = done(launched(tmp_path, quantizers=["fp", "bc", "bnn++"], seeds=[0, 1]))
    results = folders.load(root, "tiny")
    assert sorted(results.frame["seed"].unique()) == [0, 1]
    assert (len(results.frame), results.doubts) == (6, ())
    assert not any("left out" in line for line in results.remarks)
    text = tables.to_markdown(tabulate(results))
    assert text.count("| 3 × 2 seeds |") == 3
    assert "tuned (trials): settings tried for each method on each model × seeds of each, 2 epochs a run." in text
    [entry] = [each for each in json.loads(tables.to_json(tabulate(results)))["entries"] if each["quantizer"] == "bc"]
    assert (entry["tuned_trials"], entry["tuned_seeds"], entry["tuned_epochs"], entry["tuned_given"]) == (3, 2, 2, "")


def test_a_store_has_the_same_cells_and_budgets(tmp_path: Path) -> None:
    root = done(launched(tmp_path))
    uri = default_uri(root)
    sync(root / "tiny", uri)
    read, stored = folders.load(root, "tiny"), store.load(uri, "tiny")
    names = ["cell_id", "quantizer", "seed", "state", "top1_hard"]
    stored.frame["top1_hard"] = read.frame["top1_hard"]  # from the journals, which these runs lack
    assert read.frame[names].equals(stored.frame[names])
    assert stored.declared["tiny"].tuning == read.declared["tiny"].tuning
    assert set(read.declared["tiny"].tuning.values()) == {Budget(3, 2, 2)}


def test_untuned_grids_have_no_column_for_it(tmp_path: Path) -> None:
    text = tables.to_markdown(tabulate(folders.load(done(launched(tmp_path, tune=None)), "tiny")))
    assert "tuned" not in text


def test_unequal_budgets_are_a_finding_and_strict_refuses_them(tmp_path: Path) -> None:
    path = tmp_path / "paper.yaml"
    choice = {"dataset": "digits", "model": "resnet8", "quantizer": "bnn++", "values": {LR: 0.01}}
    path.write_text(json.dumps({"choices": [choice]}), encoding="utf-8")
    root = done(launched(tmp_path, choices=path, quantizers=["bc", "bnn++"]))
    results = folders.load(root, "tiny")
    told = "tiny: methods were tuned with different budgets on digits/resnet8 (bc: 3 × 2 seeds, 2 epochs; bnn++: given)"
    assert results.doubts == (told,)
    assert f"tiny: values were given, not chosen by trials here (from {path})" in results.remarks
    with house_style():
        names = [picture.name for picture in tuning.pictures(results.tuning)]
    assert names == ["tuning-tiny-digits-bw-scratch-resnet8", "budget-tiny-digits-bw-scratch"]
    table = tables.to_markdown(tabulate(results))
    assert f"given: values that were not chosen by trials of this grid, but taken from {path}." in table
    answer = call(tmp_path, "tables", "tiny", "--strict")
    assert (answer.returncode, told in answer.stderr) == (2, True)


def test_full_precision_is_no_part_of_that_finding(tmp_path: Path) -> None:
    path = tmp_path / "paper.yaml"
    choice = {"dataset": "digits", "model": "resnet8", "quantizer": "fp", "values": {LR: 0.01}}
    path.write_text(json.dumps({"choices": [choice]}), encoding="utf-8")
    assert not folders.load(done(launched(tmp_path, choices=path)), "tiny").doubts


def test_a_trial_that_changed_after_the_choice_is_a_finding(tmp_path: Path) -> None:
    root = done(launched(tmp_path))
    trial = next(row for row in rows_of(root / "tiny") if row.cell.trial and row.cell.training.learning_rate == 0.001)
    write_json(RunDir(root / "tiny" / trial.cell.id).result_path, {"val_top1_hard": 0.55, "val_top1_soft": 0.5})
    [told] = folders.load(root, "tiny").doubts
    assert told == (
        "tiny: digits/resnet8/fp: 1 of 3 trials have other results than when the choice was made from them; the "
        "choice stands"
    )
    for row in rows_of(root / "tiny"):
        if row.cell.trial and row.cell.quantizer == "fp" and row.cell.training.learning_rate == 0.001:
            write_json(RunDir(root / "tiny" / row.cell.id).result_path, {"val_top1_hard": 0.99, "val_top1_soft": 0.9})
    told = f"chosen is {LR} 0.003, and by the trials' results it would be {LR} 0.001"
    assert any(told in line for line in _doubts(root))


def test_a_choice_edited_by_hand_is_a_finding(tmp_path: Path) -> None:
    root = done(launched(tmp_path))
    path = root / "tiny" / "choices.yaml"
    edited = [choice.model_copy(update={"values": {LR: 0.01}}) for choice in read_choices(path).choices]
    write_choices(path, read_choices(path).model_copy(update={"choices": tuple(edited)}))
    found = _doubts(root)
    assert "tiny: 1 cells of digits/resnet8/fp were planned with other values than choices.yaml has" in found
    assert sum("and by the trials' results it would be" in line for line in found) == 2


def _doubts(root: Path) -> tuple[str, ...]:
    return folders.load(root, "tiny").doubts


def test_edges_failures_and_open_trials_are_told(tmp_path: Path) -> None:
    ranged: dict[str, Any] = {**TUNE, LR: {"log": [0.001, 0.1]}, "trials": 4}
    grid_dir = launched(tmp_path, tune=ranged, quantizers=["bnn++"])
    rates = sorted({row.cell.training.learning_rate for row in rows_of(grid_dir)})
    assert Knob.of(LR, ranged[LR]).is_edge(rates[0])
    finish(grid_dir, by_rate({rates[0]: 0.9, rates[1]: "nan", rates[2]: 0.5, rates[3]: None}))
    _, findings = folders.load_tuning([grid_dir.parent], "tiny")
    assert findings.remarks == (
        "tiny: tuning is under way, 1 of 4 trials have not ended",
        "tiny: 1 of 4 trials failed and count as the worst (1 of digits/resnet8/bnn++)",
    )
    finish(grid_dir, lambda cell: 0.4 if cell.training.learning_rate == rates[3] else None)
    advance(grid_dir)
    tuned, findings = folders.load_tuning([grid_dir.parent], "tiny")
    assert f"tiny: 1 choice at the edge of its range: widen it (digits/resnet8/bnn++ {LR})" in findings.remarks
    row = tuning.row(tuned[0])
    assert row[:6] == ["bnn++", "4 × 2", f"learning_rate {rates[0]:g} (edge: widen it)", "90.00", "40.00 to 90.00", "1"]


def test_pictures_are_drawn_and_say_why_they_are_not(tmp_path: Path) -> None:
    grid_dir = launched(tmp_path, quantizers=["bc", "bnn++"])
    with house_style():
        empty = tuning.pictures(folders.load_tuning([grid_dir.parent])[0])
    assert [picture.caption for picture in empty] == [
        "digits: no trial of resnet8 has a score",
        "digits: no method has the scores of two trials",
    ]
    finish(grid_dir, by_rate({0.001: 0.5, 0.003: 0.8, 0.01: "nan"}))
    advance(grid_dir)
    with house_style():
        knobs, budget = tuning.pictures(folders.load_tuning([grid_dir.parent])[0])
    assert knobs.figure is not None
    assert budget.figure is not None
    panels = knobs.figure.axes
    assert [panel.get_ylabel() for panel in panels] == ["bc\nval, %", "bnn++\nval, %"]
    markers = [line.get_marker() for line in panels[0].lines]
    assert [markers.count(mark) for mark in ("D", "o", "x")] == [1, 1, 1]
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["0.001", "0.003", "0.01"]
    line = budget.figure.axes[0].lines[0]
    assert np.allclose(np.asarray(line.get_ydata()), 100 * expected_best([0.5, 0.8, 0.0]).mean)


def test_before_the_choice_there_is_no_table_but_tuning_shows_how_far_it_is(tmp_path: Path) -> None:
    grid_dir = launched(tmp_path)
    with pytest.raises(UserError, match="no cells yet, they follow from tuning: python -m analysis tuning shows that"):
        folders.load(grid_dir.parent, "tiny")
    text = tuning.to_markdown(folders.load_tuning([grid_dir.parent])[0], ())
    assert "| fp | 3 × 2 | not yet: 3 trials have not ended | — | — | 0 | — |" in text


def test_a_grid_that_tunes_nothing_says_so(tmp_path: Path) -> None:
    root = done(launched(tmp_path, tune=None))
    with pytest.raises(UserError, match="tiny: nothing is tuned"):
        folders.load_tuning([root], "tiny")


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "analysis", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=folder)


@pytest.mark.slow
def test_report_and_bundle_have_the_tuning_and_the_bundle_rebuilds_it(tmp_path: Path) -> None:
    done(launched(tmp_path, seeds=[0, 1]))
    assert call(tmp_path, "report", "tiny").returncode == 0
    page = (tmp_path / "runs" / "tiny" / "report.html").read_text(encoding="utf-8")
    for said in ('id="tuning"', "Trials of tuning", "What a smaller budget would have found", "3 × 2 seeds, 2 epochs"):
        assert said in page
    assert call(tmp_path, "bundle", "tiny").returncode == 0
    with tarfile.open(tmp_path / "tiny.tar.xz") as archive:
        archive.extractall(tmp_path / "away", filter="data")
    away = tmp_path / "away" / "tiny"
    assert call(away, "tuning", "tiny", "--root", "runs").stdout == (away / "tuning.md").read_text(encoding="utf-8")
    again = call(away, "tables", "tiny", "--root", "runs", "--details").stdout
    assert again == (away / "tables.md").read_text(encoding="utf-8")
    shown = call(tmp_path, "tuning", "tiny", "--figures", "figures")
    names = ["budget-tiny-digits-bw-scratch", "tuning-tiny-digits-bw-scratch-resnet8"]
    assert sorted(path.stem for path in (tmp_path / "figures").glob("*.png")) == names
    assert all(f"figures/{name}.pdf" in shown.stdout for name in names)
