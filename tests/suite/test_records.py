"""A run's files survive kills and torn writes. Checkpoints are tested in test_checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_cells import put

from suite.recipe.settings import Execution
from suite.run import journal
from suite.run.atomic import write_bytes, write_json
from suite.run.attempt import claim
from suite.run.directory import Planned, RunDir, State, planned_cells, planned_ids, read_plan, run_dirs, write_plan
from suite.run.journal import Journal
from suite.run.locks import holder, locked


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "end.json"
    write_bytes(path, b"old")

    def full_disk(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_written_for_people_and_programs(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"a": [1, None]})
    text = (tmp_path / "new" / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [1, None]}
    assert text.endswith("}\n")


def test_a_journal_reads_back_as_written(tmp_path: Path) -> None:
    book = Journal(tmp_path / "journal.jsonl", claim(tmp_path / "attempts"))
    book.append(1, {"train/loss": 0.1 + 0.2})
    book.append(2, {"train/loss": 0.25})
    book.close()
    assert journal.read_metrics(tmp_path / "journal.jsonl") == {1: {"train/loss": 0.1 + 0.2}, 2: {"train/loss": 0.25}}


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = claim(tmp_path / "attempts")
    book = Journal(path, first)
    book.append(1, {"a": 1.0})
    book.append(2, {"a": 2.0})
    book.close()
    path.write_bytes(path.read_bytes()[:-10])
    assert [record.epoch for record in journal.read(path)[0]] == [1]
    first.finish(state="preempted")
    book = Journal(path, claim(tmp_path / "attempts"))
    book.append(2, {"a": 2.5})
    book.close()
    assert journal.read_metrics(path) == {1: {"a": 1.0}, 2: {"a": 2.5}}


def test_a_journal_is_read_on_from_where_the_last_reading_stopped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    book = Journal(path, claim(tmp_path / "attempts"))
    book.append(1, {"a": 1.0})
    _, offset = journal.read(path)
    book.append(2, {"a": 2.0})
    book.close()
    assert [record.epoch for record in journal.read(path, offset)[0]] == [2]
    assert journal.read(path, journal.read(path)[1])[0] == []


def test_the_later_attempt_counts_where_an_epoch_was_trained_again(tmp_path: Path) -> None:
    for loss in (0.5, 0.4):
        attempt = claim(tmp_path / "attempts")
        book = Journal(tmp_path / "journal.jsonl", attempt)
        book.append(3, {"train/loss": loss})
        book.close()
        attempt.finish(state="preempted")
    assert journal.read_metrics(tmp_path / "journal.jsonl") == {3: {"train/loss": 0.4}}


def test_a_lock_has_one_holder_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert holder(path) is None
    with locked(path) as mine:
        assert mine
        assert holder(path) == os.getpid()
        with locked(path) as other:
            assert not other
    assert holder(path) is None


def test_a_killed_process_lets_go_of_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = f"import time, pathlib, suite.run.locks as l\nwith l.locked(pathlib.Path({str(path)!r})): time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        while holder(path) != process.pid:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert holder(path) is None


def test_a_run_directory_gives_back_its_cell_and_state(make_run: Callable[..., RunDir]) -> None:
    run = make_run()
    assert run.cell().id == run.path.name
    assert run.state() == State(state="queued"), "a run with a directory is queued"
    assert RunDir(run.path.with_name("nothing")).state() == State()
    put(run, state="failed", cause="nan", reason="step 7")
    state = RunDir(run.path).state()
    assert (state.state, state.cause, state.reason) == ("failed", "nan", "step 7")
    assert time.time() - state.heartbeat < 60


def test_a_result_means_done_whatever_the_state_file_says(make_run: Callable[..., RunDir]) -> None:
    run = make_run()
    put(run, state="running")
    write_json(run.result_path, {"top1_hard": 0.5})
    assert run.state().state == "done"


def test_a_plan_has_the_cells_of_the_last_launch_in_order_and_former_ones(make_run: Callable[..., RunDir]) -> None:
    runs = [make_run(seed=seed) for seed in range(3)]
    grid_dir = runs[0].path.parent
    assert (read_plan(grid_dir), planned_cells(grid_dir)) == ({}, {})
    second = Planned(runs[1].cell(), Execution(micro_batch_size=64), "shape", is_first=True)
    former = Planned(runs[0].cell(), is_former=True)
    write_plan(grid_dir, [second, former])
    assert list(read_plan(grid_dir).items()) == [(runs[1].path.name, second), (runs[0].path.name, former)]
    assert planned_ids(grid_dir) == list(planned_cells(grid_dir)) == [runs[1].path.name]
    assert {run.path.name for run in run_dirs(grid_dir)} == {run.path.name for run in runs}
