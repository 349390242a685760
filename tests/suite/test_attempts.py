"""Only one attempt at a run succeeds; the others notice and write nothing."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_cells import put

from suite.run import failures, journal
from suite.run.attempt import LEASE_SECONDS, Attempt, BusyError, SupersededError, claim
from suite.run.directory import RunDir
from suite.run.failures import Heartbeat
from suite.run.locks import holder, locked
from suite.run.processes import Process
from suite.train import EXIT_BAD_INPUT, EXIT_BUSY

MakeRun = Callable[..., RunDir]
LONG = {"training__epochs": 400, "training__batch_size": 64}


# Processes


def test_a_process_lives_as_long_as_that_very_process_does() -> None:
    assert Process.this().is_alive()
    assert replace(Process.this(), start="0").is_alive() is False, "another process has its id by now"
    assert replace(Process.this(), machine="another boot").is_alive() is None
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        theirs = replace(Process.this(), pid=child.pid, start=_start(child.pid))
        assert theirs.is_alive()
        child.kill()
        child.wait()
        assert theirs.is_alive() is False


def _start(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]


def test_what_is_left_of_a_process_that_nobody_asked_after_lives_no_more() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    start = _start(child)
    while Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
    assert replace(Process.this(), pid=child, start=start).is_alive() is False
    os.waitpid(child, 0)


# Claims


def test_the_next_attempt_waits_for_the_end_of_the_last(make_run: MakeRun) -> None:
    run = make_run()
    first = run.claim("7")
    assert (first.number, first.path.name, run.state().state, run.state().job_id) == (1, "0001", "running", "7")
    with pytest.raises(BusyError, match=rf"has this run \(attempt 1: process {os.getpid()} on .*, job 7"):
        run.claim()
    first.finish(state="preempted", reason="asked")
    second = run.claim()
    assert second.number == 2
    assert second.token != first.token


def test_an_attempt_whose_process_is_gone_is_followed_and_its_end_written(make_run: MakeRun) -> None:
    run = make_run()
    lost = put(run, state="running")
    assert not run.is_live()
    assert run.claim().number == 2
    end = lost.end()
    assert end is not None
    assert (end["state"], end["cause"]) == ("preempted", "node")


def test_of_many_that_claim_at_once_one_gets_the_run(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\nfrom suite.run.attempt import BusyError, claim\n"
        "folder = pathlib.Path(sys.argv[1])\nwhile not (folder.parent / 'go').exists(): time.sleep(0.0005)\n"
        "try: claim(folder)\nexcept BusyError: sys.exit(3)\ninput()"
    )
    for round_ in range(3):
        folder = tmp_path / str(round_) / "attempts"
        folder.mkdir(parents=True)
        command = [sys.executable, "-c", program, str(folder)]
        claimants = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(6)]
        (folder.parent / "go").touch()
        losers: list[subprocess.Popen[bytes]] = []
        while len(losers) < 5:
            losers = [each for each in claimants if each.poll() is not None]
            time.sleep(0.01)
        (winner,) = (each for each in claimants if each not in losers)
        assert [each.returncode for each in losers] == [EXIT_BUSY] * 5
        assert [path.name for path in folder.iterdir()] == ["0001"]
        for each in claimants:
            each.communicate(b"\n" if each is winner else None)


def test_on_another_machine_the_heartbeat_tells_by_the_file_servers_clock(tmp_path: Path) -> None:
    attempt = claim(tmp_path)
    attempt.note(machine="another boot", host="node7")
    assert attempt.is_live(), "just begun"
    heartbeat = Heartbeat(attempt.path, 0, num_epochs=2)
    heartbeat.close()
    beat_path = attempt.path / "heartbeat-0000.json"
    beat_path.write_text(beat_path.read_text(encoding="utf-8").replace(Process.this().machine, "another boot"))
    for file in (attempt.path, attempt.path / "attempt.yaml", beat_path):
        os.utime(file, (time.time() - LEASE_SECONDS - 5,) * 2)
    assert not attempt.is_live()
    os.utime(beat_path, (time.time() - LEASE_SECONDS / 2,) * 2)
    assert attempt.is_live()
    attempt.note(job_id="7")
    assert not attempt.is_live(job_id="7"), "SLURM restarted the job, so its earlier processes are gone"


def test_an_attempt_that_finds_a_newer_one_writes_nothing(make_run: MakeRun) -> None:
    run = make_run()
    old = put(run, state="running")
    book = journal.Journal(run.journal, old)
    run.claim()
    before = _contents(run)
    with pytest.raises(SupersededError, match="attempt 2 has taken this run over"):
        book.append(1, {"train/loss": 0.5})
    with pytest.raises(SupersededError):
        old.finish(state="done")
    with pytest.raises(SupersededError):
        journal.Journal(run.journal, old)
    assert _contents(run) == before
    book.close()


def _contents(run: RunDir) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()}


# File systems


def test_where_there_are_no_locks_everybody_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock") as mine, locked(tmp_path / "lock") as others:
        assert (mine, others) == (True, True)
        assert holder(tmp_path / "lock") is None


@contextmanager
def _patched(folder: Path, program: str) -> Iterator[dict[str, str]]:
    """The environment for a Python whose sitecustomize first runs the program."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(program, encoding="utf-8")
    yield os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}


FILE_SYSTEMS = {
    "no flock": "import errno, fcntl\ndef flock(*_): raise OSError(errno.ENOLCK, 'No locks')\nfcntl.flock = flock",
    "no fsync of folders": (
        "import errno, os, stat\nfsync = os.fsync\ndef ours(file):\n"
        "    if stat.S_ISDIR(os.fstat(file).st_mode): raise OSError(errno.EINVAL, 'no')\n    fsync(file)\n"
        "os.fsync = ours"
    ),
    "no hard links": "import errno, os\ndef link(*_, **__): raise OSError(errno.EPERM, 'no links')\nos.link = link",
    "no heartbeats": "import errno, os\ndef pwrite(*_): raise OSError(errno.EIO, 'away')\nos.pwrite = pwrite",
}


@pytest.mark.slow
@pytest.mark.parametrize("program", FILE_SYSTEMS.values(), ids=FILE_SYSTEMS)
def test_a_run_ends_done_on_a_file_system_with(make_run: MakeRun, tmp_path: Path, program: str) -> None:
    run = make_run(training__epochs=1)
    with _patched(tmp_path / "patch", program) as environment:
        answer = _train(run, environment)
    assert answer.returncode == 0, answer.stderr
    assert run.state().state == "done"


def _train(run: RunDir, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "suite.train", str(run.cell_path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# Real training


@contextmanager
def _training(run: RunDir) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "suite.train", str(run.cell_path), "--checkpoint-steps", "1"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _once_it_trains(run: RunDir, number: int) -> Attempt:
    attempt = Attempt(run.attempts, number)
    while (beat := failures.beats(attempt.path).get(0)) is None or beat.step is None:
        time.sleep(0.02)
    return attempt


@pytest.mark.slow
def test_a_process_paused_past_its_lease_and_woken_stops_and_writes_nothing(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(**LONG)
    with _training(run) as sleeper:
        first = _once_it_trains(run, 1)
        sleeper.send_signal(signal.SIGSTOP)
        # As seen from another machine, which cannot know that the process exists.
        monkeypatch.setattr("suite.run.attempt.LEASE_SECONDS", 0.5)
        monkeypatch.setattr("suite.run.processes._machine", lambda: "another machine")
        time.sleep(0.6)
        second = run.claim()
        monkeypatch.undo()
        assert second.number == 2
        end = first.end()
        assert end is not None
        assert end["cause"] == "node"
        before = _contents(run)
        sleeper.send_signal(signal.SIGCONT)
        _, said = sleeper.communicate()
    assert sleeper.returncode == EXIT_BUSY, said
    assert "attempt 2 has taken this run over" in said
    beats = {str(first.path / "heartbeat-0000.json")}
    after = _contents(run)
    assert {path for path in after if after[path] != before.get(path)} <= beats, "at most its own heartbeat"


@pytest.mark.slow
def test_a_second_training_of_a_run_is_refused_and_a_bad_execution_too(make_run: MakeRun) -> None:
    run = make_run(**LONG)
    with _training(run):
        _once_it_trains(run, 1)
        answer = _train(run, dict(os.environ) | {"OMP_NUM_THREADS": "1"})
        assert answer.returncode == EXIT_BUSY
        assert "another process has this run (attempt 1: process " in answer.stderr
    command = [sys.executable, "-m", "suite.train", str(run.cell_path), "--execution", "{micro_batch: 3}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (
        EXIT_BAD_INPUT,
        "--execution: micro_batch: Extra inputs are not permitted\n",
    )


@pytest.mark.slow
def test_a_run_whose_directory_is_a_link_trains_there(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(training__epochs=1)
    elsewhere = tmp_path / "scratch" / "a"
    elsewhere.parent.mkdir()
    run.path.rename(elsewhere)
    run.path.symlink_to(elsewhere)
    answer = _train(run, dict(os.environ) | {"OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0, answer.stderr
    assert run.state().state == "done"
