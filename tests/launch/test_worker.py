"""A worker records its cells' true states, whatever happens to their processes. The cells are really trained."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from tiny_cells import plan, put

from launch import launches
from launch.launches import Launch
from launch.plan import RETRIES, Standing
from launch.worker import registry
from launch.worker.slots import Slot
from launch.worker.spec import Place, WorkerSpec
from launch.worker.worker import Worker, read_plan_once
from suite.recipe.cell import Cell
from suite.run import failures
from suite.run.attempt import Attempt
from suite.run.directory import Planned, RunDir, write_plan

CORE, JOB = Slot((), 1, 1), Place(job_id="4711")
LONG = {"training__epochs": 40, "training__batch_size": 64}
MakeRun = Callable[..., RunDir]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr("launch.worker.worker.IDLE_SECONDS", 0.5)
    monkeypatch.setattr("launch.worker.worker.CONTROL_SECONDS", 0.1)
    monkeypatch.setattr("launch.worker.attempt.LOOK_SECONDS", 0.2)


def _worker(*runs: RunDir, slots: Sequence[Slot] = (CORE,), place: Place = JOB, **spec: object) -> Worker:
    """A worker for a grid just launched with these runs."""
    plan(*runs)
    return _another(runs[0], slots=slots, place=place, **spec)


def _another(run: RunDir, slots: Sequence[Slot] = (CORE,), place: Place = JOB, **spec: object) -> Worker:
    """A worker for the run's grid, whose plan stays unchanged."""
    grid_dir = run.path.parent
    return Worker(WorkerSpec(grid_dir, grid_dir.parent / "no-data-needed", **spec), place, slots)  # type: ignore[arg-type]


def _states(*runs: RunDir) -> list[str]:
    return [run.state().state for run in runs]


@contextmanager
def _meanwhile(act: Callable[[], None]) -> Iterator[None]:
    thread = Thread(target=act)
    thread.start()
    yield
    thread.join()


def _wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if is_so():
            return
        time.sleep(0.02)
    raise AssertionError("the condition never became true")


def _once_trained(run: RunDir, attempt: int = 1) -> None:
    """Waits until the attempt has made a step, and the run a checkpoint."""

    def is_trained() -> bool:
        beat = Attempt(run.attempts, attempt).beat()
        return beat is not None and beat.step is not None and any(run.checkpoints.glob("*.pt"))

    _wait_until(is_trained)


def _here(run: RunDir) -> Attempt:
    attempt = run.newest()
    assert attempt is not None
    return attempt


def _trainer(run: RunDir) -> int:
    """Id of the process that trains it."""
    return failures.beats(_here(run).path)[0].process.pid


# Cells that a worker does not touch


def test_cells_that_nobody_asked_for_are_settled_or_of_another_shape_are_left_alone(
    make_run: MakeRun, make_cell: Callable[..., Cell]
) -> None:
    settled, other = make_run(seed=1), make_run(seed=2)
    planned = Planned(make_cell(), shape="mine")
    put(settled, state="failed", cause="nan")
    write_plan(
        other.path.parent, [planned, Planned(settled.cell(), shape="mine"), Planned(other.cell(), shape="theirs")]
    )
    assert _another(other, shape="mine").work() == "over"
    assert _states(settled, other) == ["failed", "queued"]
    assert (settled.state().attempt, other.state().attempt) == (1, 0)
    assert not (other.path.parent / planned.cell.id).exists()


def test_a_cell_that_another_process_has_is_left_alone(make_run: MakeRun) -> None:
    run = make_run()
    run.claim()
    assert _worker(run).work() == "over"
    assert (run.state().state, run.state().attempt) == ("running", 1)


@pytest.mark.parametrize("judge", ["after_lost_worker", "after_attempt"])
def test_a_worker_that_loses_its_cell_while_it_judges_an_attempt_writes_nothing(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, judge: str
) -> None:
    run = make_run()
    if judge == "after_lost_worker":
        put(run, state="running")  # by a process that is gone

    def judged(*_: object, **__: object) -> dict[str, str]:
        Attempt(run.attempts, 2).path.mkdir()  # another worker's claim
        return {"state": "preempted"}

    monkeypatch.setattr(f"launch.worker.attempt.{judge}", judged)
    assert _worker(run, train_options=("--no-such-option",)).work() == "over"
    assert (run.state().attempt, Attempt(run.attempts, 1).end()) == (2, None)


def test_of_a_worker_limited_to_some_cells_others_have_nothing_to_fear(make_run: MakeRun) -> None:
    run, other = make_run(seed=0), make_run(seed=1)
    put(run, state="done")
    run.result_path.write_text("{}", encoding="utf-8")
    assert _worker(run, other, cells=(run.path.name,)).work() == "over"
    assert _states(run, other) == ["done", "queued"]


def test_a_child_of_a_failed_parent_stays_queued_and_one_of_a_running_parent_is_waited_for(make_run: MakeRun) -> None:
    parent = make_run(quantizer="fp", quantization={})
    child = make_run(init="finetune", parent=parent.path.name)
    attempt = parent.claim()
    start = time.monotonic()
    assert _worker(parent, child).work() == "over"
    assert 0.5 < time.monotonic() - start < 30, "IDLE_SECONDS"
    attempt.finish(state="failed", cause="nan", reason="the loss is nan")
    assert _another(child).work() == "over"
    assert _states(parent, child) == ["failed", "queued"]
    assert child.newest() is None


def test_a_run_that_lost_its_worker_too_often_has_failed(make_run: MakeRun) -> None:
    run = make_run()
    put(run, state="preempted", cause="node", failures={"node": RETRIES["node"]}, failed_at="")
    put(run, state="running", attempt=2)
    assert _worker(run).work() == "over"
    assert (run.state().state, run.state().cause, run.state().attempt) == ("failed", "node", 2)


def test_a_worker_that_has_little_time_begins_nothing_and_asks_for_more(make_run: MakeRun) -> None:
    run = make_run()
    worker = _worker(run, place=Place(job_id="4711", seconds=60.0, _begun=time.monotonic() - 31))
    assert (worker.work(), worker.reason) == ("again", "little time is left")
    assert run.newest() is None


def test_a_signal_to_a_worker_without_a_cell_is_obeyed_and_the_handlers_come_back(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.worker.worker.IDLE_SECONDS", 60.0)
    parent = make_run(quantizer="fp", quantization={})
    child = make_run(init="finetune", parent=parent.path.name)
    parent.claim()
    before = signal.getsignal(signal.SIGUSR2)
    worker = _worker(parent, child)
    worker._shown = lambda _: os.kill(os.getpid(), signal.SIGUSR2)
    assert (worker.work(), worker.reason) == ("again", "stopped by SIGUSR2")
    assert signal.getsignal(signal.SIGUSR2) == before
    (record,) = registry.workers(child.path.parent)
    assert (record.is_live, record.reason, record.job_id) == (False, "stopped by SIGUSR2", "4711")


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_live_worker_hands_in_more_while_cells_are_ready(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, *, is_first: bool
) -> None:
    monkeypatch.setattr("launch.worker.worker.SUPPLY_SECONDS", 0.0)
    run, looks, handed_in = make_run(), list[int](), list[int]()
    earlier = registry.register(run.path.parent, "1")
    if is_first:
        earlier.write_end(state="over")

    def shown(_: list[Standing]) -> None:
        looks.append(1)
        if len(looks) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    worker = _worker(run, slots=[])  # as if all slots were taken
    worker._stays, worker._shown, worker._supply = True, shown, lambda: handed_in.append(1)
    assert worker.work() == "again"
    assert bool(handed_in) == is_first
    assert run.newest() is None


def test_a_plan_is_read_again_once_it_has_changed(make_run: MakeRun) -> None:
    run, other = make_run(seed=0), make_run(seed=1)
    plan(run)
    grid_dir = run.path.parent
    first = read_plan_once(grid_dir)
    assert read_plan_once(grid_dir) is first
    plan(run, other)
    assert list(read_plan_once(grid_dir)) == [run.path.name, other.path.name]


# Cells that a worker trains


@pytest.mark.slow
def test_bad_input_is_the_cells_reason_and_not_the_machines_fault(make_run: MakeRun) -> None:
    runs = [make_run(seed=seed) for seed in range(4)]
    assert _worker(*runs, train_options=("--no-such-option",)).work() == "over"
    assert _states(*runs) == ["failed"] * 4
    assert runs[0].state().cause == "error"
    assert "no such option" in runs[0].state().reason.lower()
    assert registry.sick_nodes(registry.workers(runs[0].path.parent)) == []


def test_three_cells_that_fail_without_a_step_retire_the_worker(make_run: MakeRun) -> None:
    runs = [make_run(seed=seed, dataset="folder/nowhere") for seed in range(5)]
    worker = _worker(*runs)
    assert worker.work() == "retired"
    assert _states(*runs) == ["preempted"] * 3 + ["queued"] * 2
    assert worker.reason.startswith("retired: 3 cells failed here without a step")
    assert registry.sick_nodes(registry.workers(runs[0].path.parent)) == [worker.place.host]


@pytest.mark.slow
def test_a_failing_cell_leaves_the_others_and_a_second_worker_finds_nothing_to_do(make_run: MakeRun) -> None:
    good, other = make_run(seed=1), make_run(seed=2)
    diverging = make_run(training__optimizer="sgd", training__learning_rate=1e30)
    assert _worker(good, diverging, other, slots=[CORE] * 2).work() == "over"
    assert _states(good, diverging, other) == ["done", "failed", "done"]
    assert (diverging.state().cause, good.state().job_id) == ("nan", "4711")
    log = _here(good).log().read_text(encoding="utf-8")
    assert "done test/top1_soft" in log
    assert "DivergedError" not in log
    assert _another(good).work() == "over"
    assert {run.state().attempt for run in (good, diverging, other)} == {1}


@pytest.mark.slow
def test_a_child_is_trained_after_its_parent_by_the_same_worker(make_run: MakeRun) -> None:
    parent = make_run(quantizer="fp", quantization={}, training__epochs=1)
    child = make_run(init="finetune", parent=parent.path.name, training__epochs=1)
    assert _worker(child, parent, slots=[CORE] * 2).work() == "over"
    assert _states(parent, child) == ["done", "done"]
    assert _here(child).facts["made"] > parent.result_path.stat().st_mtime


@pytest.mark.long
def test_a_signal_saves_asks_to_be_started_again_and_the_cell_ends_as_undisturbed(make_run: MakeRun) -> None:
    recipe = {"training__epochs": 24, "training__batch_size": 64}
    undisturbed, run = make_run("undisturbed", **recipe), make_run("disturbed", **recipe)
    assert _worker(undisturbed).work() == "over"
    for attempt, number in enumerate((signal.SIGUSR2, signal.SIGTERM), 1):

        def ask(attempt: int = attempt, number: signal.Signals = number) -> None:
            _once_trained(run, attempt)
            os.kill(_trainer(run), number)  # as SLURM does: to all processes of the step
            os.kill(os.getpid(), number)

        before = signal.getsignal(number)
        with _meanwhile(ask):
            assert _worker(run).work() == "again"
        assert signal.getsignal(number) == before
        assert (run.state().state, run.state().cause) == ("preempted", None)
        assert run.state().reason == f"stopped by {number.name}"
        assert run.state().failures == {}
        assert failures.noted_stop(_here(run).path) == number.name
        assert (run.attempts / f"000{attempt}" / "log.txt").exists()
    assert _worker(run).work() == "over"
    assert failures.noted_stop(_here(run).path) == ""
    assert run.state().attempt == 3
    assert run.result() == undisturbed.result()


@pytest.mark.long
@pytest.mark.parametrize("delay_seconds", [0.0, 0.3, 1.0, 2.0, 3.0])
def test_a_signal_before_training_listens_is_no_failure(make_run: MakeRun, delay_seconds: float) -> None:
    run = make_run(**LONG)

    def ask() -> None:
        _wait_until(lambda: list(run.attempts.glob("*/log.txt")))
        time.sleep(delay_seconds)
        os.kill(os.getpid(), signal.SIGUSR2)

    with _meanwhile(ask):
        assert _worker(run).work() == "again"
    assert (run.state().state, run.state().failures) == ("preempted", {})
    assert run.state().reason == "stopped by SIGUSR2"


@pytest.mark.slow
def test_a_job_that_ends_without_a_checkpoint_was_too_short(make_run: MakeRun) -> None:
    run = make_run(training__batch_size=1)  # an epoch takes long
    place = Place(job_id="4711", seconds=8.0)

    def ask() -> None:
        _wait_until(lambda: run.attempts.exists() and _here(run).beat() and place.seconds_left() < 4.0)
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(_trainer(run), signal.SIGKILL)  # as SLURM does at the limit: it was still saving

    with _meanwhile(ask):
        assert _worker(run, place=place).work() == "again"
    assert (run.state().state, run.state().cause) == ("preempted", "timeout")
    assert run.state().failures == {"timeout": 1}
    assert run.state().reason == "no checkpoint within the time limit: give more --time"


@pytest.mark.slow
def test_a_cancelled_cell_stops_and_a_killed_one_is_tried_once_more(make_run: MakeRun) -> None:
    cancelled, killed = make_run(seed=1, training__epochs=400), make_run(seed=2, **LONG)

    def disturb() -> None:
        _once_trained(cancelled)
        cancelled.cancel("by hand")
        _once_trained(killed)
        os.kill(_trainer(killed), signal.SIGKILL)

    with _meanwhile(disturb):
        assert _worker(cancelled, killed, slots=[CORE] * 2).work() == "over"
    assert not cancelled.is_live()
    assert (cancelled.state().state, cancelled.state().reason) == ("cancelled", "by hand")
    assert cancelled.result() is None
    assert (killed.state().state, killed.state().attempt) == ("done", 2)
    end = Attempt(killed.attempts, 1).end() or {}
    assert (end["state"], end["cause"], end["failures"]) == ("preempted", "error", {"error": 1})


@pytest.mark.long
def test_two_processes_of_one_cell_stop_and_go_on_together(make_run: MakeRun) -> None:
    run = make_run(training__epochs=8, training__batch_size=64)

    def ask() -> None:
        _once_trained(run)
        os.kill(os.getpid(), signal.SIGUSR2)

    with _meanwhile(ask):
        assert _worker(run, slots=[Slot((), 2, 1)]).work() == "again"
    assert (run.state().state, run.state().reason) == ("preempted", "stopped by SIGUSR2")
    beats = failures.beats(_here(run).path)
    assert set(beats) == {0, 1}
    assert len({beat.step for beat in beats.values()}) == 1
    assert _another(run, slots=[Slot((), 2, 1)]).work() == "over"
    assert (run.state().state, run.state().attempt) == ("done", 2)


@pytest.mark.slow
def test_nothing_runs_on_that_a_worker_which_breaks_had_started(make_run: MakeRun) -> None:
    run = make_run(training__epochs=400)
    worker = _worker(run, slots=[CORE] * 2)

    def breaks(rows: list[Standing]) -> None:
        if rows[0].state.epoch >= 1:
            raise ZeroDivisionError

    worker._shown = breaks
    with pytest.raises(ZeroDivisionError):
        worker.work()
    assert not failures.beats(_here(run).path)[0].process.is_alive()
    assert (run.state().state, run.state().epoch >= 1) == ("preempted", True)


@pytest.mark.slow
def test_a_surplus_worker_saves_and_leaves_and_its_cell_goes_on_elsewhere(make_run: MakeRun) -> None:
    run = make_run(training__epochs=12, training__batch_size=64)
    grid_dir = run.path.parent
    earlier = registry.register(grid_dir, "1")
    registry.set_limit(grid_dir, 2)

    def scale() -> None:
        _once_trained(run)
        registry.set_limit(grid_dir, 1)

    worker = _worker(run)
    with _meanwhile(scale):
        assert worker.work() == "scaled"
    assert worker.reason == "fewer workers were asked for"
    assert (run.state().state, run.state().failures) == ("preempted", {})
    epoch = run.state().epoch
    assert _another(run).work() == "scaled", "the earlier worker is live"
    assert run.state().attempt == 1
    earlier.write_end(state="over")
    assert _another(run).work() == "over"
    assert (run.state().state, run.state().attempt) == ("done", 2)
    assert epoch >= 1


@pytest.mark.slow
def test_a_live_worker_obeys_a_new_order(make_run: MakeRun) -> None:
    runs = [make_run(seed=seed, training__epochs=6 if seed == 0 else 1) for seed in range(3)]

    def reorder() -> None:
        _once_trained(runs[0])
        write_plan(runs[0].path.parent, [Planned(run.cell(), is_first=run is runs[2]) for run in runs])

    with _meanwhile(reorder):
        assert _worker(*runs).work() == "over"
    made = [_here(run).facts["made"] for run in runs]
    assert made[0] < made[2] < made[1]


@pytest.mark.long
def test_three_workers_at_once_train_each_cell_once(make_run: MakeRun) -> None:
    runs = [make_run(seed=seed, training__epochs=1) for seed in range(5)]
    plan(*runs)
    grid_dir = runs[0].path.parent
    code = str(Path(__file__).parents[2])
    launches.remember(grid_dir, Launch("grid", "g", "", (), "local", None, {}, {}, str(grid_dir.parent), "", code))
    command = [sys.executable, "-m", "launch", "worker", "--root", str(grid_dir.parent), "--slots", "1"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "123"]
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], answers
    assert _states(*runs) == ["done"] * 5
    assert [run.state().attempt for run in runs] == [1] * 5
    assert {_here(run).facts["worker"] for run in runs} <= {1, 2, 3}
    found = registry.workers(grid_dir)
    assert [(each.number, each.is_live) for each in found] == [(1, False), (2, False), (3, False)]
