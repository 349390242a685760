"""A cell's log is its newest attempt's, and can be followed from attempt to attempt."""

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import logs as log
from suite.run.directory import RunDir


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_newest_log_is_the_newest_attempts_on_the_first_node(make_run: Callable[..., RunDir]) -> None:
    run = make_run()
    assert log.newest_log(run) is None
    _write(run.attempts / "0001" / "log.txt", "first")
    newest = _write(run.attempts / "0002" / "log.txt", "second")
    _write(run.attempts / "0002" / "log-node1.txt", "second, elsewhere")
    _write(run.path / "jobs" / "7_0_log.out", "the job's")
    assert log.newest_log(run) == newest


def test_before_the_first_attempt_the_worker_that_printed_last_may_tell_why(make_run: Callable[..., RunDir]) -> None:
    grid_dir = make_run().path.parent
    assert log.worker_log(grid_dir) is None
    newer = _write(grid_dir / "jobs" / "a" / "7_1_0_log.out", "no such container")
    older = _write(grid_dir / "jobs" / "b" / "8_0_0_log.out", "worker on node1: over")
    os.utime(older, (1.0, 1.0))
    assert log.worker_log(grid_dir) == newer


@pytest.mark.parametrize("num_chars", [0, 10, 100_000])
def test_the_last_lines_are_the_last_that_are_not_blank(tmp_path: Path, num_chars: int) -> None:
    path = _write(tmp_path / "log", "ä" * num_chars + "\none\n\ntwo  \nthree\n\n")
    assert log.last_lines(path, 3) == ["one", "two", "three"]
    assert log.last_lines(path, 1) == ["three"]
    assert log.last_lines(_write(tmp_path / "empty", ""), 3) == []


def test_following_goes_from_attempt_to_attempt_and_ends_with_the_run(
    make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "POLL_SECONDS", 0.01)
    run, out, is_settled = make_run(), io.StringIO(), threading.Event()

    def wait_for(text: str) -> None:
        for _ in range(1000):
            if out.getvalue().endswith(text):
                return
            threading.Event().wait(0.01)
        raise AssertionError(out.getvalue())

    follower = threading.Thread(target=log.follow, args=(run, out, is_settled.is_set))
    follower.start()
    first = _write(run.attempts / "0001" / "log.txt", "epoch 1\n")
    wait_for("epoch 1\n")
    with first.open("a", encoding="utf-8") as file:
        file.write("killed\n")
    second = _write(run.attempts / "0002" / "log.txt", "epoch 2\n")
    wait_for("epoch 2\n")
    with second.open("a", encoding="utf-8") as file:
        file.write("done\n")
    is_settled.set()
    follower.join(timeout=10)
    assert out.getvalue() == f"epoch 1\nkilled\n==> {second} <==\nepoch 2\ndone\n"
