"""However a run ends, end.json names the process and the cause, and a retry loses nothing that was saved."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from faulty import STEPS
from interrupted import numbers, place_of
from torch import Tensor

from suite.data.readers import image_folder
from suite.engines.ddp import PlainEngine
from suite.engines.process_group import Layout
from suite.recipe.cell import Cell
from suite.recipe.settings import AS_IS
from suite.run import checkpoint, failures
from suite.run.directory import RunDir
from suite.run.failures import Beat, Fault, Heartbeat, verdict
from suite.run.processes import Process
from suite.train import main

NOWHERE = Path("no-data-needed")
RETRY = "python -m launch retry --oom --set execution.micro_batch_size"


# The verdict, a pure function of faults and heartbeats


def _fault(rank: int, kind: failures.Kind, reason: str = "RuntimeError: gloo", at: float = 100.0) -> Fault:
    return Fault(rank, at, kind, "error", reason)


def _beat(rank: int, step: int | None) -> Beat:
    return Beat(rank, Process("node7", "", 4000 + rank, ""), step, 0, 2, 90.0)


def test_the_first_fault_of_a_processs_own_is_the_runs() -> None:
    spoken = [
        _fault(0, "lost"),
        _fault(1, "own", "DataError: second", at=11.0),
        _fault(2, "own", "DataError: first", at=10.0),
    ]
    expected = {"state": "failed", "cause": "error", "reason": "DataError: first (process 2)"}
    assert verdict(spoken, {}, world_size=4, now=100.0) == expected


def test_a_process_that_said_nothing_while_others_lost_it_died_and_the_run_may_go_on() -> None:
    spoken, alive = [_fault(0, "lost"), _fault(2, "lost")], {1: _beat(1, 41)}
    assert verdict(spoken, alive, world_size=3, now=100.0) == {
        "state": "preempted",
        "cause": "node",
        "reason": "died without an error (killed, or out of memory?): "
        "process 1 (pid 4001 on node7), last seen after step 41, 10 s ago",
    }


def test_a_process_that_others_waited_for_in_vain_hangs() -> None:
    spoken, alive = [_fault(1, "timeout"), _fault(2, "lost")], {0: _beat(0, 41), 3: _beat(3, None)}
    found = verdict(spoken, alive, world_size=4, now=100.0)
    assert (found["state"], found["cause"]) == ("failed", "timeout")
    assert found["reason"] == (
        "hung: process 0 (pid 4000 on node7), last seen after step 41, 10 s ago; "
        "process 3 (pid 4003 on node7), last seen before its first step, 10 s ago"
    )


def test_processes_that_all_waited_are_not_told_apart() -> None:
    found = verdict([_fault(0, "timeout"), _fault(1, "timeout")], {}, world_size=2, now=100.0)
    assert found == {"state": "failed", "cause": "timeout", "reason": "the processes are waiting for each other"}


def test_a_process_that_never_began_is_named_too() -> None:
    found = verdict([_fault(0, "lost")], {}, world_size=2, now=100.0)
    assert found["reason"].endswith(": process 1, before it began")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("no gloo here"), "own"),
        (RuntimeError("shapes differ"), "own"),
        (RuntimeError("[third_party/gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:5007."), "lost"),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv"), "timeout"),
        (RuntimeError("Application timeout caused pair closure"), "timeout"),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), "lost"),
    ],
)
def test_a_broken_exchange_is_told_from_a_fault_of_ones_own(error: Exception, kind: str) -> None:
    assert Fault.of(error, 0, "").kind == kind


def test_memory_that_the_processor_lacks_is_oom_too() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**50)
    found = Fault.of(failure.value, 0, "; a hint")
    assert (found.kind, found.cause) == ("own", "oom")
    assert found.reason.endswith("; a hint")


def test_a_heartbeat_is_rewritten_in_place_and_a_torn_one_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("suite.run.failures.BEAT_SECONDS", 0.001)
    heartbeat = Heartbeat(tmp_path, 3, num_epochs=2)
    assert failures.beats(tmp_path)[3].step is None
    for step in (123456, 7):
        heartbeat.beat(step, 1)
        while failures.beats(tmp_path)[3].step != step:
            time.sleep(0.001)
    heartbeat.close()
    (tmp_path / "heartbeat-0001.json").write_text('{"rank": 1, "ho', encoding="utf-8")
    assert list(failures.beats(tmp_path)) == [3]


def test_a_heartbeat_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> int:
        raise OSError(errno.EIO, "the disk is away")

    monkeypatch.setattr("suite.run.failures.BEAT_SECONDS", 0.001)
    heartbeat = Heartbeat(tmp_path, 0, num_epochs=2)
    monkeypatch.setattr("suite.run.failures.os.pwrite", fail)
    for step in range(3):
        heartbeat.beat(step, 0)
        while heartbeat._written[0] != step:
            time.sleep(0.001)
    monkeypatch.undo()
    heartbeat.beat(3, 1)
    heartbeat.close()
    assert (failures.beats(tmp_path)[0].step, failures.beats(tmp_path)[0].epoch) == (3, 1)


# One process


@pytest.mark.parametrize(
    ("micro_batch_size", "hint"),
    [
        (None, f"; a step of 256 images took 256 at a time: {RETRY}=128"),
        (128, f"; a step of 256 images took 128 at a time: {RETRY}=64"),
        (1, "no room"),
    ],
)
def test_a_run_out_of_memory_says_which_micro_batch_to_try(
    make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch, micro_batch_size: int | None, hint: str
) -> None:
    def train_step(_self: PlainEngine, *_targets: Tensor | None) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PlainEngine, "train_step", train_step)
    run = make_run()
    with pytest.raises(SystemExit) as stop:
        main(run.cell_path, execution=json.dumps({"micro_batch_size": micro_batch_size}))
    assert stop.value.code == 1
    assert (run.state().state, run.state().cause) == ("failed", "oom")
    assert run.state().reason.startswith("OutOfMemoryError: no room")
    assert run.state().reason.endswith(hint)


def test_the_micro_batch_to_try_divides_each_processs_share(make_cell: Callable[..., Cell]) -> None:
    cell = make_cell(training__batch_size=90)
    assert failures._hint(cell, AS_IS, Layout(0, 2)).endswith("=15")  # of 45


# Workers that decode images


def _train_on(lamps: Path, run: RunDir) -> int:
    """Trains; returns the exit status. Raises TimeoutExpired if the process does not end."""
    command = [sys.executable, "-m", "suite.train", str(run.cell_path), "--data-dir", str(lamps.parent)]
    command += ["--execution", "{loader: torch, num_workers: 1}"]
    return subprocess.run(command, capture_output=True, check=False, timeout=120).returncode


def _lamps_run(make_run: Callable[..., RunDir], **changes: object) -> RunDir:
    data = {"image_size": 16, "crop": "random_resized"}
    return make_run(dataset="folder/lamps", data=data, training__batch_size=4, **changes)


@pytest.mark.slow
def test_a_run_ends_with_the_name_of_an_image_that_is_cut_short(make_run: Callable[..., RunDir], lamps: Path) -> None:
    cut = lamps / "train" / "dark" / "3.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    run = _lamps_run(make_run)
    assert _train_on(lamps, run) == 1
    assert (run.state().state, run.state().cause) == ("failed", "error")
    assert run.state().reason.startswith(f"DataError: {cut}: cannot be decoded (")


@pytest.mark.slow
def test_a_run_that_fails_while_its_workers_decode_ends(make_run: Callable[..., RunDir], lamps: Path) -> None:
    recipe = {"training__optimizer": "sgd", "training__learning_rate": 1e30}
    run = _lamps_run(make_run, quantizer="fp", quantization={}, **recipe)
    assert _train_on(lamps, run) == 1
    assert (run.state().state, run.state().cause) == ("failed", "nan")


@pytest.mark.slow
def test_a_worker_that_does_not_hear_signals_to_stop_is_ended_by_its_parent() -> None:
    worker = image_folder._context().Process(target=_sleep_deaf)
    worker.start()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL


def _sleep_deaf() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR2))
    time.sleep(600)


# Two processes under torchrun


def _beats(run: RunDir) -> dict[int, Beat]:
    attempt = run.newest()
    assert attempt is not None
    return failures.beats(attempt.path)


@contextmanager
def _launched(run: RunDir, fault: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Two processes that train the run, with one of faulty.py's faults if named."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    faulty = Path(__file__).with_name("faulty.py")
    program = [str(faulty), str(run.cell_path), fault] if fault else ["-m", "suite.train", str(run.cell_path)]
    command = [sys.executable, *torchrun, *program]
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    with (
        (run.path / "log").open("ab") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        yield process


@pytest.mark.long
def test_two_processes_survive_a_signal_a_death_and_a_hang_with_the_same_bits(make_run: Callable[..., RunDir]) -> None:
    recipe = {"training__epochs": 3, "training__batch_size": 64}  # of 20 steps
    undisturbed, run = make_run("undisturbed", **recipe), make_run("disturbed", **recipe)
    with _launched(undisturbed) as process:
        assert process.wait() == 0

    with _launched(run, "stop") as process:
        assert process.wait() != 0
    assert (run.state().state, run.state().reason) == ("preempted", "stopped by SIGTERM")
    assert [beat.step for beat in _beats(run).values()] == [STEPS["stop"] + 1] * 2
    epoch, step = place_of(checkpoint.newest_first(run.checkpoints)[0])
    assert 20 * epoch + step == STEPS["stop"] + 2, (
        "that step and the next, during which the stop was agreed, were finished and saved"
    )

    with _launched(run, "die") as process:
        assert process.wait() != 0
    pid = _beats(run)[1].process.pid
    assert run.state().state == "preempted"
    assert run.state().reason.startswith(f"died without an error (killed, or out of memory?): process 1 (pid {pid} on ")
    assert "last seen after step 32" in run.state().reason

    with _launched(run, "hang") as process:
        while run.state().state != "failed":
            assert process.poll() is None, (run.path / "log").read_text(encoding="utf-8")
            time.sleep(0.05)
        pid = _beats(run)[1].process.pid
        os.kill(pid, signal.SIGKILL)  # torchrun would do so after half a minute
    assert run.state().cause == "timeout"
    assert run.state().reason.startswith(f"hung: process 1 (pid {pid} on ")
    assert "last seen after step 42" in run.state().reason

    with _launched(run) as process:
        assert process.wait() == 0
    assert run.state().attempt == 4
    assert run.result() == undisturbed.result()
    assert numbers(run) == numbers(undisturbed)


def _free_ports(num: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(num)]
        return [str(opened.getsockname()[1]) for opened in sockets]


@pytest.mark.slow
def test_however_training_ends_no_thread_of_the_process_group_outlives_it(make_run: Callable[..., RunDir]) -> None:
    # Such a thread may request the GIL while Python finalizes, which would abort a process whose run is done.
    run = make_run(training__epochs=1, training__batch_size=256)
    command = [sys.executable, str(Path(__file__).with_name("endings.py")), str(run.cell_path), *_free_ports(5)]
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    ours |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    processes = [
        subprocess.Popen(command, env=os.environ | ours | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    written = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [5, 5], (
        "with a group that is kept, exits without finalizing"
    )
    for text in written:
        assert json.loads(text.splitlines()[-1]) == {"done": [], "first steps": [], "preempted": [], "failed": []}
    states = {name: RunDir(run.path.parent / name / run.path.name).state() for name in ("done", "preempted", "failed")}
    assert {name: state.state for name, state in states.items()} == {name: name for name in states}
    assert states["failed"].reason == "ValueError: a label of 4711 (process 1)"


@pytest.mark.slow
def test_an_exception_in_another_process_than_the_first_is_the_runs_reason(make_run: Callable[..., RunDir]) -> None:
    run = make_run(training__batch_size=64)
    with _launched(run, "raise") as process:
        assert process.wait() == 1
    state = run.state()
    assert (state.state, state.cause) == ("failed", "error")
    assert state.reason == "ValueError: a label of 4711 (process 1)"


@pytest.mark.slow
def test_a_process_deaf_in_native_code_ends_within_half_a_minute_of_anothers_failure(
    make_run: Callable[..., RunDir],
) -> None:
    run = make_run(training__batch_size=64)
    with _launched(run, "block") as process:
        assert process.wait() == 1
        ended = time.time()
    attempt = run.newest()
    assert attempt is not None
    spoken = failures.faults(attempt.path)
    assert [(fault.rank, fault.kind) for fault in spoken] == [(0, "lost"), (1, "own")]
    assert spoken[0].reason == "waited for process 1, which had failed"
    assert ended - spoken[1].time < 30
    assert run.state().reason == "ValueError: a label of 4711 (process 1)"


@pytest.mark.long
def test_trainings_killed_at_random_moments_end_with_the_same_bits() -> None:
    # Five here, without torchrun's start-up; `python benchmarks/kills.py` does a hundred with it.
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "benchmarks" / "kills.py"), "--kills", "5", "--epochs", "2", "--forked"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.splitlines()[-1].endswith("have the undisturbed one's weights, accuracies and journal")
