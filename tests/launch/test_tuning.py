"""Trials, then a choice, then the cells that follow from it: each step happens once, even with repeated calls."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tuned_grids import FINETUNE, GOOD, LR, TUNE, by_rate, finish, grid_file, launched, rows_of

from launch.__main__ import app
from launch.plan import Standing, choosable, hopeless, is_over, ready
from launch.preflight import LaunchError
from launch.tuning import advance, start_choices
from launch.view import problems
from launch.worker.slots import Slot
from launch.worker.worker import finish as end_of_worker
from suite.recipe.cell import Cell
from suite.recipe.choices import ChoicesError
from suite.recipe.grid_file import load_grid
from suite.run.atomic import read_json, write_json
from suite.run.directory import Planned, RunDir, State, StateName
from suite.run.tuning import read_choices


def own_cells(grid_dir: Path) -> list[Standing]:
    return [row for row in rows_of(grid_dir) if not row.cell.trial]


def test_the_cells_follow_once_the_last_trial_has_ended(tmp_path: Path) -> None:
    grid_dir = launched(tmp_path, seeds=[0, 1])
    assert len(rows_of(grid_dir)) == 12
    assert advance(grid_dir) == 0
    finish(grid_dir, lambda cell: None if cell.seed == 1001 and cell.quantizer == "fp" else GOOD(cell))
    assert choosable(rows_of(grid_dir)) == {"digits/resnet8/bnn++"}
    assert advance(grid_dir) == 2
    assert {row.cell.quantizer for row in own_cells(grid_dir)} == {"bnn++"}
    assert not is_over(rows_of(grid_dir))
    finish(grid_dir, GOOD)
    assert advance(grid_dir) == 2
    assert advance(grid_dir) == 0
    own = own_cells(grid_dir)
    assert [row.cell.training.learning_rate for row in own] == [0.003] * 4
    assert [row.state.state for row in own] == ["queued"] * 4
    assert all(row.planned.is_later for row in own)
    choice = read_choices(grid_dir / "choices.yaml").choices[0]
    cells = [RunDir(grid_dir / trial.cells[0]).cell() for trial in choice.trials]
    assert [trial.scores for trial in choice.trials] == [(score, score) for score in map(GOOD, cells)]


def test_two_at_once_and_a_killed_one_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill between the choice and the plan, the next call plans; planning twice gives the same plan."""
    grid_dir = launched(tmp_path)
    finish(grid_dir, GOOD)
    with monkeypatch.context() as patch:
        patch.setattr("launch.tuning.write_plan", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            advance(grid_dir)
    first = (grid_dir / "choices.yaml").read_bytes()
    assert choosable(rows_of(grid_dir)), "not planned yet, so the next worker will do it"
    assert advance(grid_dir) == 2
    plan = (grid_dir / "plan.json").read_bytes()
    (grid_dir / "choices.yaml").unlink()
    assert advance(grid_dir) == 0
    assert ((grid_dir / "choices.yaml").read_bytes(), (grid_dir / "plan.json").read_bytes()) == (first, plan)


def test_a_choice_that_cannot_be_made_ends_no_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid_dir = launched(tmp_path)
    finish(grid_dir, GOOD)
    (grid_dir / "choices.yaml").write_text("choices: 7\n", encoding="utf-8")
    end_of_worker(grid_dir)
    assert f"no choice could be made: {grid_dir / 'choices.yaml'}:1: choices: " in capsys.readouterr().err
    (grid_dir / "choices.yaml").unlink()
    end_of_worker(grid_dir)
    assert len(own_cells(grid_dir)) == 2


def test_a_choice_stands_whatever_its_trials_become(tmp_path: Path) -> None:
    grid_dir = launched(tmp_path)
    finish(grid_dir, GOOD)
    advance(grid_dir)
    before = (grid_dir / "choices.yaml").read_bytes()
    for row in rows_of(grid_dir):
        if row.cell.trial:
            write_json(
                RunDir(grid_dir / row.cell.id).result_path, {"val_top1_hard": 1 - row.cell.training.learning_rate}
            )
    assert advance(grid_dir) == 0
    assert (grid_dir / "choices.yaml").read_bytes() == before


def test_failed_trials_count_as_worst_and_without_any_other_nothing_follows(tmp_path: Path) -> None:
    grid_dir = launched(tmp_path)
    without_best = by_rate({0.001: 0.5, 0.003: "nan", 0.01: 0.7})
    finish(grid_dir, lambda cell: "nan" if cell.quantizer == "fp" else without_best(cell))
    rows = rows_of(grid_dir)
    assert (choosable(rows), hopeless(rows)) == ({"digits/resnet8/bnn++"}, {"digits/resnet8/fp"})
    assert any("digits/resnet8/fp: no trial succeeded, so no values are chosen" in line for line in problems(rows))
    assert advance(grid_dir) == 1
    assert [row.cell.training.learning_rate for row in own_cells(grid_dir)] == [0.01]
    rows = [replace(row, state=State("done")) if not row.cell.trial else row for row in rows_of(grid_dir)]
    assert is_over(rows)


def test_a_trial_that_only_some_seeds_finished_is_no_choice(tmp_path: Path) -> None:
    grid_dir = launched(tmp_path)
    finish(grid_dir, lambda cell: "nan" if cell.seed == 1001 else GOOD(cell))
    assert hopeless(rows_of(grid_dir)) == {"digits/resnet8/fp", "digits/resnet8/bnn++"}
    assert advance(grid_dir) == 0


def test_finetune_trials_come_after_full_precisions_choice(tmp_path: Path) -> None:
    grid_dir = launched(tmp_path, blocks=FINETUNE, tune={**TUNE, "epochs": 1})
    finish(grid_dir, GOOD)
    assert advance(grid_dir) == 10, "two own cells, two parents of the trials, six trials"
    rows = rows_of(grid_dir)
    parents = [row for row in rows if row.cell.trial and not row.planned.tuned]
    assert [(row.cell.quantizer, row.cell.seed, row.cell.training.epochs) for row in parents] == [
        ("fp", 1000, 2),
        ("fp", 1001, 2),
    ]
    startable = [row.cell for row in ready(rows)]
    assert not any(cell.init == "finetune" for cell in startable)
    assert [cell.trial for cell in startable] == [True, True, False, False], "trials come first"
    finish(grid_dir, lambda cell: 0.9 if cell.quantizer == "fp" else GOOD(cell))
    assert advance(grid_dir) == 1
    assert [row.cell.init for row in own_cells(grid_dir)] == ["scratch", "scratch", "finetune"]


@pytest.mark.parametrize(
    ("only", "trials", "own"),
    [(("*/s0",), 12, 2), (("bnn++/s1",), 6, 1), (("fp",), 6, 2)],
)
def test_patterns_choose_trials_by_the_cells_that_follow(
    tmp_path: Path, only: tuple[str, ...], trials: int, own: int
) -> None:
    grid_dir = launched(tmp_path, only=only, seeds=[0, 1])
    assert sum(row.state.state == "queued" for row in rows_of(grid_dir)) == trials
    finish(grid_dir, lambda cell: GOOD(cell) if (grid_dir / cell.id).exists() else None)
    advance(grid_dir)
    assert sum(row.state.state == "queued" for row in own_cells(grid_dir)) == own


def test_only_tune_plans_the_cells_and_asks_for_none(tmp_path: Path) -> None:
    grid_dir = launched(tmp_path, only_tune=True, blocks=FINETUNE, tune={**TUNE, "epochs": 1})
    finish(grid_dir, GOOD)
    assert advance(grid_dir) == 10
    finish(grid_dir, lambda cell: 0.9 if cell.quantizer == "fp" else GOOD(cell))
    advance(grid_dir)
    assert [row.state.state for row in own_cells(grid_dir)] == ["planned"] * 3
    assert is_over(rows_of(grid_dir))


@pytest.mark.parametrize("state", ["running", "queued", "preempted"])
def test_a_grid_is_not_over_before_its_choices(make_cell: Callable[..., Cell], state: StateName) -> None:
    trial = make_cell(trial=True)
    rows = [Standing(Planned(trial, tuned="x"), State(state))]
    assert not is_over(rows)
    assert not is_over([Standing(Planned(trial, tuned="x"), State("done"))])
    assert is_over([Standing(Planned(trial, tuned="x", is_former=True), State("done"))])


def given(folder: Path, **values: object) -> Path:
    path = folder / "from-a-paper.yaml"
    choice = {"dataset": "digits", "model": "resnet8", "quantizer": "bnn++", "values": {LR: 0.5}, **values}
    path.write_text(yaml.safe_dump({"choices": [choice]}), encoding="utf-8")
    return path


def test_a_given_choice_needs_no_trials_and_is_recorded_as_given(tmp_path: Path) -> None:
    grid = load_grid(str(grid_file(tmp_path)))
    path = given(tmp_path)
    choices = start_choices(tmp_path / "runs" / "tiny", grid, path)
    resolved = grid.resolve(choices)
    assert [(cell.quantizer, cell.trial) for cell in resolved.cells] == [("fp", True)] * 6 + [("bnn++", False)]
    assert resolved.cells[-1].training.learning_rate == 0.5
    assert choices.choices[0].given == str(path)
    budgets = {entry[4]: entry[5:] for entry in grid.declared(choices)["tuning"]}
    assert budgets == {"fp": [3, 2, 2, ""], "bnn++": [0, 0, None, str(path)]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "resnet20"}, "no choice for any setting that tiny tunes (digits/resnet8/bnn++, digits/resnet8/fp)"),
        (None, "no such file, and no bundled choices of that name"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, values: dict[str, object] | None, message: str) -> None:
    grid = load_grid(str(grid_file(tmp_path)))
    path = tmp_path / "nowhere.yaml" if values is None else given(tmp_path, **values)
    with pytest.raises(ChoicesError) as caught:
        start_choices(tmp_path / "runs" / "tiny", grid, path)
    assert str(caught.value).removeprefix("--choices ") == f"{path}: {message}"


def test_choices_copied_from_elsewhere_are_given_and_those_of_other_trials_refused(tmp_path: Path) -> None:
    grid_dir = launched(tmp_path)
    finish(grid_dir, GOOD)
    advance(grid_dir)
    text = (grid_dir / "choices.yaml").read_text(encoding="utf-8")
    grid = load_grid(str(grid_file(tmp_path)))
    assert not any(choice.is_given for choice in start_choices(grid_dir, grid, None).choices)
    other = load_grid(str(grid_file(tmp_path, tune={**TUNE, LR: [0.001, 0.003, 0.02]})))
    with pytest.raises(ChoicesError, match=r"comes from other trials than the grid now has: delete .* to tune again"):
        start_choices(grid_dir, other, None)
    kept = start_choices(grid_dir, grid, grid_dir / "choices.yaml")
    assert {choice.given for choice in kept.choices} == {str(grid_dir / "choices.yaml")}
    elsewhere = tmp_path / "elsewhere" / "tiny"
    elsewhere.mkdir(parents=True)
    (elsewhere / "choices.yaml").write_text(text, encoding="utf-8")
    copied = start_choices(elsewhere, grid, None)
    assert {choice.given for choice in copied.choices} == {"choices.yaml, from trials elsewhere"}
    assert not grid.resolve(copied).trials


def launch(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *map(str, arguments), "--root", str(folder / "runs")]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL)


@pytest.mark.long
def test_one_launch_runs_trials_choice_and_cells_and_the_next_has_nothing_to_do(tmp_path: Path) -> None:
    path = grid_file(tmp_path, quantizers=["bnn++"], tune={LR: [0.001, 0.003], "trials": 2, "seeds": [1000]})
    shown = launch(tmp_path, "grid", path, "--local", "--dry-run")
    assert "and 1 more with the values that trials choose" in shown.stdout
    first = launch(tmp_path, "grid", path, "--local", "--only-tune")
    assert first.returncode == 0, first.stderr
    assert "python -m analysis tuning tiny" in first.stdout
    assert "python -m analysis tables" not in first.stdout
    grid_dir = tmp_path / "runs" / "tiny"
    results = {path: path.read_bytes() for path in grid_dir.glob("*/result.json")}
    assert len(results) == 2
    second = launch(tmp_path, "grid", path, "--local")
    assert second.returncode == 0, second.stderr
    assert {path: path.read_bytes() for path in results} == results
    [own] = own_cells(grid_dir)
    assert own.state.state == "done"
    assert "top1_hard" in read_json(grid_dir / own.cell.id / "result.json")
    third = launch(tmp_path, "grid", path, "--local")
    assert (third.returncode, "3 done" in third.stdout) == (0, True)
    status = launch(tmp_path, "status", "tiny", "--json")
    assert sum("trial" in each["name"] for each in json.loads(status.stdout)) == 2


@pytest.mark.slow
def test_options_for_tuning_are_refused_where_nothing_is_tuned(tmp_path: Path) -> None:
    path = grid_file(tmp_path, tune=None)
    for option in (["--only-tune"], ["--choices", "x.yaml"]):
        answer = launch(tmp_path, "grid", path, "--local", *option)
        assert answer.returncode == 2
        assert answer.stderr == f"{option[0]}: {path} has no tune block; omit {option[0]}, or add one\n"


def test_a_launch_on_gpus_says_what_trials_cost_before_it_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.start.slots_here", lambda _: [Slot(("0",), 1, 1)])
    monkeypatch.setattr("launch.start.preflight", lambda *_: None)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(LaunchError, match="that exceeds --confirm-gpu-hours 100: confirm with --yes"):
        app(["grid", "imagenet", "--local", "--root", str(tmp_path)], standalone_mode=False)
    told = capsys.readouterr().out
    assert "imagenet: an estimated 13,407 GPU-hours of an A100" in told
    assert "3,167 of them for trials: --set tune=null skips them, --choices FILE uses existing choices" in told
    assert not (tmp_path / "imagenet" / "plan.json").exists()


@pytest.mark.long
def test_a_killed_launcher_changes_neither_choices_nor_results() -> None:
    """For twenty kills, run `python benchmarks/tuned_kills.py`."""
    program = Path(__file__).parents[2] / "benchmarks" / "tuned_kills.py"
    done = subprocess.run(
        [sys.executable, str(program), "--kills", "2"], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bar: choices, cells and results that differ <= 0: 0, met" in done.stdout
