"""The client functions on a real cluster, and requests that it would refuse: caught before anything is submitted."""

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.configuration import Settings
from cluster.lab import Lab
from launch.slurm import client as slurm
from launch.slurm.profile import load_profile
from launch.slurm.resources import ProfileError, check

HELD = ("sbatch", "--parsable", "--hold", "--chdir", "/", "--output", "/dev/null", "-p", "gpu", "--wrap", "sleep 60")


@pytest.fixture
def submit(cluster: Lab) -> Iterator[Callable[..., str]]:
    """Submits held jobs and returns their ids; cancels them at the end."""
    made: list[str] = []

    def submit(*options: str) -> str:
        made.append(cluster.run(*HELD[:-2], *options, *HELD[-2:]).strip())
        return made[-1]

    yield submit
    slurm.cancel(made)


def _wait(is_true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _refusal(**flags: object) -> list[str]:
    shape = load_profile(None, flags).on(slurm.partitions()).for_cell(None)
    with pytest.raises(ProfileError) as caught:
        check([shape])
    return str(caught.value).splitlines()


def test_what_the_cluster_has_passes(cluster: Lab) -> None:
    assert cluster.nodes
    flags = {"partition": "gpu", "account": "lab", "qos": "high", "nodes": 2, "gpus_per_node": 2}
    check([load_profile(None, flags).on(slurm.partitions()).for_cell(None)])


@pytest.mark.parametrize("flags", [{}, {"partition": "debug,gpu"}, {"partition": "urgent,debug", "account": "LAB"}])
def test_a_partition_may_be_the_sites_default_or_one_of_several(cluster: Lab, flags: dict[str, object]) -> None:
    assert cluster.nodes
    shape = load_profile(None, flags).on(slurm.partitions()).for_cell(None)
    assert (shape.gpus_per_node, shape.cpus_per_task) == (1, 8)
    check([shape])


def test_one_of_several_partitions_has_to_take_the_job(cluster: Lab) -> None:
    cluster.run("scontrol", "update", "PartitionName=urgent", "State=DOWN", "MaxTime=02:00:00")
    try:
        check([load_profile(None, {"partition": "urgent,gpu", "time": "3h"}).on(slurm.partitions()).for_cell(None)])
        lines = _refusal(partition="gpu,urgent", nodes=5)
        assert [line.partition(":")[0] for line in lines] == [
            "--nodes",
            "partition 'urgent' is down",
            "--time",
            "--nodes",
        ]
    finally:
        cluster.run("scontrol", "update", "PartitionName=urgent", "State=UP", "MaxTime=UNLIMITED")


def test_hidden_partitions_are_known(cluster: Lab) -> None:
    cluster.run("scontrol", "create", "PartitionName=hidden", "Nodes=ALL", "Hidden=YES", "PreemptMode=CANCEL")
    try:
        hidden = slurm.partitions()["hidden"]
        assert (hidden.num_nodes, hidden.preempt_mode) == (4, "CANCEL")
    finally:
        cluster.run("scontrol", "delete", "PartitionName=hidden")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"partition": "gpuu"}, "unknown partition 'gpuu'; did you mean 'gpu'? (debug, gpu, urgent)"),
        ({"account": "labb"}, "unknown account 'labb'; did you mean 'lab'? (lab, other, root)"),
        ({"qos": "hihg"}, "unknown QOS 'hihg'; did you mean 'high'? (high, normal)"),
        ({"nodes": 5}, "--nodes: partition 'gpu' has 4, not 5"),
        ({"partition": "gpu,urgentt"}, "unknown partition 'urgentt'; did you mean 'urgent'? (debug, gpu, urgent)"),
        ({"gpus_per_node": 3}, "--gpus-per-node: nodes of partition 'gpu' have 2 GPUs, not 3"),
        ({"gpus_per_cell": 3}, "--gpus-per-cell: nodes of partition 'gpu' have 2 GPUs, not 3"),
        ({"gres": "gpu:3"}, "--gres: nodes of partition 'gpu' have 2 GPUs, not 3"),
        ({"cpus_per_task": 17}, "--cpus-per-task: nodes of partition 'gpu' with 1 GPU have 16 cores, not 17"),
        ({"cells_per_gpu": 17}, "--cells-per-gpu: nodes of partition 'gpu' with 1 GPU have 16 cores, not 17"),
        (
            {"cpus_per_task": 2, "cells_per_gpu": 3},
            "--cpus-per-task: 3 training processes per node need 3 cores, not 2",
        ),
    ],
)
def test_what_the_cluster_has_not_is_refused_with_what_it_has(
    cluster: Lab, flags: dict[str, object], expected: str
) -> None:
    assert cluster.nodes
    assert _refusal(**{"partition": "gpu"} | flags) == [expected]


def test_all_that_is_refused_is_told_at_once(cluster: Lab) -> None:
    assert cluster.nodes
    assert len(_refusal(partition="gpu", account="labb", nodes=9, cpus_per_task=17)) == 3


def test_more_time_than_the_partition_allows_is_refused_and_the_default_fits(cluster: Lab) -> None:
    cluster.run("scontrol", "update", "PartitionName=urgent", "MaxTime=02:00:00")
    try:
        assert load_profile(None, {"partition": "urgent"}).on(slurm.partitions()).for_cell(None).time == 120
        said = "--time: 180 minutes are more than the 120 that partition 'urgent' allows; use --time 120m"
        assert _refusal(partition="urgent", time="3h") == [said]
    finally:
        cluster.run("scontrol", "update", "PartitionName=urgent", "MaxTime=UNLIMITED")


def test_a_partition_that_is_down_is_refused(cluster: Lab) -> None:
    cluster.run("scontrol", "update", "PartitionName=urgent", "State=DOWN")
    try:
        assert _refusal(partition="urgent")[0].startswith("partition 'urgent' is down")
    finally:
        cluster.run("scontrol", "update", "PartitionName=urgent", "State=UP")


def test_the_queue_has_every_task_of_an_array_until_it_is_cancelled(submit: Callable[..., str]) -> None:
    array, lone = submit("--array=0-70:2", "--job-name=even"), submit("--job-name=lone")
    queue = slurm.queue()
    assert {job_id for job_id, job in queue.items() if job.name == "even"} == {f"{array}_{i}" for i in range(0, 71, 2)}
    assert queue[lone] == slurm.JobInfo(lone, "PENDING", "JobHeldUser", "", "lone")
    slurm.cancel([f"{array}_0", f"{array}_2", lone, "999999999"])
    assert {f"{array}_0", f"{array}_2", lone}.isdisjoint(slurm.queue())


def test_a_running_job_has_an_end(cluster: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    script = ("--parsable", "--time", "30", "--chdir", "/", "--output", "/dev/null", "--array=1", "--wrap", "sleep 60")
    array = cluster.run("sbatch", *script).strip()
    job_id = f"{array}_1"
    try:
        _wait(lambda: (job := slurm.queue().get(job_id)) is not None and job.state == "RUNNING")
        left = slurm.time_left_seconds(job_id)
        assert left is not None
        assert 1700 < left <= 1800
        assert slurm.time_left_seconds("999999999") is None
    finally:
        slurm.cancel([array])


def test_a_job_that_ended_well_did_not_run_out_of_memory(submit: Callable[..., str]) -> None:
    assert slurm.out_of_memory([submit(), "999999999"]) == set()
    assert slurm.out_of_memory([]) == set()


def test_submit_limits_are_those_of_the_account_unless_the_qos_has_its_own(
    cluster: Lab, submit: Callable[..., str]
) -> None:
    def account(*changes: str) -> None:
        cluster.run("sacctmgr", "-i", "-Q", "modify", *changes)

    def room(account: str | None = None, qos: str | None = None) -> int | None:
        return slurm.limits(account, qos)

    assert room() is None
    submit("--array=0-1")
    account("user", "root", "where", "account=lab", "set", "MaxSubmitJobs=5")
    account("qos", "high", "set", "MaxSubmitJobsPerUser=9")
    try:
        assert (room(), room("lab", "normal"), room("lab", "high"), room("other")) == (3, 3, 9, None)
        submit("--array=0-3", "--qos=high")
        assert (room("lab", "high"), room("other", "high")) == (5, 5)
        assert room() == 0
    finally:
        account("user", "root", "where", "account=lab", "set", "MaxSubmitJobs=-1")
        account("qos", "high", "set", "MaxSubmitJobsPerUser=-1")


def test_the_cluster_tells_its_configuration(cluster: Lab) -> None:
    size = cluster.settings.max_array_size
    assert slurm.config() == slurm.Config(size, enforces_accounts=True, enforces_limits=True)


def test_commands_obey_neither_the_users_formats_nor_the_job_around_them(
    cluster: Lab, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.nodes
    job_id = submit()
    for name, value in {"SQUEUE_FORMAT": "%T", "SQUEUE_PARTITION": "debug", "SINFO_FORMAT": "%P"}.items():
        monkeypatch.setenv(name, value)
    assert job_id in slurm.queue()
    assert "gpu" in slurm.partitions()
    assert os.environ["SQUEUE_FORMAT"] == "%T"


@pytest.mark.slow
def test_without_accounting_the_queue_tells_and_any_account_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab(Settings(num_nodes=1, accounting=False)) as lab:
        monkeypatch.setenv("SLURM_CONF", str(lab.conf))
        job_id = lab.run(*HELD).strip()
        assert slurm.queue()[job_id].state == "PENDING"
        assert slurm.out_of_memory([job_id]) == set()
        assert slurm.limits(None, None) is None
        assert slurm.accounts_and_qos() is None
        check([load_profile(None, {"partition": "gpu", "account": "any"}).on(slurm.partitions()).for_cell(None)])


@pytest.mark.slow
def test_nodes_of_different_sizes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab(Settings(num_nodes=2, cpus_per_node=8, cpus_of_last_node=32, accounting=False)) as lab:
        monkeypatch.setenv("SLURM_CONF", str(lab.conf))
        assert set(slurm.partitions()["gpu"].kinds) == {(8, 2), (32, 2)}
        check([load_profile(None, {"cpus_per_task": 32}).on(slurm.partitions()).for_cell(None)])
        lab.run(*HELD[:-2], "--cpus-per-task=32", *HELD[-2:])
        assert _refusal(cpus_per_task=33)[0].endswith("have 32 cores, not 33")


def test_a_controller_that_is_away_is_told_in_one_line(
    cluster: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "slurm.conf"
    text = re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9\nMessageTimeout=2", cluster.conf.read_text(encoding="utf-8"))
    conf.write_text(text, encoding="utf-8")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    with pytest.raises(
        slurm.SlurmError, match=r"^squeue: .*Unable to contact slurm controller.*\(details: python -m launch doctor\)$"
    ):
        slurm.queue()
