"""Two nodes with two processes each train one cell: as one process would, and through what SLURM does to them."""

import json
import os
import socket
import time
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event, Thread

import pytest
import submitit
from tiny_cells import tiny_cell

from cluster.lab import Lab
from launch.cluster import TEARDOWN
from launch.job import Job
from launch.submissions import Submission
from suite.run import failures, journal
from suite.run.directory import RunDir
from suite.train import train

NOWHERE = Path("no-data-needed")
REPOSITORY = Path(__file__).parents[2]
ROUNDING = 1e-5
# Without batch norm, whose statistics are each process's own.
CELL = tiny_cell(model="vit_mini_patch2_8", training__epochs=4, training__batch_size=64)
NOTE_PLACE = """
import json, os, pathlib
if "RANK" in os.environ:
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURMD_NODENAME"
    place = {name: os.environ[name] for name in names}
    (pathlib.Path(__file__).parent / f"place-{place['RANK']}.json").write_text(json.dumps(place))
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code, in the launcher's way, whose processes note where they are."""
    folder = tmp_path_factory.mktemp("code")
    for package in ("quantizers", "models", "suite", "launch"):
        (folder / package).symlink_to(REPOSITORY / package)
    (folder / "sitecustomize.py").write_text(NOTE_PLACE, encoding="utf-8")
    return folder


def submit(run: RunDir, code: Path, **parameters: object) -> str:
    """Hands SLURM a job of the run, over two nodes; returns its id."""
    grid_dir = run.path.parent
    executor = submitit.SlurmExecutor(folder=grid_dir / "jobs")
    settings = {
        "partition": "gpu",
        "nodes": 2,
        "cpus_per_task": 2,
        "setup": ["trap : USR2 TERM", f"export PYTHONPATH={REPOSITORY}"],
        "teardown": list(TEARDOWN),
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True},
    }
    executor.update_parameters(time=15, ntasks_per_node=1, **settings | parameters)
    token = f"t{time.time_ns()}"
    Submission(token, ((run.path.name,),), job_id="known").write(grid_dir)
    return str(executor.submit(Job((run.path,), NOWHERE, code, token, 1, num_processes=2, num_nodes=2)).job_id)


def state_of(cluster: Lab, job_id: str) -> str:
    """SLURM's word for it."""
    return cluster.run("scontrol", "show", "job", job_id).partition("JobState=")[2].split()[0]


def wait(cluster: Lab, run: RunDir, job_id: str, *, seconds: float = 300.0) -> str:
    """SLURM's word for how the job ended."""
    deadline = time.monotonic() + seconds
    while (state := state_of(cluster, job_id)) in {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"}:
        assert time.monotonic() < deadline, f"{state}; {run.state()}\n{logs(run)}"
        time.sleep(0.3)
    return state


def logs(run: RunDir) -> str:
    """All that the job and training said."""
    paths = [*sorted((run.path.parent / "jobs").glob("*.out")), *sorted(run.attempts.glob("*/log*.txt"))]
    return "\n".join(f"== {path.name}\n{path.read_text(encoding='utf-8', errors='replace')[-4000:]}" for path in paths)


def once_trained(run: RunDir, attempt: int) -> None:
    """Returns once the attempt has saved something and goes on."""
    deadline = time.monotonic() + 90
    while run.state().attempt != attempt or not any(run.checkpoints.glob("*.pt")):
        assert time.monotonic() < deadline, logs(run)
        time.sleep(0.02)


class Thief(Thread):
    """Takes the port that the job's first node chose, before its torchrun can. One in three seconds is enough."""

    def __init__(self, run: RunDir) -> None:
        super().__init__()
        self.word, self.is_over = run.path / "rendezvous.json", Event()

    def run(self) -> None:
        while not self.word.exists() and not self.is_over.is_set():
            time.sleep(0.005)
        with ExitStack() as stack:
            for family in (socket.AF_INET6, socket.AF_INET):
                server = stack.enter_context(closing(socket.socket(family)))
                if family == socket.AF_INET6:
                    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                port = int(json.loads(self.word.read_text(encoding="utf-8"))["endpoint"].rpartition(":")[2])
                server.bind(("", port))
                server.listen()
            self.is_over.wait()


@pytest.fixture(scope="module")
def undisturbed(cluster: Lab, code: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run on two nodes with nothing against it but that its first port was taken."""
    run = RunDir.create(tmp_path_factory.mktemp("undisturbed") / CELL.id, CELL)
    thief = Thief(run)
    thief.start()
    try:
        assert wait(cluster, run, submit(run, code)) == "COMPLETED", logs(run)
    finally:
        thief.is_over.set()
        thief.join()
    return run


def test_each_node_has_two_of_the_four_ranks(undisturbed: RunDir, code: Path) -> None:
    places = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(code.glob("place-*.json"))]
    assert [place["RANK"] for place in places] == ["0", "1", "2", "3"]
    assert {place["WORLD_SIZE"] for place in places} == {"4"}
    nodes = [place["SLURMD_NODENAME"] for place in places]
    assert len(set(nodes)) == 2
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1"] * 2
    assert {beat.rank for beat in failures.beats(undisturbed.attempts / "0001").values()} == {0, 1, 2, 3}


def test_they_train_as_one_process_does(undisturbed: RunDir, tmp_path: Path) -> None:
    alone = RunDir.create(tmp_path / CELL.id, CELL)
    train(alone, NOWHERE)
    losses = [
        [epoch["train/loss"] for epoch in journal.read_metrics(run.journal).values()] for run in (undisturbed, alone)
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=ROUNDING)
    assert losses[0] == pytest.approx(losses[1], rel=100 * ROUNDING)


def test_a_port_that_was_taken_is_followed_by_another(undisturbed: RunDir) -> None:
    assert "EADDRINUSE" in (undisturbed.attempts / "0001" / "log.txt").read_text(encoding="utf-8")
    word = json.loads((undisturbed.path / "rendezvous.json").read_text(encoding="utf-8"))
    assert word["generation"] == 3, "taken, free, and over"
    assert undisturbed.state().attempt == 1
    assert undisturbed.state().failures == {}
    assert (undisturbed.attempts / "0001" / "log-node1.txt").exists()


def test_a_signal_to_the_step_saves_on_all_nodes_requeues_and_ends_as_undisturbed(
    cluster: Lab, undisturbed: RunDir, code: Path, tmp_path: Path
) -> None:
    run = RunDir.create(tmp_path / CELL.id, CELL)
    job_id = submit(run, code)
    once_trained(run, 1)
    cluster.run("scancel", "--signal=USR2", job_id)
    deadline = time.monotonic() + 60
    while run.state().state == "running":
        assert time.monotonic() < deadline, logs(run)
        time.sleep(0.02)
    assert (run.state().state, run.state().reason) == ("preempted", "stopped by SIGUSR2"), logs(run)
    assert len({beat.step for beat in failures.beats(run.attempts / "0001").values()}) == 1
    assert wait(cluster, run, job_id) == "COMPLETED", logs(run)
    assert (run.state().state, run.state().attempt, run.state().failures) == ("done", 2, {})
    assert run.state().job_id == job_id
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", job_id)
    assert run.result() == undisturbed.result()


def test_a_node_that_dies_takes_the_job_back_to_its_last_checkpoint(
    cluster: Lab, undisturbed: RunDir, code: Path, tmp_path: Path
) -> None:
    run = RunDir.create(tmp_path / CELL.id, CELL)
    job_id = submit(run, code)
    once_trained(run, 1)
    nodes = cluster.run("squeue", "-h", "-j", job_id, "-o", "%N").strip()
    last = cluster.run("scontrol", "show", "hostnames", nodes).split()[-1]
    cluster.kill_node(last)
    cluster.start_node(last)
    assert wait(cluster, run, job_id) == "COMPLETED", logs(run)
    assert (run.state().state, run.state().attempt) == ("done", 2)
    assert run.result() == undisturbed.result()
    cluster.wait_until_idle()


def test_a_cell_that_fails_on_another_node_fails_the_job_with_the_reason(
    cluster: Lab, code: Path, tmp_path: Path
) -> None:
    cell = tiny_cell(training__batch_size=64, training__optimizer="sgd", training__learning_rate=1e30)
    run = RunDir.create(tmp_path / cell.id, cell)
    assert wait(cluster, run, submit(run, code)) == "FAILED"
    assert (run.state().state, run.state().cause) == ("failed", "nan")
    assert os.linesep not in run.state().reason
