"""What a run writes survives being killed, torn, damaged or attacked."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from suite import checkpoint, journal
from suite.files import write_bytes, write_json
from suite.journal import Journal
from suite.locks import holder, locked
from suite.rundir import RunDir, State, read_plan, run_dirs, write_plan

CPU = torch.device("cpu")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
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
    book = Journal(tmp_path / "journal.jsonl", attempt=1)
    book.append(1, {"train/loss": 0.1 + 0.2})
    book.append(2, {"train/loss": 0.25})
    book.close()
    assert journal.read_metrics(tmp_path / "journal.jsonl") == {1: {"train/loss": 0.1 + 0.2}, 2: {"train/loss": 0.25}}


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    book = Journal(path, attempt=1)
    book.append(1, {"a": 1.0})
    book.append(2, {"a": 2.0})
    book.close()
    path.write_bytes(path.read_bytes()[:-10])
    assert [record.epoch for record in journal.read(path)[0]] == [1]
    book = Journal(path, attempt=2)
    book.append(2, {"a": 2.5})
    book.close()
    assert journal.read_metrics(path) == {1: {"a": 1.0}, 2: {"a": 2.5}}


def test_a_journal_is_read_on_from_where_the_last_reading_stopped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    book = Journal(path, attempt=1)
    book.append(1, {"a": 1.0})
    _, offset = journal.read(path)
    book.append(2, {"a": 2.0})
    book.close()
    assert [record.epoch for record in journal.read(path, offset)[0]] == [2]
    assert journal.read(path, journal.read(path)[1])[0] == []


def test_the_later_attempt_counts_where_an_epoch_was_trained_again(tmp_path: Path) -> None:
    for attempt, loss in ((1, 0.5), (2, 0.4)):
        book = Journal(tmp_path / "journal.jsonl", attempt)
        book.append(3, {"train/loss": loss})
        book.close()
    assert journal.read_metrics(tmp_path / "journal.jsonl") == {3: {"train/loss": 0.4}}


def _save(folder: Path, *epochs: int) -> list[Path]:
    return [checkpoint.save(folder, epoch, {"epoch": epoch, "w": torch.full((100,), float(epoch))}) for epoch in epochs]


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    paths = _save(tmp_path, 1, 2, 3)
    assert sorted(tmp_path.iterdir()) == paths[1:]
    state = checkpoint.load_newest(tmp_path, CPU)
    assert state is not None
    assert state["epoch"] == 3


@pytest.mark.parametrize("length", [0, 10, 64, 500])
def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = _save(tmp_path, 1, 2)[1]
    path.write_bytes(path.read_bytes()[:length])
    state = checkpoint.load_newest(tmp_path, CPU)
    assert state is not None
    assert state["epoch"] == 1
    assert "epoch-000002.pt: damaged" in caplog.text


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)[0]
    whole = path.read_bytes()
    for position in range(0, len(whole), len(whole) // 50):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.load(path, CPU)


def test_training_never_starts_over_silently(tmp_path: Path) -> None:
    _save(tmp_path, 1)[0].write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint is whole"):
        checkpoint.load_newest(tmp_path, CPU)
    assert checkpoint.load_newest(tmp_path / "none", CPU) is None


class _Malice:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch was_here",)


def test_a_malicious_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = checkpoint.save(tmp_path, 1, {"epoch": _Malice()})
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoint.load(path, CPU)
    assert not (tmp_path / "was_here").exists()


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
    program = f"import time, pathlib, suite.locks as l\nwith l.locked(pathlib.Path({str(path)!r})): time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        while holder(path) != process.pid:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert holder(path) is None


def test_a_run_directory_gives_back_its_cell_and_state(make_run: Callable[..., RunDir]) -> None:
    run = make_run()
    assert run.cell().id == run.path.name
    assert run.state() == State()
    run.update(state="failed", cause="nan", reason="step 7")
    state = RunDir(run.path).state()
    assert (state.state, state.cause, state.reason) == ("failed", "nan", "step 7")
    assert time.time() - state.heartbeat < 60


def test_a_result_means_done_whatever_the_state_file_says(make_run: Callable[..., RunDir]) -> None:
    run = make_run()
    run.update(state="running")
    write_json(run.result_path, {"top1_hard": 0.5})
    assert run.state().state == "done"


def test_a_plan_lists_the_cells_of_the_last_launch(make_run: Callable[..., RunDir]) -> None:
    first, second = make_run(seed=0), make_run(seed=1)
    grid_dir = first.path.parent
    assert read_plan(grid_dir) == []
    write_plan(grid_dir, [second.cell()])
    assert read_plan(grid_dir) == [second.path.name]
    assert {run.path.name for run in run_dirs(grid_dir)} == {first.path.name, second.path.name}
