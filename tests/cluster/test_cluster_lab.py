"""Tests of the cluster that this folder's other tests use."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import processes
from cluster.configuration import Settings
from cluster.lab import Lab, LabError

TESTS = Path(__file__).parents[1]


def eventually(is_true: Callable[[], bool], seconds: float = 45.0) -> bool:
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def submit(cluster: Lab, script: str, *options: str) -> str:
    command = ["sbatch", "--parsable", "--chdir", "/", "--output", "/dev/null", *options, "--wrap", script]
    return cluster.run(*command).strip()


def test_every_node_is_idle_and_has_its_gpus(cluster: Lab) -> None:
    cluster.wait_until_idle()
    nodes = cluster.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %T %G").splitlines()
    assert nodes == [f"node{number} idle gpu:2" for number in (1, 2, 3, 4)]


def test_a_step_runs_once_on_each_node_with_the_gpus_it_asked_for(cluster: Lab) -> None:
    command = ["srun", "-p", "gpu", "-N4", "--gpus-per-node=2", "sh", "-c", "echo $SLURMD_NODENAME $SLURM_GPUS_ON_NODE"]
    assert sorted(cluster.run(*command).splitlines()) == [f"node{number} 2" for number in (1, 2, 3, 4)]


def test_slurms_commands_find_the_cluster_without_being_told(cluster: Lab) -> None:
    shown = subprocess.run(["scontrol", "show", "config"], check=True, capture_output=True, text=True).stdout
    assert str(cluster.conf) in shown
    assert "MaxArraySize            = 1001" in shown


def test_sacct_tells_how_a_job_ended(cluster: Lab) -> None:
    job = submit(cluster, "exit 3")
    assert eventually(lambda: cluster.run("sacct", "-nXPj", job, "-o", "State,ExitCode").strip() == "FAILED|3:0")


@pytest.mark.parametrize("option", ["--account=nobody", "--qos=nothing", "--partition=nowhere"])
def test_an_unknown_account_qos_or_partition_is_refused(cluster: Lab, option: str) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        submit(cluster, "true", option)


def test_the_known_accounts_and_qos_are_accepted(cluster: Lab) -> None:
    assert submit(cluster, "true", "--account=lab", "--qos=high")
    assert submit(cluster, "true", "--account=other", "--qos=normal")


def test_a_killed_nodes_job_runs_again_and_nothing_of_it_survives(cluster: Lab, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    script = f'echo "$SLURM_RESTART_COUNT" >>{starts}; [ "$SLURM_RESTART_COUNT" ] || {{ setsid sleep 600 & wait; }}'
    job = submit(cluster, script, "--requeue", "--nodelist=node2")
    assert eventually(starts.exists)
    of_job = (f"SLURM_CONF={cluster.conf}", f"SLURM_JOB_ID={job}")
    assert processes.found(*of_job)

    cluster.kill_node("node2")
    assert not processes.found(*of_job)
    cluster.start_node("node2")

    assert eventually(lambda: cluster.run("sacct", "-nXPj", job, "-o", "State").strip() == "COMPLETED")
    assert starts.read_text().split("\n") == ["", "1", ""]


def test_an_urgent_job_preempts_one_of_partition_gpu_which_runs_again(cluster: Lab, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    script = f'echo "$SLURM_RESTART_COUNT" >>{starts}; [ "$SLURM_RESTART_COUNT" ] || sleep 600'
    job = submit(cluster, script, "--requeue", "--partition=gpu", "--nodelist=node3")
    assert eventually(starts.exists)
    submit(cluster, "true", "--partition=urgent", "--exclusive", "--nodelist=node3")
    assert eventually(lambda: cluster.run("sacct", "-nXPj", job, "-o", "State").strip() == "COMPLETED")
    assert starts.read_text().split("\n") == ["", "1", ""]


def test_a_daemon_that_does_not_start_is_named_with_the_end_of_its_log(cluster: Lab) -> None:
    assert cluster.nodes  # SLURM is installed
    broken = Lab(Settings(cpus_per_node=-1, accounting=False))
    with pytest.raises(LabError, match=r"(?s)slurmctld ended with status 1; its log ends:.*CPUs=-1"), broken:
        pass
    assert not broken.folder.exists()
    assert not processes.found(f"SLURM_CONF={broken.conf}")


def test_nothing_is_left_of_a_cluster_whose_owner_is_killed(cluster: Lab) -> None:
    assert cluster.nodes
    program = """\
import os, signal
from cluster.lab import Lab, Settings
with Lab(Settings(num_nodes=1, accounting=False)) as lab:
    lab.run("sbatch", "--chdir", "/", "--output", "/dev/null", "--wrap", "sleep 600")
    print(lab.folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    killed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    folder = Path(killed.stdout.strip())
    assert folder.name.startswith("lab-"), killed.stderr
    assert eventually(lambda: not folder.exists() and not processes.found(f"SLURM_CONF={folder / 'slurm.conf'}"))
