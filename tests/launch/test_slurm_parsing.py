"""What SLURM 22.05's client commands print is read right. The texts are a real cluster's."""

import time

import pytest

from launch.slurm import JobInfo, minutes, num_gpus, parse_associations, parse_jobs, parse_partitions

SQUEUE = """\
414239_[3-4]|PENDING|JobHeldUser||heldarr
414227_[2%2]|PENDING|JobArrayTaskLimit||arr
414257_[0-70:2]|PENDING|JobHeldUser||even
414235|PENDING|PartitionConfig||big2
414238|PENDING|Dependency||dep2
414227_0|RUNNING|None|node1|arr
414228|RUNNING|None|node1|lone job
414237|RUNNING|None|node[2-3]|two
"""
SACCT = """\
414227_0|COMPLETED|None|node1|arr
414227_2|COMPLETED|JobArrayTaskLimit|node1|arr
414227_[3-5]|PENDING|JobArrayTaskLimit|None assigned|arr
414232|FAILED|None|node1|fails
414235|CANCELLED by 0|PartitionConfig|None assigned|big2
414244_[0,2-8:2,57%4]|PENDING|JobHeldUser|None assigned|longarr
"""
SINFO = """\
debug|up|infinite|1/2/1/4|16|gpu:2
mixed|up|1-00:00:00|0/2/0/2|16+|gpu:a100:4(S:0-1)
mixed|up|1-00:00:00|3/1/0/4|64|(null)
closed|down|30:00|0/0/2/2|8|(null)
"""


def test_every_task_in_the_queue_is_a_job() -> None:
    jobs = parse_jobs(SQUEUE)
    assert len(jobs) == 8 + 36
    assert jobs["414257_70"] == JobInfo("414257_70", "PENDING", "JobHeldUser", "", "even")
    assert jobs["414227_2"] == JobInfo("414227_2", "PENDING", "JobArrayTaskLimit", "", "arr")
    assert jobs["414237"] == JobInfo("414237", "RUNNING", "", "node[2-3]", "two")
    assert all(job.is_live for job in jobs.values())


def test_accounting_says_what_became_of_a_job() -> None:
    jobs = parse_jobs(SACCT)
    assert jobs["414235"] == JobInfo("414235", "CANCELLED", "", "", "big2")
    assert jobs["414227_2"].reason == ""
    assert not any(jobs[job_id].is_live for job_id in ("414227_0", "414232", "414235"))


def test_tasks_that_accounting_tells_of_together_are_told_apart() -> None:
    jobs = parse_jobs(SACCT)
    assert [job_id for job_id in jobs if job_id.startswith("414227")] == [f"414227_{task}" for task in (0, 2, 3, 4, 5)]
    assert [job_id for job_id in jobs if job_id.startswith("414244")] == [f"414244_{i}" for i in (0, 2, 4, 6, 8, 57)]
    assert jobs["414244_57"] == JobInfo("414244_57", "PENDING", "JobHeldUser", "", "longarr")


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"])
def test_a_job_that_may_still_run_is_live(state: str) -> None:
    assert JobInfo("1", state, "", "", "").is_live


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "CANCELLED"])
def test_a_job_that_has_ended_is_not_live(state: str) -> None:
    assert not JobInfo("1", state, "", "", "").is_live


def test_a_queue_of_ten_thousand_is_read_in_half_a_second() -> None:
    text = "".join(f"413854_{index}|PENDING|Resources||grid-20261123T000000-0000-abcdef\n" for index in range(10_000))
    started = time.perf_counter()
    assert len(parse_jobs(text)) == 10_000
    assert time.perf_counter() - started < 0.5


def test_a_partition_of_several_kinds_of_nodes_is_one() -> None:
    partitions = parse_partitions(SINFO)
    assert list(partitions) == ["debug", "mixed", "closed"]
    mixed = partitions["mixed"]
    assert (mixed.num_nodes, mixed.num_idle, mixed.num_allocated, mixed.num_down) == (6, 3, 3, 0)
    assert (mixed.time_limit_minutes, mixed.max_cpus_per_node, mixed.max_gpus_per_node) == (24 * 60, 64, 4)
    assert mixed.cpus_per_gpu == 4
    assert mixed.has_gpus
    assert mixed.is_up


def test_a_partition_may_be_endless_or_closed_or_without_gpus() -> None:
    partitions = parse_partitions(SINFO)
    assert partitions["debug"].time_limit_minutes is None
    assert partitions["debug"].num_down == 1
    assert not partitions["closed"].is_up
    assert not partitions["closed"].has_gpus
    assert partitions["closed"].cpus_per_gpu == 0


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("(null)", 0),
        ("gpu:2", 2),
        ("gpu:a100:4(S:0-1)", 4),
        ("gpu:a100:4(S:0-1),gpu:h100:2,nvme:1", 6),
        ("shard:8", 0),
    ],
)
def test_gpus_are_counted_whatever_their_make(gres: str, expected: int) -> None:
    assert num_gpus(gres) == expected


def test_associations_name_accounts_and_qualities_of_service() -> None:
    lab, root = parse_associations("lab||high,normal\nroot|gpu|\n")
    assert (lab.account, lab.partition, lab.qos) == ("lab", "", ("high", "normal"))
    assert (root.account, root.partition, root.qos) == ("root", "gpu", ())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("90:00", 90),
        ("0:30", 1),
        ("1:30:00", 90),
        ("1-12", 36 * 60),
        ("1-12:30", 36 * 60 + 30),
        ("1-00:00:01", 24 * 60 + 1),
        ("90m", 90),
        ("12h", 12 * 60),
        ("2d", 48 * 60),
        ("infinite", None),
        ("UNLIMITED", None),
    ],
)
def test_times_are_read_as_slurm_and_people_write_them(text: str, expected: int | None) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "banana", "12 h", "-1", "1:2:3:4", "1.5h"])
def test_what_is_no_time_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match="write 90m, 12h, 2d"):
        minutes(text)
