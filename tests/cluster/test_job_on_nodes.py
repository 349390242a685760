"""Two nodes with one process each train cells in turn, with one process's results, even across a signal."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event, Thread

import pytest
from tiny_cells import tiny_grid

from cluster.commands import SOURCE, WriteGrid, launch, run_of, standings, told, until, until_queue_is_empty
from launch.slurm import client
from launch.supply import jobs
from suite.run import failures, journal
from suite.run.directory import RunDir
from suite.train import train

NOWHERE = Path("no-data-needed")
ROUNDING = 1e-5
TRAINING = {**tiny_grid()["training"], "epochs": 4, "batch_size": 64}
NOTE_PLACE = """
import json, os, pathlib
if "RANK" in os.environ:
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURMD_NODENAME"
    place = {name: os.environ[name] for name in names}
    (pathlib.Path(__file__).parent / f"place-{place['RANK']}.json").write_text(json.dumps(place))
"""
NODES = ("--partition", "gpu", "--nodes", "2", "--gpus-per-node", "1", "--cpus-per-task", "1", "--mem", "1G")
pytestmark = pytest.mark.slow


class Thief(Thread):
    """Takes the port that the first node of a grid's first job chose, before its torchrun does."""

    def __init__(self, grid_dir: Path) -> None:
        super().__init__()
        self._workers, self._is_over = grid_dir / "workers", Event()

    def run(self) -> None:
        """Waits for the first node's word, and occupies its port."""
        while not (words := list(self._workers.glob("meeting-*.json"))):
            if self._is_over.wait(0.005):
                return
        endpoint = json.loads(words[0].read_text(encoding="utf-8"))["endpoint"]
        with ExitStack() as stack:
            for family in (socket.AF_INET6, socket.AF_INET):
                server = stack.enter_context(closing(socket.socket(family)))
                if family == socket.AF_INET6:
                    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                server.bind(("", int(endpoint.rpartition(":")[2])))
                server.listen()
            self._is_over.wait()

    def end(self) -> None:
        """Releases the port."""
        self._is_over.set()
        self.join()


@pytest.fixture
def thief(root: Path) -> Iterator[None]:
    """Steals a port of the grid `tiny`."""
    thief = Thief(root / "tiny")
    thief.start()
    yield
    thief.end()


@pytest.mark.long
@pytest.mark.usefixtures("cluster", "thief")
def test_two_nodes_train_cells_one_after_another(
    write_grid: WriteGrid, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOTE_PLACE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{SOURCE}")
    grid_dir = root / "tiny"
    # No batch norm: each process has its own statistics.
    grid = write_grid(
        models=["vit_mini_patch2_8"],
        quantizers=["bnn++"],
        training=TRAINING,
        execution={"device": "cpu"},
        blocks=[{"seeds": [0]}, {"seeds": [1], "training": {**TRAINING, "epochs": 16}}],
    )
    answer = launch("grid", grid, *NODES, "--workers", "1", "--root", root)
    assert answer.stdout.startswith("submitted 1 worker for 2 cells"), answer
    (job_id,) = jobs(grid_dir)
    until(lambda: standings(grid_dir)["bnn++/s1"].state.epoch > 0, grid_dir, 120)
    first, second = (run_of(grid_dir, name) for name in ("bnn++/s0", "bnn++/s1"))
    client.signal(job_id, "USR2")
    until(second.all_attempts()[0].end, grid_dir)
    assert (second.all_attempts()[0].end() or {})["reason"] == "stopped by SIGUSR2", told(grid_dir)
    until_queue_is_empty(grid_dir)
    assert len({beat.step for beat in failures.beats(second.attempts / "0001").values()}) == 1, "all saved together"

    rows = standings(grid_dir)
    assert {row.state.state for row in rows.values()} == {"done"}, told(grid_dir)
    assert [row.state.attempt for row in rows.values()] == [1, 2]
    assert {row.state.job_id for row in rows.values()} == {job_id}
    assert not any(row.state.failures for row in rows.values()), "neither a taken port nor a signal counts"
    assert "EADDRINUSE" in (first.attempts / "0001" / "log.txt").read_text(encoding="utf-8")
    assert (first.attempts / "0001" / "log-node1.txt").exists()

    places = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.glob("place-*.json"))]
    assert [(place["RANK"], place["WORLD_SIZE"]) for place in places] == [("0", "2"), ("1", "2")]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "0"]
    assert len({place["SLURMD_NODENAME"] for place in places}) == 2
    assert {beat.rank for beat in failures.beats(first.attempts / "0001").values()} == {0, 1}

    alone = RunDir.create(tmp_path / first.path.name, first.cell())
    train(alone, NOWHERE)
    losses = [[epoch["train/loss"] for epoch in journal.read_metrics(run.journal).values()] for run in (first, alone)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=ROUNDING)
    assert losses[0] == pytest.approx(losses[1], rel=100 * ROUNDING)
