"""How an attempt's end changes its run, how training is started, and where a worker runs: pure functions."""

import json
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launch.plan import RETRIES
from launch.worker import rendezvous
from launch.worker.ending import End, after_attempt, after_lost_worker
from launch.worker.memory import num_oom_kills
from launch.worker.rendezvous import Word
from launch.worker.spec import Place, WorkerSpec
from launch.worker.training_process import command, environment
from suite.run.directory import State

# How an attempt's end changes its run's state

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
        (RUNNING, UNBEGUN(-signal.SIGUSR2), "stopped by SIGUSR2"),  # before it set its handlers
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
        (RUNNING, End(-9, is_out_of_memory=True), "oom", "killed by the kernel: the job ran out of memory"),
        (RUNNING, End(1, is_group=True), "node", "a training process died without an error message"),
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


def test_bad_input_keeps_the_failures_counted_before() -> None:
    now = replace(RUNNING, failures={"node": 2}, failed_at="epoch-000001")
    changes = after_attempt(now, UNBEGUN(2, last_line="no such option"))
    assert (changes["failures"], changes["failed_at"]) == ({"node": 2}, "epoch-000001")


def test_a_run_whose_worker_is_gone_lost_its_node_unless_that_had_been_asked_to_stop() -> None:
    lost = partial(after_lost_worker, is_out_of_memory=False)
    assert lost(RUNNING, "", "")["failures"] == {"node": 1}
    assert lost(RUNNING, "SIGUSR2", "")["cause"] is None
    assert lost(replace(RUNNING, failures={"node": RETRIES["node"]}), "", "")["state"] == "failed"
    out_of_memory = after_lost_worker(RUNNING, "SIGUSR2", "", is_out_of_memory=True)
    assert (out_of_memory["state"], out_of_memory["failures"]) == ("preempted", {"oom": 1})


def test_a_newer_checkpoint_forgets_earlier_failures() -> None:
    now = replace(RUNNING, failures={"error": 1}, failed_at="epoch-000001")
    assert after_attempt(now, End(-11, checkpoint="epoch-000001"))["state"] == "failed"
    assert after_attempt(now, End(-11, checkpoint="epoch-000002"))["failures"] == {"error": 1}


# How training is started


def test_nodes_agree_on_the_place_and_one_of_them_hosts_it() -> None:
    word = Word("7_1-0", 2, "0123456789ab", 1, "node1:20001")
    first, second = (command(["cell.yaml"], 2, 2, node, word) for node in range(2))
    assert [one for one, other in zip(first, second, strict=True) if one != other] == ["is_host=1"]
    assert {"node1:20001", "7_1-0-2"} < set(first)
    assert "--standalone" in command(["cell.yaml"], 2, 1, 0, word)
    assert "torch.distributed.run" not in command(["cell.yaml"], 1, 1, 0, word)


def test_training_sees_its_own_code_and_no_other_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    monkeypatch.setenv("WORLD_SIZE", "16")
    found = environment(Path("/snapshot"), 3)
    assert (found["PYTHONPATH"], found["OMP_NUM_THREADS"]) == ("/snapshot:/theirs", "3")
    assert "WORLD_SIZE" not in found
    assert environment(None, 1)["PYTHONPATH"] == "/theirs"


def test_nodes_hear_only_newer_words_about_their_own_start_of_the_job(tmp_path: Path) -> None:
    path = tmp_path / "meeting.json"
    assert rendezvous.heard(path, "7-0", 0) is None
    word = Word("7-0", 1, "0123456789ab", 1, rendezvous.free_endpoint("7-0"))
    rendezvous.say(path, word)
    assert rendezvous.heard(path, "7-0", 0) == word
    assert rendezvous.heard(path, "7-0", 1) is None
    assert rendezvous.heard(path, "7-1", 0) is None


def test_the_last_task_of_an_array_is_named_by_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "NODEID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "413854")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert Place.of_slurm().start == "413854-0"
    for name, value in {"ARRAY_JOB_ID": "413854", "ARRAY_TASK_ID": "9", "RESTART_COUNT": "2", "NODEID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = Place.of_slurm()
    assert (place.job_id, place.start, place.node) == ("413854_9", "413854_9-2", 1)
    assert place.seconds_left() == pytest.approx(3600, abs=5)
    assert not place.is_out_of_time(time.monotonic())


def test_only_an_attempt_that_had_half_of_the_jobs_time_ran_out_of_it() -> None:
    begun = time.monotonic()
    place = Place(seconds=100.0, _begun=begun - 60)
    assert place.is_out_of_time(begun - 60)
    assert not place.is_out_of_time(begun), "it began in the second half"
    assert not Place(seconds=100.0).is_out_of_time(begun), "half of the time is left"
    assert not Place(seconds=10_000.0).is_out_of_time(begun)
    assert not Place().is_out_of_time(begun)
    assert Place().seconds_left() == float("inf")


def test_a_spec_comes_back_as_it_was_written_also_from_a_newer_launcher(tmp_path: Path) -> None:
    spec = WorkerSpec(tmp_path, tmp_path / "data", tmp_path / "code", "a", cells=("x", "y"), num_gpus=4, max_slots=2)
    path = spec.write(tmp_path / "jobs" / "token" / "spec.json")
    assert WorkerSpec.read(path) == spec
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"novelty": 1}), encoding="utf-8")
    assert WorkerSpec.read(path) == spec
    bare = WorkerSpec(tmp_path, tmp_path)
    assert WorkerSpec.read(bare.write(path)) == bare


@pytest.mark.parametrize(
    ("cgroup", "counted", "text"),
    [
        ("0::/job_7/step_0\n", "job_7/step_0/memory.events", "low 0\nhigh 0\nmax 31\noom 2\noom_kill 2\n"),
        (
            "11:cpu,cpuacct:/other\n5:memory:/slurm/job_7\n0::/\n",
            "memory/slurm/job_7/memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        ),
    ],
    ids=["v2", "v1"],
)
def test_the_kernels_count_of_kills_is_read_where_there_is_one(
    tmp_path: Path, cgroup: str, counted: str, text: str
) -> None:
    (tmp_path / "cgroup").write_text(cgroup, encoding="utf-8")
    assert num_oom_kills(tmp_path / "cgroup", tmp_path) == 0
    (tmp_path / counted).parent.mkdir(parents=True)
    (tmp_path / counted).write_text(text, encoding="utf-8")
    assert num_oom_kills(tmp_path / "cgroup", tmp_path) == 2
    (tmp_path / counted).write_text("unreadable\n", encoding="utf-8")
    assert num_oom_kills(tmp_path / "cgroup", tmp_path) == 0
    assert num_oom_kills(tmp_path / "nowhere", tmp_path) == 0
