"""A job leaves the states of its cells true, whatever happens to their processes."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tiny_cells import put

from launch import rendezvous, snapshot
from launch.ending import End, after_attempt, after_lost_job
from launch.job import EXIT_AGAIN, Job, JobFailedError, Place
from launch.memory import num_oom_kills
from launch.plan import RETRIES
from launch.rendezvous import Word
from launch.submissions import Submission
from launch.training_process import command, devices_of, environment
from quantizers.fused import native, passes
from suite.run import failures
from suite.run.directory import RunDir, State

NOWHERE = Path("no-data-needed")
LONG = {"training__epochs": 40, "training__batch_size": 64}
MakeRun = Callable[..., RunDir]


# What an attempt's end means, as a function of what was seen

RUNNING = State(state="running", attempt=3)
UNBEGUN = partial(End, is_begun=False)


def _changes(now: State, end: End) -> dict[str, Any]:
    changes = after_attempt(now, end)
    return {key: value for key, value in changes.items() if key in {"state", "cause", "reason"}}


@pytest.mark.parametrize(
    ("now", "end"),
    [
        (replace(RUNNING, state="done"), End(1)),
        (replace(RUNNING, state="cancelled"), End(1, "SIGTERM")),
    ],
)
def test_what_is_done_or_cancelled_stays_as_it_is(now: State, end: End) -> None:
    assert after_attempt(now, end) == {}


@pytest.mark.parametrize(
    ("now", "end", "reason"),
    [
        (replace(RUNNING, state="preempted", reason="stopped by SIGUSR2"), End(1), "stopped by SIGUSR2"),
        (replace(RUNNING, state="preempted", reason="stopped by SIGUSR2"), End(1, "SIGTERM"), "stopped by SIGUSR2"),
        (RUNNING, End(-9, "SIGTERM"), "stopped by SIGTERM"),
        (RUNNING, UNBEGUN(-signal.SIGUSR2), "stopped by SIGUSR2"),  # before it could listen
        (RUNNING, UNBEGUN(128 + signal.SIGTERM), "stopped by SIGTERM"),
        (RUNNING, UNBEGUN(1, "SIGUSR2"), "stopped by SIGUSR2"),  # torchrun's status
        (replace(RUNNING, state="preempted", cause="node"), End(1, "SIGUSR2"), "stopped by SIGUSR2"),
    ],
)
def test_an_attempt_that_was_asked_to_stop_goes_on_and_counts_as_no_failure(now: State, end: End, reason: str) -> None:
    assert after_attempt(now, end) == {"state": "preempted", "cause": None, "reason": reason}


@pytest.mark.parametrize(
    ("now", "end", "cause", "reason"),
    [
        (replace(RUNNING, state="failed", cause="oom", reason="no room"), End(1), "oom", "no room"),
        (replace(RUNNING, state="failed", cause="timeout", reason="hung"), End(1, "SIGTERM"), "timeout", "hung"),
        (replace(RUNNING, state="preempted", cause="node", reason="died"), End(1), "node", "died"),
        (RUNNING, End(-9, is_out_of_memory=True), "oom", "killed by the kernel: the job's memory ran out"),
        (RUNNING, End(1, is_group=True), "node", "a training process died without a word"),
        (RUNNING, UNBEGUN(1, is_group=True), "error", "the training process ended with status 1"),
        (RUNNING, End(-9), "error", "killed by SIGKILL (by hand"),
        (RUNNING, End(-11), "error", "killed by SIGSEGV"),
        (RUNNING, UNBEGUN(1), "error", "the training process ended with status 1 before it could say why"),
        (RUNNING, End(1, "SIGUSR2", is_out_of_time=True), "timeout", "no checkpoint within the time limit"),
    ],
)
def test_failures_are_told_apart_and_tried_again_as_often_as_their_cause_allows(
    now: State, end: End, cause: str, reason: str
) -> None:
    for _ in range(RETRIES[cause]):  # type: ignore[index]
        changes = after_attempt(now, end)
        assert (changes["state"], changes["cause"]) == ("preempted", cause)
        assert changes["reason"].startswith(reason)
        now = replace(now, failures=changes["failures"], failed_at=changes["failed_at"])
    assert after_attempt(now, end)["state"] == "failed"


def test_a_time_limit_with_a_new_checkpoint_is_no_failure() -> None:
    end = End(1, "SIGUSR2", is_out_of_time=True, checkpoint_before="epoch-000001", checkpoint="epoch-000002")
    assert _changes(RUNNING, end) == {"state": "preempted", "cause": None, "reason": "stopped by SIGUSR2"}


def test_bad_input_and_nan_are_not_tried_again() -> None:
    bad = UNBEGUN(2, last_line="cell.yaml: not a cell")
    assert _changes(RUNNING, bad) == {"state": "failed", "cause": "error", "reason": "cell.yaml: not a cell"}
    nan = replace(RUNNING, state="failed", cause="nan", reason="the loss is nan")
    assert _changes(nan, End(1)) == {"state": "failed", "cause": "nan", "reason": "the loss is nan"}


def test_a_run_whose_job_is_gone_lost_its_node_unless_the_job_had_been_asked_to_stop() -> None:
    assert after_lost_job(RUNNING, "", "")["failures"] == {"node": 1}
    assert after_lost_job(RUNNING, "SIGUSR2", "")["cause"] is None
    assert after_lost_job(replace(RUNNING, failures={"node": RETRIES["node"]}), "", "")["state"] == "failed"


# How training is started


@pytest.mark.parametrize(
    ("visible", "num_processes", "expected"),
    [
        (None, 1, [None, None, None]),
        ("", 1, ["", "", ""]),
        ("0", 1, ["0", "0", "0"]),
        ("0,1", 1, ["0", "1", "0"]),
        ("4,5,6,7", 2, ["4,5", "6,7", "4,5"]),
        ("0,1", 2, ["0,1", "0,1", "0,1"]),
    ],
)
def test_a_packs_cells_go_round_the_jobs_gpus(
    visible: str | None, num_processes: int, expected: list[str | None]
) -> None:
    assert [devices_of(visible, index, num_processes) for index in range(3)] == expected


def test_nodes_agree_on_the_place_and_one_of_them_hosts_it() -> None:
    word = Word("7_1-0", 2, 1, "node1:20001")
    first, second = (command(["cell.yaml"], 2, 2, node, word) for node in range(2))
    assert [one for one, other in zip(first, second, strict=True) if one != other] == ["is_host=1"]
    assert {"node1:20001", "7_1-0-2"} < set(first)
    assert "--standalone" in command(["cell.yaml"], 2, 1, 0, word)
    assert "torch.distributed.run" not in command(["cell.yaml"], 1, 1, 0, word)


def test_training_sees_its_own_code_and_no_other_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    monkeypatch.setenv("WORLD_SIZE", "16")
    found = environment(Path("/snapshot"), 3, "1")
    assert (found["PYTHONPATH"], found["OMP_NUM_THREADS"]) == ("/snapshot:/theirs", "3")
    assert found["CUDA_VISIBLE_DEVICES"] == "1"
    assert "WORLD_SIZE" not in found
    assert environment(None, 1, None)["PYTHONPATH"] == "/theirs"


def test_nodes_hear_only_newer_words_about_their_own_start_of_the_job(tmp_path: Path) -> None:
    assert rendezvous.heard(tmp_path, "7-0", 0) is None
    word = Word("7-0", 1, 1, rendezvous.free_endpoint("7-0"))
    rendezvous.say(tmp_path, word)
    assert rendezvous.heard(tmp_path, "7-0", 0) == word
    assert rendezvous.heard(tmp_path, "7-0", 1) is None
    assert rendezvous.heard(tmp_path, "7-1", 0) is None


def test_the_last_task_of_an_array_is_named_by_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "413854")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert Place.of_slurm(None).start == "413854-0"
    for name, value in {"ARRAY_JOB_ID": "413854", "ARRAY_TASK_ID": "9", "RESTART_COUNT": "2", "NODEID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = Place.of_slurm(3600)
    assert (place.job_id, place.start, place.node, place.is_out_of_time()) == ("413854_9", "413854_9-2", 1, False)


def test_the_kernels_count_of_kills_is_read_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/job_7/step_0\n", encoding="utf-8")
    assert num_oom_kills(tmp_path / "cgroup", tmp_path) == 0
    (tmp_path / "job_7" / "step_0").mkdir(parents=True)
    events = tmp_path / "job_7" / "step_0" / "memory.events"
    events.write_text("low 0\nhigh 0\nmax 31\noom 2\noom_kill 2\noom_group_kill 0\n", encoding="utf-8")
    assert num_oom_kills(tmp_path / "cgroup", tmp_path) == 2


# Real cells, as tasks of a SLURM job would run them


@pytest.fixture(autouse=True)
def _as_in_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "NODEID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr("launch.attempt.FREE_SECONDS", 0.5)
    monkeypatch.setattr("launch.attempt.PARENT_SECONDS", 0.5)


def _job(*runs: RunDir) -> Job:
    """A job that owns the runs, which lie in one grid."""
    token = f"t{time.time_ns()}"
    Submission(token, (tuple(run.path.name for run in runs),), job_id="4711").write(runs[0].path.parent)
    return Job(tuple(run.path for run in runs), NOWHERE, None, token, num_threads=1)


def _end_of(job: Job) -> int:
    """The job's exit status."""
    try:
        job()
    except JobFailedError:
        return 1
    except SystemExit as end:
        return int(str(end.code))
    return 0


@contextmanager
def _meanwhile(act: Callable[[], None]) -> Iterator[None]:
    thread = Thread(target=act)
    thread.start()
    yield
    thread.join()


def _once_trained(run: RunDir, attempt: int = 1) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if run.state().attempt == attempt and any(run.checkpoints.glob("*.pt")):
            return
        time.sleep(0.02)


def _here(run: RunDir) -> Path:
    """Its newest attempt's folder."""
    attempt = run.newest()
    assert attempt is not None
    return attempt.path


def _trainer(run: RunDir) -> int:
    """Process id of who trains it."""
    return failures.beats(_here(run))[0].process.pid


def test_a_cell_of_another_submission_or_stopped_before_its_job_began_is_left_alone(make_run: MakeRun) -> None:
    run = make_run()
    job = _job(run)
    _job(run)  # a newer record owns it now
    assert _end_of(job) == 0
    assert run.state() == State()
    local = replace(job, submission=None)
    put(run, state="preempted")
    local()
    assert (run.state().state, run.state().attempt) == ("preempted", 1)


def test_a_cell_that_another_process_has_is_left_alone(make_run: MakeRun) -> None:
    run = make_run()
    run.claim()
    assert _end_of(_job(run)) == 0
    assert (run.state().state, run.state().attempt) == ("running", 1)


def test_a_cell_whose_parent_failed_is_cancelled_with_the_reason_and_one_whose_parent_waits_waits(
    make_run: MakeRun,
) -> None:
    parent = make_run(quantizer="fp", quantization={})
    child = make_run(init="finetune", parent=parent.path.name)
    assert _end_of(_job(child)) == 0
    assert child.state().state == "planned"
    put(parent, state="failed", cause="nan")
    assert _end_of(_job(child)) == 0
    assert child.state().state == "cancelled"
    assert child.state().reason == "starts from digits/resnet8/fp/s0, which failed: nan"


def test_a_run_that_lost_its_job_too_often_has_failed(make_run: MakeRun) -> None:
    run = make_run()
    put(run, state="preempted", cause="node", failures={"node": RETRIES["node"]}, failed_at="")
    put(run, state="running", attempt=2)
    assert _end_of(_job(run)) == 1
    assert (run.state().state, run.state().cause) == ("failed", "node")


def test_bad_input_is_the_cells_reason(make_run: MakeRun) -> None:
    run = make_run()
    job = replace(_job(run), train_options=("--no-such-option",))
    assert _end_of(job) == 1
    assert (run.state().state, run.state().cause) == ("failed", "error")
    assert "no such option" in run.state().reason.lower()


@pytest.mark.slow
def test_a_failing_cell_of_a_pack_leaves_the_others_and_the_job_says_which(make_run: MakeRun) -> None:
    good, other = make_run(seed=1), make_run(seed=2)
    diverging = make_run(training__optimizer="sgd", training__learning_rate=1e30)
    with pytest.raises(JobFailedError, match=r"^failed: digits/resnet8/bnn\+\+/s0: nan$"):
        _job(good, diverging, other)()
    assert [run.state().state for run in (good, diverging, other)] == ["done", "failed", "done"]
    assert good.state().job_id == "4711"
    assert "done test/top1_soft" in (_here(good) / "log.txt").read_text(encoding="utf-8")
    assert "DivergedError" not in (_here(good) / "log.txt").read_text(encoding="utf-8")
    assert _end_of(_job(good, other)) == 0, "settled"
    assert good.state().attempt == 1


@pytest.mark.slow
def test_a_signal_saves_asks_to_be_started_again_and_the_cell_ends_as_undisturbed(make_run: MakeRun) -> None:
    recipe = {"training__epochs": 8, "training__batch_size": 64}
    undisturbed, run = make_run("undisturbed", **recipe), make_run("disturbed", **recipe)
    assert _end_of(_job(undisturbed)) == 0
    for attempt, number in enumerate((signal.SIGUSR2, signal.SIGTERM), 1):

        def ask(attempt: int = attempt, number: signal.Signals = number) -> None:
            _once_trained(run, attempt)
            while (beat := failures.beats(_here(run)).get(0)) is None or beat.step is None:
                time.sleep(0.02)
            os.kill(_trainer(run), number)  # as SLURM does: all processes of the step
            os.kill(os.getpid(), number)

        before = signal.getsignal(number)
        with _meanwhile(ask):
            assert _end_of(_job(run)) == EXIT_AGAIN
        assert signal.getsignal(number) == before
        assert (run.state().state, run.state().cause) == ("preempted", None)
        assert run.state().reason == f"stopped by {number.name}"
        assert run.state().failures == {}
        assert failures.noted_stop(_here(run)) == number.name
        assert (run.attempts / f"000{attempt}" / "log.txt").exists()
    assert _end_of(_job(run)) == 0
    assert failures.noted_stop(_here(run)) == ""
    assert run.state().attempt == 3
    assert run.result() == undisturbed.result()


@pytest.mark.slow
def test_a_signal_before_training_listens_is_no_failure(make_run: MakeRun) -> None:
    for delay_seconds in (0.0, 0.3, 1.0, 2.0, 3.0):
        run = make_run(f"after {delay_seconds}", **LONG)

        def ask(run: RunDir = run, delay_seconds: float = delay_seconds) -> None:
            while not list(run.attempts.glob("*/log.txt")):
                time.sleep(0.01)
            time.sleep(delay_seconds)
            os.kill(os.getpid(), signal.SIGUSR2)

        with _meanwhile(ask):
            assert _end_of(_job(run)) == EXIT_AGAIN
        assert (run.state().state, run.state().failures) == ("preempted", {}), delay_seconds
        assert run.state().reason == "stopped by SIGUSR2"


@pytest.mark.slow
def test_a_cancelled_cell_of_a_pack_stops_and_a_killed_one_is_tried_once_more(make_run: MakeRun) -> None:
    cancelled, killed = make_run(seed=1, **LONG), make_run(seed=2, training__epochs=400)

    def disturb() -> None:
        _once_trained(cancelled)
        cancelled.cancel("by hand")
        _once_trained(killed)
        os.kill(_trainer(killed), signal.SIGKILL)

    with _meanwhile(disturb):
        assert _end_of(_job(cancelled, killed)) == EXIT_AGAIN
    assert not cancelled.is_live()
    assert (cancelled.state().state, cancelled.state().reason) == ("cancelled", "by hand")
    assert cancelled.result() is None
    assert (killed.state().state, killed.state().cause) == ("preempted", "error")
    assert killed.state().failures == {"error": 1}


@pytest.mark.slow
def test_two_processes_of_one_node_stop_and_go_on_together(make_run: MakeRun) -> None:
    run = make_run(**LONG)

    def ask() -> None:
        _once_trained(run)
        os.kill(os.getpid(), signal.SIGUSR2)

    with _meanwhile(ask):
        assert _end_of(replace(_job(run), num_processes=2)) == EXIT_AGAIN
    assert (run.state().state, run.state().reason) == ("preempted", "stopped by SIGUSR2")
    assert {beat.rank for beat in failures.beats(_here(run)).values()} == {0, 1}
    assert len({beat.step for beat in failures.beats(_here(run)).values()}) == 1


def test_a_snapshot_has_the_cpp_that_the_optimizer_compiles(tmp_path: Path) -> None:
    code = snapshot.folder_of(tmp_path, snapshot.take(tmp_path))
    for source in (passes.MAPS, passes.PASSES, native.SOURCE):
        assert (code / source.relative_to(Path(snapshot.__file__).parents[1])).read_bytes() == source.read_bytes()
