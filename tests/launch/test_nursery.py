"""A child of the nursery trains, ends and is stopped as `python -m suite.train` does, but starts at once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launch.worker.nursery import Child, Nursery
from suite.run import failures, journal
from suite.run.attempt import Attempt
from suite.run.directory import RunDir
from suite.run.processes import Process
from suite.train import EXIT_BAD_INPUT, EXIT_BUSY, EXIT_FAILED

MakeRun = Callable[..., RunDir]
LONG = {"training__epochs": 4000, "training__batch_size": 64}
ROOT = str(Path(__file__).parents[2])


def _environment(num_threads: int = 1) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(num_threads), "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TMPDIR of the nurseries."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def nurseries(scratch: Path) -> Iterator[Mapping[int, Nursery]]:
    """Nurseries by number of threads; each starts when first used."""
    made = {num_threads: Nursery(_environment(num_threads) | {"TMPDIR": str(scratch)}, None) for num_threads in (1, 2)}
    yield made
    for nursery in made.values():
        nursery.close()


@pytest.fixture
def nursery(nurseries: Mapping[int, Nursery]) -> Nursery:
    return nurseries[1]


@pytest.fixture
def own_nursery() -> Iterator[Nursery]:
    """A nursery that a test may break."""
    made = Nursery(_environment(), None)
    yield made
    made.close()


def _plain(*arguments: str, num_threads: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "suite.train", *arguments]
    environment = _environment(num_threads) | variables
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    return subprocess.run(command, env=environment, stdout=pipe, stderr=merged, text=True, check=False)


def _spawn(nursery: Nursery, run: RunDir, *arguments: str, **variables: str) -> Child:
    return nursery.spawn([str(run.cell_path), *arguments], variables, run.path / "log.txt")


def _log(run: RunDir) -> str:
    return (run.path / "log.txt").read_text(encoding="utf-8")


def _numbers(run: RunDir) -> tuple[Any, ...]:
    """Everything that training computed and recorded, except times."""
    metrics = journal.read_metrics(run.journal)
    untimed = [{name: value for name, value in each.items() if "time/" not in name} for each in metrics.values()]
    provenance = {key: value for key, value in run.provenance().items() if key != "command"}
    return run.result(), untimed, provenance, run.predictions_path.read_bytes()


def _once_it_trains(run: RunDir) -> Attempt:
    attempt = Attempt(run.attempts, 1)
    while (beat := failures.beats(attempt.path).get(0)) is None or beat.step is None or "epoch 1/" not in _log(run):
        time.sleep(0.02)
    return attempt


def _end(run: RunDir) -> tuple[str, str]:
    end = Attempt(run.attempts, 1).end() or {}
    return end["state"], end["reason"]


# The same bits


@pytest.mark.parametrize("num_threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_child_computes_the_same_bits_as_a_plain_process(
    make_run: MakeRun, nurseries: Mapping[int, Nursery], num_threads: int
) -> None:
    plain, warm = make_run("plain"), make_run("warm")
    assert _plain(str(plain.cell_path), num_threads=num_threads).returncode == 0
    child = _spawn(nurseries[num_threads], warm)
    assert child.wait() == child.poll() == 0
    assert _numbers(warm) == _numbers(plain)
    assert warm.provenance()["num_threads"] == num_threads
    command = warm.provenance()["command"]
    assert command == [argument.replace("/plain/", "/warm/") for argument in plain.provenance()["command"]]


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2])
def test_and_so_it_does_with_workers_that_decode_image_files(
    make_run: MakeRun, nurseries: Mapping[int, Nursery], lamps: Path, scratch: Path, num_threads: int
) -> None:
    data = {"image_size": 16, "crop": "random_resized"}
    runs = [make_run(name, dataset="folder/lamps", data=data, training__batch_size=4) for name in ("plain", "warm")]
    execution, variables = ("--execution", "{loader: torch, num_workers: 2}"), {"PROXBENCH_DATA": str(lamps.parent)}
    answer = _plain(str(runs[0].cell_path), *execution, num_threads=num_threads, **variables)
    assert answer.returncode == 0, answer.stdout
    assert _spawn(nurseries[num_threads], runs[1], *execution, **variables).wait() == 0, _log(runs[1])
    assert _numbers(runs[1]) == _numbers(runs[0])
    assert runs[1].provenance()["execution"]["loader"] == "torch"
    assert list(scratch.glob("pymp-*")) == [], "multiprocessing's folder is removed"


def test_a_forked_process_has_imported_all_that_training_needs(make_run: MakeRun) -> None:
    program = """
import json, sys
from suite import train
train.preload()
before = set(sys.modules)
status = train.run(sys.argv[1:])
print("\\n" + json.dumps(sorted(set(sys.modules) - before)))
"""
    command = [sys.executable, "-c", program, str(make_run().cell_path), "--execution", "{}"]
    answer = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=True)
    late = json.loads(answer.stdout.splitlines()[-1])
    assert [name for name in late if not name.startswith("typer.")] == []


def test_a_nursery_has_one_thread_whatever_its_children_have(
    make_run: MakeRun, nurseries: Mapping[int, Nursery]
) -> None:
    assert _spawn(nurseries[2], make_run(), "--max-steps", "1").wait() == 0
    process = nurseries[2]._process
    assert process is not None
    assert len(list(Path(f"/proc/{process.pid}/task").iterdir())) == 1


# Ends


@pytest.mark.parametrize("arguments", [["nowhere.yaml"], ["--no-such-option"], ["CELL", "--execution", "{micro: 3}"]])
def test_bad_input_is_reported_as_by_a_plain_process(make_run: MakeRun, nursery: Nursery, arguments: list[str]) -> None:
    run = make_run()
    given = [argument.replace("CELL", str(run.cell_path)) for argument in arguments]
    log = run.path / "log.txt"
    log.write_text("before\n")
    assert nursery.spawn(given, {}, log).wait() == EXIT_BAD_INPUT
    assert _log(run) == f"before\n{_plain(*given).stdout}"


def test_children_train_at_once_with_a_log_each_and_a_second_one_of_a_run_is_refused(
    make_run: MakeRun, nursery: Nursery
) -> None:
    runs = [make_run(name, **LONG) for name in ("one", "other")]
    children = [_spawn(nursery, run) for run in runs]
    for run in runs:
        _once_it_trains(run)
    assert [child.poll() for child in children] == [None, None]
    with pytest.raises(subprocess.TimeoutExpired):
        children[0].wait(0.01)
    assert nursery.spawn([str(runs[0].cell_path)], {}, runs[0].path / "second.txt").wait() == EXIT_BUSY
    children[0].send_signal(signal.SIGKILL)
    children[1].send_signal(signal.SIGTERM)
    assert [child.wait() for child in children] == [-signal.SIGKILL, EXIT_FAILED]
    assert _end(runs[1]) == ("preempted", "stopped by SIGTERM")
    for run, child in zip(runs, children, strict=True):
        assert "epoch 1/4000" in _log(run)
        child.send_signal(signal.SIGTERM)  # the process is gone: nothing happens
    assert "another process has this run" in (runs[0].path / "second.txt").read_text(encoding="utf-8")


def test_no_signal_is_lost_that_comes_before_a_child_can_handle_it(make_run: MakeRun, nursery: Nursery) -> None:
    for index in range(10):
        child = _spawn(nursery, make_run(str(index), **LONG))
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) in {-signal.SIGTERM, EXIT_FAILED}


def test_a_nursery_survives_signals_to_its_process_group(make_run: MakeRun, nursery: Nursery) -> None:
    assert _spawn(nursery, make_run("before"), "--max-steps", "1").wait() == 0
    assert nursery._process is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        nursery._process.send_signal(number)
    run = make_run("after", **LONG)
    child = _spawn(nursery, run)
    _once_it_trains(run)
    os.kill(child.pid, signal.SIGUSR2)  # which the child does not ignore
    assert child.wait() == EXIT_FAILED
    assert _end(run) == ("preempted", "stopped by SIGUSR2")


# Without a nursery


def test_children_of_a_killed_nursery_save_and_end_and_no_more_can_be_started(
    make_run: MakeRun, own_nursery: Nursery
) -> None:
    run = make_run(**LONG)
    child = _spawn(own_nursery, run)
    _once_it_trains(run)
    assert own_nursery._process is not None
    own_nursery._process.kill()
    assert child.wait() == -signal.SIGTERM
    assert _end(run) == ("preempted", "stopped by SIGTERM")
    assert list(run.checkpoints.glob("*.pt"))
    with pytest.raises(OSError, match="the nursery ended with status -9"):
        _spawn(own_nursery, make_run("next"))


def test_a_nursery_that_is_closed_ends_its_children(make_run: MakeRun, own_nursery: Nursery) -> None:
    run = make_run(**LONG)
    child = _spawn(own_nursery, run)
    _once_it_trains(run)
    own_nursery.close()
    assert child.wait() == -signal.SIGTERM
    assert _end(run) == ("preempted", "stopped by SIGTERM")


def test_nothing_outlives_a_killed_worker(make_run: MakeRun) -> None:
    program = """
import os, sys, time
from pathlib import Path
from launch.worker.nursery import Nursery
nursery = Nursery(os.environ, None)
child = nursery.spawn(sys.argv[1:], {}, Path(sys.argv[1]).with_name("log.txt"))
print(nursery._process.pid, child.pid, flush=True)
child.wait()
"""
    run = make_run(**LONG)
    command = [sys.executable, "-c", program, str(run.cell_path)]
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        processes = [Process.of(int(pid)) for pid in worker.stdout.readline().split()]
        _once_it_trains(run)
        worker.kill()
    assert len(processes) == 2
    for process in processes:
        while process.is_alive():
            time.sleep(0.02)
    assert _end(run) == ("preempted", "stopped by SIGTERM")


def test_a_nursery_that_cannot_start_says_so_each_time(tmp_path: Path, make_run: MakeRun) -> None:
    (tmp_path / "timm.py").write_text("raise ImportError('timm is broken')")
    nursery = Nursery(_environment(), tmp_path)
    for _ in range(2):
        with pytest.raises(OSError, match="the nursery ended with status 1"):
            _spawn(nursery, make_run())
    nursery.close()


def test_a_child_without_a_log_is_refused_and_the_next_one_trains(make_run: MakeRun, nursery: Nursery) -> None:
    run = make_run()
    with pytest.raises(OSError, match="No such file or directory"):
        nursery.spawn([str(run.cell_path)], {}, run.path / "missing" / "log.txt")
    assert _spawn(nursery, run, "--max-steps", "1").wait() == 0


def test_a_closed_nursery_that_never_started_starts_no_child(make_run: MakeRun) -> None:
    nursery = Nursery(_environment(), None)
    nursery.close()
    with pytest.raises(OSError, match="the nursery is closed"):
        _spawn(nursery, make_run())
