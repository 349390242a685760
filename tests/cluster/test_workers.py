"""Workers on a real SLURM cluster while they train: commands of users, signals of SLURM, and failing nodes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_cells import tiny_grid

from cluster.commands import MODEST, WriteGrid, launch, run_of, standings, states, told, until, until_queue_is_empty
from cluster.configuration import Settings
from cluster.lab import Lab
from launch.slurm import client
from launch.supply import deaths, jobs
from launch.worker import registry
from suite.run.attempt import Attempt
from suite.run.directory import RunDir
from suite.train import train

NOWHERE = Path("no-data-needed")
PROMPTLY = 10.0
"""Seconds within which a worker has to obey a command."""
pytestmark = pytest.mark.slow


def _training(epochs: int) -> dict[str, Any]:
    return {**tiny_grid()["training"], "epochs": epochs}


def _trains(grid_dir: Path, name: str, attempt: int) -> bool:
    """Whether that attempt at the cell has trained an epoch and is still running."""
    state = standings(grid_dir)[name].state
    return (state.state, state.attempt) == ("running", attempt) and state.epoch > 0


def _live(grid_dir: Path) -> int:
    return len(registry.live_numbers(grid_dir))


def _has_ended(grid_dir: Path, name: str) -> bool:
    newest = run_of(grid_dir, name).newest()
    return newest is not None and newest.end() is not None


def _promptly(is_true: Callable[[], object], grid_dir: Path) -> None:
    begin = time.monotonic()
    until(is_true, grid_dir, 60.0)
    seconds = time.monotonic() - begin
    assert seconds < PROMPTLY, seconds


def test_live_workers_are_scaled_and_follow_an_edited_grid(write_grid: WriteGrid, root: Path) -> None:
    grid_dir, long = root / "tiny", ["bc/s0", "bc/s1", "bc/s2"]
    blocks = [
        {"quantizers": ["bc"], "seeds": [0, 1, 2], "training": _training(20_000)},
        {"quantizers": ["fp"], "seeds": [9]},
    ]
    launch("grid", write_grid(blocks=blocks), *MODEST, "--workers", "3", "--root", root)
    until(lambda: all(_trains(grid_dir, name, 1) for name in long), grid_dir)
    assert states(grid_dir)["fp/s9"] == "queued"
    said = launch("status", "--root", root).stdout
    for worker in registry.workers(grid_dir):
        assert f"worker {worker.number} on {worker.host}, job {worker.job_id}: 1 cell at a time" in said
        assert worker.host.startswith("node")
    assert "at most 3 workers: python -m launch scale N" in said

    assert "at most 1 worker (before: 3); 0 submitted" in launch("scale", "1", "--root", root).stdout
    _promptly(lambda: _live(grid_dir) == 1, grid_dir)
    assert sorted(states(grid_dir).values()) == ["preempted", "preempted", "queued", "running"]
    until(lambda: len(jobs(grid_dir)) == 1, grid_dir)
    assert "2 submitted" in launch("scale", "3", "--root", root).stdout
    until(lambda: sorted(_attempts(grid_dir, long)) == [1, 2, 2], grid_dir)
    until(lambda: {states(grid_dir)[name] for name in long} == {"running"}, grid_dir)

    # The first edit keeps the running cells, the second cancels them.
    edited = write_grid(quantizers=["bnn"])
    refused = launch("grid", edited, *MODEST, "--workers", "3", "--root", root)
    words = "the former recipe has 4 unfinished cells: give --keep-former or --cancel-former\n"
    assert (refused.returncode, refused.stderr) == (2, words)
    assert set(states(grid_dir)) == {*long, "fp/s9"}
    kept = launch("grid", edited, *MODEST, "--workers", "3", "--keep-former", "--root", root)
    assert kept.returncode == 0, kept
    assert "(former recipe)" in launch("status", "--root", root).stdout
    launch("cancel", "bc/s0", "--root", root)
    _promptly(lambda: _has_ended(grid_dir, "bc/s0"), grid_dir)
    until(lambda: {states(grid_dir)[name] for name in ("fp/s9", "bnn/s0")} == {"done"}, grid_dir)
    assert {states(grid_dir)[name] for name in ("bc/s1", "bc/s2")} == {"running"}
    before = {name: run_of(grid_dir, name) for name in ("bc/s1", "bc/s2")}
    last = launch("grid", write_grid(quantizers=["bnn"], seeds=[1]), *MODEST, "--cancel-former", "--root", root)
    assert last.returncode == 0, last
    _promptly(lambda: all(run.newest().end() for run in before.values()), grid_dir)  # type: ignore[union-attr]
    assert {run.state().state for run in before.values()} == {"cancelled"}
    until_queue_is_empty(grid_dir)
    assert states(grid_dir) == {"bnn/s1": "done"}
    assert all(sum(run.state().failures.values()) == 0 for run in before.values())


def _attempts(grid_dir: Path, names: list[str]) -> list[int]:
    rows = standings(grid_dir)
    return [rows[name].state.attempt for name in names]


@pytest.mark.long
def test_a_signal_a_cancellation_and_a_dead_node_cost_an_attempt_each_and_not_a_bit(
    cluster: Lab, write_grid: WriteGrid, root: Path, tmp_path: Path
) -> None:
    grid_dir, name = root / "tiny", "bnn++/s0"
    grid = write_grid(quantizers=["bnn++"], training=_training(30))
    launch("grid", grid, *MODEST, "--checkpoint-steps", "6", "--root", root)
    until(lambda: _trains(grid_dir, name, 1), grid_dir)
    run = run_of(grid_dir, name)
    (job_id,) = jobs(grid_dir)
    client.signal(job_id, "USR2")
    until(lambda: _trains(grid_dir, name, 2), grid_dir)
    assert (Attempt(run.attempts, 1).end() or {})["reason"] == "stopped by SIGUSR2"
    assert Attempt(run.attempts, 2).job_id == job_id

    assert launch("cancel", "--yes", "--root", root).stdout == "1 cancelled\n"
    _promptly(lambda: Attempt(run.attempts, 2).end(), grid_dir)
    until_queue_is_empty(grid_dir, PROMPTLY)
    assert states(grid_dir) == {name: "cancelled"}
    assert launch("retry", "--root", root).stdout.startswith("submitted 1 worker for 1 cell"), told(grid_dir)
    until(lambda: _trains(grid_dir, name, 3), grid_dir)

    node = registry.workers(grid_dir)[-1].host
    cluster.kill_node(node)
    cluster.start_node(node)
    until_queue_is_empty(grid_dir)
    state = run.state()
    assert (state.state, state.attempt, state.failures) == ("done", 4, {"node": 1}), told(grid_dir)
    assert state.job_id == Attempt(run.attempts, 3).job_id != job_id
    assert deaths(grid_dir) == []
    alone = RunDir.create(tmp_path / run.path.name, run.cell())
    train(alone, NOWHERE)
    assert run.result() == alone.result()
    cluster.wait_until_idle()


def test_a_worker_that_slurm_may_not_requeue_hands_in_a_successor(
    cluster: Lab, write_grid: WriteGrid, root: Path
) -> None:
    grid_dir = root / "tiny"
    grid = write_grid(quantizers=["bc"], training=_training(20))
    launch("grid", grid, *MODEST, "--sbatch", "no-requeue", "--root", root)
    until(lambda: _trains(grid_dir, "bc/s0", 1), grid_dir)
    (job_id,) = jobs(grid_dir)
    client.signal(job_id, "USR2")
    until(lambda: states(grid_dir)["bc/s0"] == "done", grid_dir)
    until_queue_is_empty(grid_dir)
    first, second = registry.workers(grid_dir)
    assert first.job_id == job_id != second.job_id
    assert _attempts(grid_dir, ["bc/s0"]) == [2]
    assert "Restarts=0" in cluster.run("scontrol", "show", "job", second.job_id)


def test_a_cell_whose_workers_memory_is_too_small_fails_with_that_cause(
    write_grid: WriteGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    small = ("--partition", "gpu", "--cpus-per-task", "1", "--mem", "200M", "--time", "1h", "--root", root)
    with Lab(Settings(num_nodes=2, cpus_per_node=1, gpus_per_node=0, accounting=False, over_memory_kill=True)) as lab:
        monkeypatch.setenv("SLURM_CONF", str(lab.conf))
        answer = launch("grid", write_grid(quantizers=["fp"]), *small)
        assert answer.stdout.startswith("submitted 1 worker for 1 cell"), answer
        until_queue_is_empty(root / "tiny")
        state = standings(root / "tiny")["fp/s0"].state
        assert (state.state, state.cause, state.attempt) == ("failed", "oom", 2), told(root / "tiny")
        assert "request more with --mem" in state.reason
        killed = "the job's step was killed (status 137): out of memory?"
        assert {dead.reason for dead in deaths(root / "tiny")} == {killed}
        assert killed in launch("status", "--root", root).stdout
