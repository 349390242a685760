"""The commands as a user types them, on real runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cpu_clock import timed
from tiny_cells import tiny_grid

from launch import launches
from suite.run import failures
from suite.run.directory import RunDir, read_plan

WriteGrid = Callable[..., Path]


def launch(*arguments: str | Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "150"} | ({"PATH": path} if path else {})
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def statuses(root: Path) -> dict[str, dict[str, Any]]:
    answer = launch("status", "--json", "--root", root)
    assert answer.returncode == 0, answer.stderr
    return {row["name"]: row for row in json.loads(answer.stdout)}


def _runs(root: Path, grid: str = "tiny") -> list[RunDir]:
    return [RunDir(root / grid / cell_id) for cell_id in read_plan(root / grid)]


@pytest.mark.parametrize("package", ["launch", "analysis"])
def test_help_takes_under_a_second(package: str) -> None:
    answers = [timed("-m", package, "--help") for _ in range(3)]
    assert all("Usage" in written for written, _ in answers)
    assert min(seconds for _, seconds in answers) < 1.0  # 0.5 s on an idle machine


def test_without_slurm_and_without_local_one_line_says_so(tmp_path: Path) -> None:
    answer = launch("grid", "digits", "--root", tmp_path, path="/nowhere")
    assert answer.returncode == 2
    assert answer.stderr == "no SLURM here (sbatch is not on PATH); add --local to run on this machine\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"dataset: !include x.yaml\n", ":1: dataset: the tag !include means nothing here; leave it out"),
        (b"blocks: &b [*b]\n", ":1: blocks: the alias *b is inside its own anchor"),
        (b"name: {{grid}}\n", ":1: name: {grid}: a key has to be text; text with braces or brackets needs quotes"),
        (b"name: mine\ndescription: \xe9\n", ":2: not UTF-8 text (invalid continuation byte at byte 24)"),
    ],
)
def test_a_file_that_is_no_grid_is_one_line_and_exits_2(tmp_path: Path, text: bytes, fault: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_bytes(text)
    answer = launch("grid", path, "--local", "--root", tmp_path / "runs")
    assert (answer.returncode, answer.stderr) == (2, f"{path}{fault}\n")


def test_a_bad_grid_file_is_told_line_by_line_and_exits_2(write_grid: WriteGrid, tmp_path: Path) -> None:
    path = write_grid(quantizers=["bnnpp"], models=["resnet9"], seedz=[1])
    answer = launch("grid", path, "--local", "--root", tmp_path)
    assert answer.returncode == 2
    lines = answer.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{path}:") and "did you mean" in line for line in lines)


def test_a_dry_run_counts_what_is_binary_and_what_stays_exact_by_which_name(
    write_grid: WriteGrid, tmp_path: Path
) -> None:
    kept = {"full_precision": ["ends", "layer2.*"]}
    grid = write_grid(quantization={**tiny_grid()["quantization"], **kept})
    shown = launch("grid", grid, "--dry-run", "--root", tmp_path / "runs").stdout
    weights = 2 * 16 * 16 * 9 + 32 * 64 * 9 + 64 * 64 * 9
    line = f"resnet8: {weights:,} weights in 4 layers binary; in full precision ends 2 layers, layer2.* 2 layers\n"
    assert line in shown


def test_a_dry_run_shows_the_cells_and_starts_nothing(write_grid: WriteGrid, tmp_path: Path) -> None:
    answer = launch("grid", write_grid(), "--dry-run", "--root", tmp_path / "runs")
    assert answer.returncode == 0
    assert "2 cells ready to start, " in answer.stdout
    assert " at a time on this machine; nothing was started" in answer.stdout
    assert not (tmp_path / "runs").exists()


def test_a_pattern_that_fits_no_cell_is_told(write_grid: WriteGrid, tmp_path: Path) -> None:
    answer = launch("grid", write_grid(), "--local", "--only", "resnet20", "--root", tmp_path)
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1)
    assert "--only resnet20 matches no cell" in answer.stderr


def test_missing_data_stops_the_launch_before_any_cell(write_grid: WriteGrid, tmp_path: Path) -> None:
    path = write_grid(dataset="folder/flowers")
    answer = launch("grid", path, "--local", "--root", tmp_path / "runs", "--data-dir", tmp_path)
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1)
    assert "flowers: not there, or no folder; folder/flowers is expected as" in answer.stderr
    assert not list(tmp_path.glob("runs/tiny/*/cell.yaml"))


def test_a_model_whose_inputs_have_no_sign_stops_the_launch_before_any_cell(
    write_grid: WriteGrid, tmp_path: Path
) -> None:
    answer = launch("grid", write_grid(task="bwa"), "--local", "--root", tmp_path / "runs")
    assert answer.returncode == 2
    assert "digits/resnet8/bnn++/s0/bwa: layer1.0.conv1: its inputs are never negative" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "runs").exists()


def test_debug_takes_the_first_steps_in_this_process(write_grid: WriteGrid, tmp_path: Path) -> None:
    answer = launch("debug", write_grid(), "--max-steps", "3")
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[0] == "digits/resnet8/bnn++/s0"
    assert [line.split("  ")[0] for line in lines[1:] if line.startswith("step")] == ["step 0", "step 1", "step 2"]
    assert not (tmp_path / "runs").exists()


def test_status_of_a_grid_that_was_not_launched_lists_those_that_were(tmp_path: Path) -> None:
    answer = launch("status", "digits", "--root", tmp_path)
    assert answer.returncode == 2
    assert answer.stderr == f"no grid 'digits'. {tmp_path} holds none: launch one, or name another --root\n"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(grid file, root, what the launcher printed) of a grid with finetune cells, launched once for several tests."""
    folder = tmp_path_factory.mktemp("launched")
    blocks = [{}, {"init": "finetune", "quantizers": ["bc"], "training": {"epochs": 1}}]
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_grid(blocks=blocks)), encoding="utf-8")
    answer = launch("grid", path, "--local", "--root", folder / "runs")
    assert answer.returncode == 0, answer.stderr + answer.stdout
    return path, folder / "runs", answer.stdout


@pytest.mark.slow
def test_a_launched_grid_ends_done_and_says_where_to_look(launched: tuple[Path, Path, str]) -> None:
    _, root, output = launched
    assert {name: row["state"] for name, row in statuses(root).items()} == {
        "digits/resnet8/fp/s0": "done",
        "digits/resnet8/bnn++/s0": "done",
        "digits/resnet8/bc/s0/finetune": "done",
    }
    assert f"mlflow ui --backend-store-uri 'sqlite:///{root}/mlflow.db', then http://127.0.0.1:5000/#/exp" in output
    assert "python -m analysis tables tiny" in output


@pytest.mark.slow
def test_a_finetune_cell_started_after_its_parent_was_done(launched: tuple[Path, Path, str]) -> None:
    runs = {run.cell().name: run for run in _runs(launched[1])}
    parent, child = runs["digits/resnet8/fp/s0"], runs["digits/resnet8/bc/s0/finetune"]
    assert child.cell().parent == parent.path.name
    assert child.all_attempts()[0].provenance_path.stat().st_mtime > parent.result_path.stat().st_mtime


@pytest.mark.slow
def test_a_second_launch_trains_nothing(launched: tuple[Path, Path, str]) -> None:
    path, root, _ = launched
    before = {run.path: run.result_path.stat().st_mtime for run in _runs(root)}
    answer = launch("grid", path, "--local", "--root", root)
    assert answer.returncode == 0
    assert {run.path: run.result_path.stat().st_mtime for run in _runs(root)} == before
    assert {row["attempt"] for row in statuses(root).values()} == {1}


@pytest.mark.slow
def test_the_store_and_the_table_hold_what_was_measured(launched: tuple[Path, Path, str]) -> None:
    _, root, _ = launched
    command = [sys.executable, "-m", "analysis", "tables", "tiny", "--root", str(root), "--format", "json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    shown = {entry["quantizer"]: entry["top1_hard_mean"] for entry in json.loads(answer.stdout)["entries"]}
    measured = {run.cell().quantizer: run.result() for run in _runs(root)}
    assert shown == pytest.approx({name: result["top1_hard"] for name, result in measured.items() if result})
    assert len(shown) == len(_runs(root))


@pytest.mark.slow
def test_logs_print_the_cells_own_log(launched: tuple[Path, Path, str]) -> None:
    answer = launch("logs", "bnn++/s0", "--root", launched[1])
    assert answer.returncode == 0, answer.stderr
    assert "epoch 2/2 train/loss" in answer.stdout
    assert "done test/top1_soft" in answer.stdout
    ambiguous = launch("logs", "s0", "--root", launched[1])
    assert (ambiguous.returncode, ambiguous.stderr.count("\n")) == (2, 1)
    assert "s0 matches 3 cells" in ambiguous.stderr


@pytest.mark.slow
def test_clean_deletes_old_code_and_all_checkpoints_but_the_newest(
    launched: tuple[Path, Path, str],
) -> None:
    root = launched[1]
    (root / "tiny" / "code" / "of an earlier launch").mkdir()
    newest = {run.path: [max(path.name for path in run.checkpoints.glob("*.pt"))] for run in _runs(root)}
    answer = launch("clean", "--checkpoints", "--yes", "--root", root)
    assert answer.returncode == 0, answer.stderr
    assert "MB deleted" in answer.stdout
    last = launches.last(root / "tiny")
    assert last is not None
    assert list((root / "tiny" / "code").iterdir()) == [Path(last.code)], "the last launch's stays"
    assert {run.path: [path.name for path in run.checkpoints.glob("*.pt")] for run in _runs(root)} == newest
    assert launch("clean", "--checkpoints", "--root", root).stdout == "nothing to delete\n"


@pytest.mark.long
def test_a_cell_that_fails_says_why_leaves_the_others_and_can_be_retried(write_grid: WriteGrid, tmp_path: Path) -> None:
    path = write_grid(quantizers=["fp", "bc"])
    root = tmp_path / "runs"
    diverging = ["--set", "training.optimizer=sgd", "--set", "training.learning_rate=1.0e+30"]
    answer = launch("grid", path, "--local", "--root", root, *diverging, "--only", "fp")
    assert answer.returncode == 1
    rows = statuses(root)
    assert (rows["digits/resnet8/fp/s0"]["state"], rows["digits/resnet8/fp/s0"]["cause"]) == ("failed", "nan")
    assert rows["digits/resnet8/bc/s0"]["state"] == "planned"
    assert "failed: nan: DivergedError: the loss is" in launch("status", "--root", root).stdout
    assert launch("grid", path, "--local", "--root", root, *diverging, "--only", "fp").returncode == 1
    assert statuses(root)["digits/resnet8/fp/s0"]["attempt"] == 1, "a failed cell waits for a retry"
    assert launch("retry", "fp", "--root", root).returncode == 1, "local, like the last launch"
    assert statuses(root)["digits/resnet8/fp/s0"]["attempt"] == 2
    first, *_, last = launches.launches(root / "tiny")
    assert (last.command, last.place, last.data_dir) == ("retry", "local", first.data_dir)
    assert (last.tracking_uri, last.text) == (first.tracking_uri, path.read_text(encoding="utf-8"))
    assert launch("retry", "bc", "--local", "--root", root).stderr.startswith("nothing to retry")


LITTLE_MEMORY = """
import importlib.abc, importlib.util, sys

class Patch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "suite.engines.ddp":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            import torch
            forward = module.PlainEngine._forward

            def ours(self, images, labels):
                if len(images) > 64:
                    raise torch.OutOfMemoryError("no room")
                return forward(self, images, labels)

            module.PlainEngine._forward = ours

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Patch())
"""
"""A sitecustomize: memory holds at most 64 images of a training step."""


@pytest.mark.long
def test_the_advice_after_memory_ran_out_reaches_the_run_and_helps(
    write_grid: WriteGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LITTLE_MEMORY, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    root = tmp_path / "runs"
    assert launch("grid", write_grid(quantizers=["bc"]), "--local", "--root", root).returncode == 1
    (run,) = _runs(root)
    asked = []
    while run.state().state == "failed":
        assert run.state().cause == "oom"
        program, _, advice = run.state().reason.rpartition("; ")[2].partition(": ")[2].partition(" -m launch ")
        assert program == "python"
        asked.append(advice.rpartition("=")[2])
        launch(*advice.split(), "--local", "--root", root)
    assert (asked, run.state().state) == (["128", "64"], "done")
    sizes = [attempt.facts["execution"].get("micro_batch_size") for attempt in run.all_attempts()]
    assert sizes[-1] == 64
    assert len(sizes) == run.state().attempt >= 3


@pytest.mark.slow
def test_a_cell_killed_under_the_launcher_is_started_again_and_ends_done(write_grid: WriteGrid, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    path = write_grid(quantizers=["bnn++"], training={"epochs": 12, "batch_size": 64, "learning_rate": 0.01})
    command = [sys.executable, "-m", "launch", "grid", str(path), "--local", "--root", str(root)]
    with subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    ) as launcher:
        run = _wait_for_epoch(root, 2)
        attempt = run.newest()
        assert attempt is not None
        os.kill(failures.beats(attempt.path)[0].process.pid, signal.SIGKILL)
        launcher.communicate()
    assert launcher.returncode == 0
    assert run.state().attempt == 2
    assert run.result() is not None


@pytest.mark.long
def test_ctrl_c_stops_the_cells_and_the_next_launch_goes_on(write_grid: WriteGrid, tmp_path: Path) -> None:
    # A shell makes background processes ignore Ctrl-C; a launcher would inherit that from these tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root = tmp_path / "runs"
    path = write_grid(quantizers=["bnn++"], training={"epochs": 40, "batch_size": 64, "learning_rate": 0.01})
    command = [sys.executable, "-m", "launch", "grid", str(path), "--local", "--root", str(root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as launcher:
        run = _wait_for_epoch(root, 2)
        os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does: to all foreground processes
        _, errors = launcher.communicate()
    assert launcher.returncode == 130
    assert errors == "stopped by Ctrl-C; the cells keep their progress: launch again to resume\n"
    assert not run.is_live()
    assert (run.state().state, run.state().epoch >= 2) == ("preempted", True)
    assert launch("grid", path, "--local", "--root", root).returncode == 0
    assert (run.state().state, run.state().attempt) == ("done", 2)


@pytest.mark.slow
def test_a_cancelled_cell_stops_under_its_launcher(write_grid: WriteGrid, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    path = write_grid(quantizers=["bnn++"], training={"epochs": 500, "batch_size": 64, "learning_rate": 0.01})
    command = [sys.executable, "-m", "launch", "grid", str(path), "--local", "--root", str(root)]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as launcher:
        run = _wait_for_epoch(root, 1)
        assert launch("cancel", "bnn++", "--root", root).stdout == "1 cancelled\n"
    assert launcher.returncode == 1
    assert not run.is_live()
    assert (run.state().state, run.result()) == ("cancelled", None)


@pytest.mark.long
def test_a_killed_launchers_cell_saves_and_another_launch_goes_on(write_grid: WriteGrid, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    path = write_grid(quantizers=["bnn++"], training={"epochs": 40, "batch_size": 64, "learning_rate": 0.01})
    command = [sys.executable, "-m", "launch", "grid", str(path), "--local", "--root", str(root)]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as launcher:
        run = _wait_for_epoch(root, 2)
        launcher.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while run.is_live() and time.monotonic() < deadline:
        time.sleep(0.05)
    state = statuses(root)["digits/resnet8/bnn++/s0"]
    assert (state["state"], state["cause"], state["reason"]) == ("preempted", None, "stopped by SIGTERM")
    assert launch("grid", path, "--local", "--root", root).returncode == 0
    assert (run.state().state, run.state().attempt) == ("done", 2)


def _wait_for_epoch(root: Path, epoch: int) -> RunDir:
    """The grid's only run, once it has trained that many epochs."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        runs = _runs(root)
        if runs and runs[0].state().epoch >= epoch:
            return runs[0]
        time.sleep(0.05)
    raise AssertionError(f"no run in {root} reached epoch {epoch}")
