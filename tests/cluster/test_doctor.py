"""The doctor examines a real cluster from a job on it, and names the fixes."""

import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from cluster.lab import Lab
from launch.doctor import examination
from launch.slurm import client as slurm
from launch.slurm.profile import load_profile

Examine = Callable[..., tuple[bool, str]]


@pytest.fixture
def examine(cluster: Lab, tmp_path: Path) -> Iterator[Examine]:
    """Returns whether all is well, and what the doctor prints."""
    assert cluster.nodes
    data_dir = tmp_path / "data"
    (data_dir / "imagenet").mkdir(parents=True)
    (data_dir / "imagenet" / "train.beton").touch()

    def examine(tracking_uri: str | None = None, **flags: object) -> tuple[bool, str]:
        shape = load_profile(None, flags).on(slurm.partitions()).for_cell(None) if flags else None
        said = io.StringIO()
        root = tmp_path / "runs"
        is_well = examination.doctor(root, data_dir, tracking_uri, shape, Console(file=said, width=200))
        assert not root.exists()  # it leaves nothing behind
        return is_well, said.getvalue()

    yield examine
    assert not any(job.name.endswith("-doctor") and job.is_live for job in slurm.queue().values())


@pytest.mark.slow
def test_a_healthy_cluster_has_no_problem(examine: Examine) -> None:
    is_well, said = examine(partition="gpu", gpus_per_node=0)
    assert is_well, said
    for line in (
        r"ok +SLURM: slurm-wlm .*; Slurmctld\(primary\) at .* is UP",
        r"ok +SLURM's accounting: accounts: .*lab",
        r"ok +partition gpu: 4 nodes: ",
        r"ok +resources of jobs: partition gpu, time 1440 min",
        r"ok +MLflow: .*mlflow.db can be created",
        rf"ok +proxbench on node\d: {re.escape(sys.executable)}",
        r"ok +GPUs on node\d: torch sees 0, the job asked for 0",
        r"ok +ROOT on node\d: seen and writable",
        r"ok +write speed on node\d: \d+ MB/s into ROOT, flushed",
        r"ok +file locks: held here, seen on node\d",
        r"ok +clock of node\d: 0.\d s behind this machine's",
        r"ok +data directory on node\d: seen",
        r"(ok|absent) +FFCV on node\d: ",
        r"ok +signals on node\d: SIGUSR2 reaches a worker",
        r"ok +requeue: SLURM restarts a worker that leaves work behind",
    ):
        assert re.search(f"(?m)^{line}", said), (line, said)


@pytest.mark.slow
def test_gpus_that_torch_does_not_see_are_a_problem(examine: Examine) -> None:
    is_well, said = examine(partition="gpu", gpus_per_node=2)  # the lab's GPUs are fake
    assert not is_well
    assert re.search(r"problem +GPUs on node\d: torch sees 0, the job asked for 2\n +→ install a torch", said)


def test_a_python_that_the_nodes_lack_is_a_problem(examine: Examine) -> None:
    is_well, said = examine(partition="gpu", python="/nowhere/python")
    assert not is_well
    assert re.search(r"problem +Python on the nodes: Python did not start .*/nowhere/python.*\n +→ name an inter", said)


def test_a_python_without_the_package_is_a_problem(examine: Examine, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    flags = {"setup": ["echo loading modules", f"PATH={tmp_path}/bare/bin:$PATH"], "python": "python"}
    is_well, said = examine(partition="gpu", **flags)
    assert not is_well
    assert re.search(r"problem +proxbench on the nodes: python: .*No module named .*\n +→ install proxbench", said)


def test_a_setup_line_that_fails_is_a_problem(examine: Examine) -> None:
    is_well, said = examine(partition="gpu", setup=["module load cuda/99"])
    assert not is_well
    assert "setup line 'module load cuda/99' failed: " in said


def test_a_job_that_sbatch_refuses_is_a_problem(examine: Examine) -> None:
    is_well, said = examine(partition="gpu", sbatch=["reservation=nope"])
    assert not is_well
    assert re.search(r"problem +a worker on the nodes: sbatch: .*Requested reservation is invalid", said)


def test_a_wrong_partition_stops_the_examination_of_nodes(examine: Examine) -> None:
    is_well, said = examine(partition="gpuu")
    assert not is_well
    assert "unknown partition 'gpuu'; did you mean 'gpu'? (debug, gpu, urgent)" in said
    assert re.search(r"can't tell +the nodes: no job can start", said)


def test_a_full_queue_is_told_and_is_no_problem(
    cluster: Lab, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "QUEUE_SECONDS", 2)
    whole = ["--nodes=4", "--exclusive", "--chdir=/", "--output=/dev/null"]
    job_id = cluster.run("sbatch", "--parsable", "--partition=urgent", *whole, "--wrap", "sleep 60").strip()
    try:
        while slurm.queue()[job_id].state != "RUNNING":
            time.sleep(0.2)
        is_well, said = examine(partition="gpu")
    finally:
        slurm.cancel([job_id])
    assert is_well
    assert re.search(r"can't tell +the nodes: none was free within 2 s \(\w+\)\n +→ look at squeue --part", said)


def test_a_dead_tracking_server_is_a_problem(examine: Examine) -> None:
    is_well, said = examine("http://127.0.0.1:9", partition="gpuu")
    assert not is_well
    assert re.search(r"problem +MLflow: http://127.0.0.1:9: .*Connection refused\n +→ start it", said)


@pytest.mark.slow
def test_a_tracking_server_is_asked_from_the_node_and_a_site_may_forbid_requeueing(examine: Examine) -> None:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        uri = f"http://127.0.0.1:{server.server_port}"
        is_well, said = examine(uri, partition="gpu", gpus_per_node=0, sbatch=["no-requeue"])
        server.shutdown()
        thread.join()
    assert is_well, said
    assert f"MLflow: {uri} answers" in said
    assert re.search(rf"ok +MLflow from node\d: {uri} answers", said)
    assert re.search(r"absent +requeue: SLURM does not restart jobs here: workers submit successors", said)


def test_a_controller_that_is_away_is_a_problem(
    cluster: Lab, examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"partition": "gpu"}
    partitions = slurm.partitions()
    monkeypatch.setattr(slurm, "partitions", lambda: partitions)  # only for the shape: the doctor stops at the ping
    conf = tmp_path / "slurm.conf"
    text = re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", cluster.conf.read_text(encoding="utf-8"))
    conf.write_text(text, encoding="utf-8")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    is_well, said = examine(**shape)
    assert not is_well
    assert re.search(r"problem +SLURM's controller: scontrol: Slurmctld\(primary\) at .* is DOWN", said)


@pytest.mark.slow
def test_without_a_partition_this_machine_is_examined(examine: Examine) -> None:
    is_well, said = examine()
    assert is_well
    assert re.search(r"can't tell +its nodes: no partition is named\n +→ name --partition \(debug, gpu, urgent\)", said)
    assert "ROOT on this machine: seen and writable" in said


@pytest.mark.slow
def test_without_slurm_this_machine_is_examined(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))  # noqa: PTH120
    is_well, said = examine()
    assert is_well
    assert "SLURM" not in said
    assert "proxbench on this machine" in said
