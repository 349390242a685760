"""A launch's record, and that a launch changes nothing before all checks have passed."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_cells import put
from typer.testing import CliRunner, Result

from launch import launches, snapshot
from launch.__main__ import app
from launch.launches import Launch
from launch.worker import registry
from launch.worker.worker import finish
from quantizers.fused import native, passes
from suite.errors import UserError
from suite.recipe.grid_file import load_grid
from suite.run.directory import Planned, RunDir, planned_ids, read_plan, write_plan

WriteGrid = Callable[..., Path]
LAUNCH = Launch(
    "grid",
    "tiny.yaml",
    "name: tiny\n# see https://me:secret@host/wiki\n",
    ("training.epochs=2",),
    "slurm",
    None,
    {"partition": "gpu", "workers": 4},
    {"a": {"nodes": 1}},
    "/data",
    "http://user:pass%2Fword@mlflow:5000",
    "/code/1",
    train_options=("--checkpoint-minutes", "5"),
    argv=("launch", "grid", "--tracking-uri=http://user:pass%2Fword@mlflow:5000"),
)


# The record


def test_a_launch_comes_back_as_it_was_recorded_without_the_passwords_of_addresses(tmp_path: Path) -> None:
    assert launches.launches(tmp_path) == []
    assert launches.last(tmp_path) is None
    launches.remember(tmp_path, LAUNCH)
    second = replace(LAUNCH, command="retry", tracking_uri="sqlite:////runs/mlflow.db", text="", argv=())
    launches.remember(tmp_path, second)
    first, last = launches.launches(tmp_path)
    assert launches.last(tmp_path) == last == second
    assert first == replace(
        LAUNCH,
        text="name: tiny\n# see https://host/wiki\n",
        tracking_uri="http://mlflow:5000",
        argv=("launch", "grid", "--tracking-uri=http://mlflow:5000"),
    )
    written = (tmp_path / "launches.jsonl").read_text(encoding="utf-8")
    assert "secret" not in written
    assert "pass" not in written
    assert (first.user, first.host, first.cwd) == (LAUNCH.user, os.uname().nodename, str(Path.cwd()))


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    launches.remember(tmp_path, LAUNCH)
    path = tmp_path / "launches.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(path.read_text(encoding="utf-8")[:40])
    assert len(launches.launches(tmp_path)) == 1
    launches.remember(tmp_path, replace(LAUNCH, command="retry"))
    assert [each.command for each in launches.launches(tmp_path)] == ["grid", "retry"]


def test_what_a_newer_version_records_besides_is_no_obstacle(tmp_path: Path) -> None:
    launches.remember(tmp_path, LAUNCH)
    path = tmp_path / "launches.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"novelty": 1}) + "\n", encoding="utf-8")
    assert len(launches.launches(tmp_path)) == 1


def test_a_snapshot_has_the_cpp_that_the_optimizer_compiles(tmp_path: Path) -> None:
    code = snapshot.folder_of(tmp_path, snapshot.take(tmp_path))
    for source in (passes.MAPS, passes.PASSES, native.SOURCE):
        assert (code / source.relative_to(Path(snapshot.__file__).parents[1])).read_bytes() == source.read_bytes()


# Local launches of grids whose cells are done, so that nothing is trained


@pytest.fixture(autouse=True)
def _without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.here.sync", lambda *_: (0, ""))


def _cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def _launched(path: Path, root: Path, **states: str) -> dict[int, RunDir]:
    """The runs of the file's cells by seed, as if launched before; `s0="done"` sets the state of seed 0."""
    grid_dir = root / "tiny"
    cells = load_grid(str(path)).cells()
    write_plan(grid_dir, map(Planned, cells))
    runs = {cell.seed: RunDir.create(grid_dir / cell.id, cell) for cell in cells}
    for name, state in states.items():
        put(runs[int(name[1:])], state=state)
        if state == "done":
            runs[int(name[1:])].result_path.write_text("{}", encoding="utf-8")
    launches.remember(grid_dir, replace(LAUNCH, place="local", flags={}, resources={}, tracking_uri="sqlite:///x"))
    registry.set_limit(grid_dir, None)
    return runs


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _words(answer: Result) -> str:
    """The error message of a refused command; the main program prints a UserError and exits with 2."""
    if isinstance(answer.exception, UserError):
        return str(answer.exception)
    assert answer.exit_code == 2
    return answer.stderr


def test_a_launch_is_recorded_with_all_that_later_commands_need(write_grid: WriteGrid, tmp_path: Path) -> None:
    path, root = write_grid(quantizers=["bc"]), tmp_path / "runs"
    _launched(path, root, s0="done")
    answer = _cli("grid", path, "--local", "--root", root, "--data-dir", tmp_path / "data", "--checkpoint-minutes", 5)
    assert answer.exit_code == 0, answer.output
    last = launches.last(root / "tiny")
    assert last is not None
    assert (last.command, last.grid, last.text) == ("grid", str(path), path.read_text(encoding="utf-8"))
    assert (last.place, last.cluster, last.flags) == ("local", None, {})
    assert (last.data_dir, last.tracking_uri) == (str(tmp_path / "data"), f"sqlite:///{root}/mlflow.db")
    assert last.train_options == ("--checkpoint-minutes", "5.0")
    assert last.num_cells == 1
    assert (Path(last.code) / "launch" / "launches.py").exists()


@pytest.mark.parametrize(
    ("grid", "arguments", "words"),
    [
        ({"dataset": "folder/flowers"}, [], "flowers: not there, or no folder"),
        ({"task": "bwa"}, [], "its inputs are never negative"),
        ({}, ["--gpus-per-cell", "64"], "--gpus-per-cell 64: "),
        ({}, ["--first", "resnet20"], "--first resnet20 matches no cell"),
        ({}, ["--only", "resnet20"], "--only resnet20 matches no cell"),
        ({}, ["--keep-former", "--cancel-former"], "--keep-former and --cancel-former exclude each other"),
        ({"seeds": [1]}, [], "the former recipe has 1 unfinished cell: give --keep-former or --cancel-former"),
    ],
)
def test_nothing_changes_before_everything_has_been_checked(
    write_grid: WriteGrid, tmp_path: Path, grid: dict[str, object], arguments: list[str], words: str
) -> None:
    root = tmp_path / "runs"
    (run,) = _launched(write_grid(quantizers=["bc"]), root).values()
    before = _files(root)
    path = write_grid(**{"quantizers": ["bc"], **grid})
    answer = _cli("grid", path, "--local", "--root", root, "--data-dir", tmp_path, *arguments)
    assert words in _words(answer)
    assert _files(root) == before
    assert run.state().state == "queued"


# Cells that the grid had before it was edited


def _edited(write_grid: WriteGrid, root: Path, *arguments: object) -> tuple[dict[int, RunDir], Result]:
    """A grid of four seeds, from which 0 to 2 (done, preempted, failed) are removed."""
    runs = _launched(
        write_grid(quantizers=["bc"], seeds=[0, 1, 2, 3]), root, s0="done", s1="preempted", s2="failed", s3="done"
    )
    return runs, _cli("grid", write_grid(quantizers=["bc"], seeds=[3]), "--local", "--root", root, *arguments)


def test_former_cells_can_be_cancelled(write_grid: WriteGrid, tmp_path: Path) -> None:
    runs, answer = _edited(write_grid, tmp_path, "--cancel-former")
    assert answer.exit_code == 0, answer.output
    assert [run.state().state for run in runs.values()] == ["done", "cancelled", "failed", "done"]
    assert runs[1].state().reason == "the grid has no such cell any more"
    assert list(read_plan(tmp_path / "tiny")) == [runs[3].path.name]


@pytest.mark.slow
def test_former_cells_can_be_kept_and_are_finished(write_grid: WriteGrid, tmp_path: Path) -> None:
    runs, answer = _edited(write_grid, tmp_path, "--keep-former")
    assert answer.exit_code == 0, answer.output
    found = read_plan(tmp_path / "tiny")
    assert {cell_id: each.is_former for cell_id, each in found.items()} == {
        runs[3].path.name: False,
        runs[1].path.name: True,
    }
    assert planned_ids(tmp_path / "tiny") == [runs[3].path.name]
    assert [run.state().state for run in runs.values()] == ["done", "done", "failed", "done"]


# After the last cell


def test_the_command_on_finish_runs_once_for_each_launch_and_knows_the_grid(
    write_grid: WriteGrid, tmp_path: Path
) -> None:
    path, root, said = write_grid(quantizers=["bc"]), tmp_path / "runs", tmp_path / "said"
    _launched(path, root, s0="done")
    command = f'echo "$PROXBENCH_GRID: $PROXBENCH_SUMMARY" >> {said}'
    line = f"{root}/tiny: 1 done\n"
    assert _cli("grid", path, "--local", "--root", root, "--on-finish", command).exit_code == 0
    assert said.read_text(encoding="utf-8") == line
    finish(root / "tiny")
    assert said.read_text(encoding="utf-8") == line
    assert _cli("grid", path, "--local", "--root", root, "--on-finish", command).exit_code == 0
    assert said.read_text(encoding="utf-8") == 2 * line


def test_the_command_on_finish_waits_for_the_last_cell(write_grid: WriteGrid, tmp_path: Path) -> None:
    runs = _launched(write_grid(quantizers=["bc"], seeds=[0, 1]), tmp_path, s0="done")
    grid_dir, said = tmp_path / "tiny", tmp_path / "said"
    launches.remember(grid_dir, replace(LAUNCH, on_finish=f"touch {said}"))
    finish(grid_dir)
    attempt = runs[1].claim()
    finish(grid_dir)
    assert not said.exists()
    attempt.finish(state="failed", cause="nan")
    finish(grid_dir)
    assert said.exists()


# Maintenance of a grid


def test_cancelling_everything_needs_yes_where_nobody_can_be_asked(write_grid: WriteGrid, tmp_path: Path) -> None:
    runs = _launched(write_grid(quantizers=["bc"], seeds=[0, 1, 2]), tmp_path, s0="done", s1="preempted")
    before = _files(tmp_path)
    answer = _cli("cancel", "--root", tmp_path)
    assert "this cancels all 2 unfinished cells of tiny: give --yes, or name cells" in _words(answer)
    assert _files(tmp_path) == before
    assert _cli("cancel", "*/s1", "--root", tmp_path).stdout == "1 cancelled\n"
    assert [run.state().state for run in runs.values()] == ["done", "cancelled", "queued"]
    assert _cli("cancel", "--yes", "--root", tmp_path).stdout == "1 cancelled\n"
    assert "nothing to cancel" in _words(_cli("cancel", "--yes", "--root", tmp_path))


def test_status_of_a_cell_lists_its_attempts(write_grid: WriteGrid, tmp_path: Path) -> None:
    runs = _launched(write_grid(quantizers=["bc"], seeds=[0, 1]), tmp_path, s1="preempted")
    for arguments in (("tiny", "bc/s1"), ("bc/s1",), (runs[1].path.name,)):
        answer = _cli("status", *arguments, "--root", tmp_path)
        assert answer.exit_code == 0, answer.output
        assert answer.stdout.startswith(f"digits/resnet8/bc/s1 ({runs[1].path.name}) preempted, epoch 0 of 2")
        assert "bc/s0" not in answer.stdout
    assert "fp matches no cell" in _words(_cli("status", "tiny", "fp", "--root", tmp_path))


def test_the_last_lines_of_a_log(write_grid: WriteGrid, tmp_path: Path) -> None:
    runs = _launched(write_grid(quantizers=["bc"], seeds=[0, 1]), tmp_path, s1="preempted")
    (runs[1].attempts / "0001" / "log.txt").write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    assert _cli("logs", "*/s1", "--root", tmp_path).stdout == "one\ntwo\n\nthree\n"
    assert _cli("logs", "*/s1", "-n", 2, "--root", tmp_path).stdout == "two\nthree\n"
    (runs[1].attempts / "0001" / "log.txt").write_text("a long line\n" * 5000, encoding="utf-8")
    assert _cli("logs", "*/s1", "-n", 4000, "--root", tmp_path).stdout == "a long line\n" * 4000
    assert _words(_cli("logs", "*/s0", "--root", tmp_path)) == ("digits/resnet8/bc/s0 has no log yet: it is queued\n")
    (tmp_path / "tiny" / "jobs" / "a").mkdir(parents=True)
    (tmp_path / "tiny" / "jobs" / "a" / "7_0_0_log.out").write_text("no such container\n", encoding="utf-8")
    assert _cli("logs", "*/s0", "--root", tmp_path).stdout == "no such container\n"


def test_scale_sets_the_limit_that_live_workers_obey(write_grid: WriteGrid, tmp_path: Path) -> None:
    _launched(write_grid(quantizers=["bc"]), tmp_path)
    assert _cli("scale", 2, "--root", tmp_path).stdout == "at most 2 workers (before: no limit); 0 submitted\n"
    assert registry.limit(tmp_path / "tiny") == 2
    assert _cli("scale", 0, "--root", tmp_path).stdout == "at most 0 workers (before: 2); 0 submitted\n"


@pytest.mark.slow
def test_sync_goes_to_the_store_of_the_last_launch(write_grid: WriteGrid, tmp_path: Path) -> None:
    _launched(write_grid(quantizers=["bc"]), tmp_path)
    store = tmp_path / "elsewhere.db"
    launches.remember(tmp_path / "tiny", replace(LAUNCH, tracking_uri=f"sqlite:///{store}"))
    answer = _cli("sync", "--root", tmp_path)
    assert answer.stdout.startswith("1 runs changed; view: "), answer.output
    assert store.exists()
    assert not (tmp_path / "mlflow.db").exists()
