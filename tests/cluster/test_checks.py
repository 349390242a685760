"""What SLURM says on a real cluster, and what it would refuse: caught before anything is submitted."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.configuration import Settings
from cluster.lab import Lab
from launch import slurm
from launch.resources import ProfileError, check, load_profile

HELD = ("sbatch", "--parsable", "--hold", "--chdir", "/", "--output", "/dev/null", "-p", "gpu", "--wrap", "sleep 60")


@pytest.fixture
def submit(cluster: Lab) -> Iterator[Callable[..., str]]:
    """Submits a held job and returns its id; cancels it in the end."""
    made: list[str] = []

    def submit(*options: str) -> str:
        made.append(cluster.run(*HELD[:-2], *options, *HELD[-2:]).strip())
        return made[-1]

    yield submit
    slurm.cancel(made)


def _refusal(**flags: object) -> list[str]:
    shape = load_profile(None, flags).on(slurm.partitions()).for_cell(None)
    with pytest.raises(ProfileError) as caught:
        check([shape])
    return str(caught.value).splitlines()


def test_what_the_cluster_has_passes(cluster: Lab) -> None:
    assert cluster.nodes
    flags = {"partition": "gpu", "account": "lab", "qos": "high", "nodes": 2, "gpus_per_node": 2, "pack": 2}
    check([load_profile(None, flags).on(slurm.partitions()).for_cell(None)])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "name a partition with --partition, or in a profile (debug, gpu, urgent)"),
        ({"partition": "gpuu"}, "unknown partition 'gpuu'; did you mean 'gpu'? (debug, gpu, urgent)"),
        ({"account": "labb"}, "unknown account 'labb'; did you mean 'lab'? (lab, other, root)"),
        ({"qos": "hihg"}, "unknown QOS 'hihg'; did you mean 'high'? (high, normal)"),
        ({"nodes": 5}, "--nodes: partition 'gpu' has 4, not 5"),
        ({"gpus_per_node": 3}, "--gpus-per-node: nodes of partition 'gpu' have 2, not 3"),
        ({"cpus_per_task": 17}, "--cpus-per-task: nodes of partition 'gpu' have 16, not 17"),
    ],
)
def test_what_the_cluster_has_not_is_refused_with_what_it_has(
    cluster: Lab, flags: dict[str, object], expected: str
) -> None:
    assert cluster.nodes
    assert _refusal(**({"partition": "gpu"} if flags else {}) | flags)[0] == expected


def test_all_that_is_refused_is_told_at_once(cluster: Lab) -> None:
    assert cluster.nodes
    assert len(_refusal(partition="gpu", account="labb", nodes=9, pack=20, cpus_per_task=2)) == 3


def test_more_time_than_the_partition_allows_is_refused_and_the_default_fits(cluster: Lab) -> None:
    cluster.run("scontrol", "update", "PartitionName=urgent", "MaxTime=02:00:00")
    try:
        assert load_profile(None, {"partition": "urgent"}).on(slurm.partitions()).for_cell(None).time == 120
        said = "--time: 180 minutes are more than the 120 that partition 'urgent' allows; say --time 120m"
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


def test_a_held_job_waits_until_it_is_released(submit: Callable[..., str]) -> None:
    job_id = submit("--array=0-1")
    slurm.release(job_id)
    reasons = {job.reason for name, job in slurm.queue().items() if name.startswith(job_id)}
    assert "JobHeldUser" not in reasons


def test_accounting_has_the_tasks_that_wait_and_those_that_ended(submit: Callable[..., str]) -> None:
    array, lone = submit("--array=0-40:2,57"), submit()
    slurm.cancel([lone])
    expected = {f"{array}_{index}" for index in (*range(0, 41, 2), 57)} | {lone}
    deadline = time.monotonic() + 30
    while set(jobs := slurm.accounting([array, lone])) != expected and time.monotonic() < deadline:  # it lags
        time.sleep(0.5)
    assert set(jobs) == expected
    assert jobs[f"{array}_57"].state == "PENDING"
    assert jobs[lone].state == "CANCELLED"


def test_accounting_of_nothing_is_nothing(cluster: Lab) -> None:
    assert cluster.nodes
    assert slurm.accounting([]) == {}


def test_the_cluster_tells_how_long_an_array_may_be(cluster: Lab) -> None:
    assert slurm.max_array_size() == cluster.settings.max_array_size


@pytest.mark.slow
def test_without_accounting_the_queue_tells_and_any_account_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab(Settings(num_nodes=1, accounting=False)) as lab:
        monkeypatch.setenv("SLURM_CONF", str(lab.conf))
        job_id = lab.run(*HELD).strip()
        assert slurm.queue()[job_id].state == "PENDING"
        assert slurm.accounting([job_id]) == {}
        assert slurm.accounts_and_qos() is None
        check([load_profile(None, {"partition": "gpu", "account": "any"}).on(slurm.partitions()).for_cell(None)])


def test_a_controller_that_is_away_is_told_in_one_line(
    cluster: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "slurm.conf"
    text = re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9\nMessageTimeout=2", cluster.conf.read_text(encoding="utf-8"))
    conf.write_text(text, encoding="utf-8")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    with pytest.raises(slurm.SlurmError, match=r"^squeue: .*Unable to contact slurm controller.*doctor tells more\)$"):
        slurm.queue()
