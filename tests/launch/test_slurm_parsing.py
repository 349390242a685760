"""The output of SLURM 22.05's client commands is parsed correctly. The texts are from a real cluster."""

import time

import pytest

from launch.slurm.client import (
    Association,
    Config,
    JobInfo,
    SlurmError,
    environment,
    minutes,
    num_gpus,
    parse_associations,
    parse_config,
    parse_end,
    parse_jobs,
    parse_limits,
    parse_out_of_memory,
    parse_partitions,
    time_left_seconds,
)

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
914278_0|REQUEUED
914278_0.batch|CANCELLED
914278_0.0|OUT_OF_MEMORY
914278_1|REQUEUED
914278_1.batch|OUT_OF_MEMORY
914279|CANCELLED by 0
914280|OUT_OF_MEMORY
914278_0|RUNNING
914278_0.batch|RUNNING
914278_0.0|COMPLETED
914278_1|FAILED
914278_1.batch|FAILED
"""
CONFIG = """\
Configuration data as of 2026-11-29T00:50:03
AccountingStorageEnforce = associations,limits,qos
AccountingStorageExternalHost = (null)
JobAcctGatherParams     =
JobRequeue              = 1
MaxArraySize            = 1001
PreemptParameters       =
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio

Slurmctld(primary) at vm is UP
"""
SCONTROL_JOB = "JobId=914 ArrayJobId=913 Requeue=1 StartTime=2026-11-29T00:50:15 EndTime={} Deadline=N/A"
ASSOCIATIONS = """\
lab|lab||high,normal|normal|3
lab|lab|urgent|high|high|
lab|other||normal||
"""
SINFO = """\
debug*|up|infinite|1/2/1/4|16|gpu:2|REQUEUE
mixed|up|1-00:00:00|0/2/0/2|16|gpu:a100:4(S:0-1)|CANCEL
mixed|up|1-00:00:00|3/1/0/4|64|(null)|CANCEL
closed|down|30:00|0/0/2/2|8|(null)|OFF
"""
BANNER = "CLUSTER: lab\nMaintenance on Monday | see the wiki\n"


def test_every_task_in_the_queue_is_a_job() -> None:
    jobs = parse_jobs(SQUEUE)
    assert len(jobs) == 8 + 36
    assert jobs["414257_70"] == JobInfo("414257_70", "PENDING", "JobHeldUser", "", "even")
    assert jobs["414227_2"] == JobInfo("414227_2", "PENDING", "JobArrayTaskLimit", "", "arr")
    assert jobs["414237"] == JobInfo("414237", "RUNNING", "", "node[2-3]", "two")
    assert all(job.is_live for job in jobs.values())


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"])
def test_a_job_that_may_still_run_is_live(state: str) -> None:
    assert JobInfo("1", state, "", "", "").is_live


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "CANCELLED"])
def test_a_job_that_has_ended_is_not_live(state: str) -> None:
    assert not JobInfo("1", state, "", "", "").is_live


def test_a_queue_of_ten_thousand_is_read_in_half_a_second() -> None:
    text = "".join(f"413854_{index}|PENDING|Resources||grid-20261123T000000-0000-abcdef\n" for index in range(10_000))
    started = time.process_time()  # of this process only: a busy machine must not fail the test
    assert len(parse_jobs(text)) == 10_000
    assert time.process_time() - started < 0.5


def test_a_partition_of_several_kinds_of_nodes_is_one() -> None:
    partitions = parse_partitions(SINFO)
    assert list(partitions) == ["debug", "mixed", "closed"]
    mixed = partitions["mixed"]
    assert (mixed.num_nodes, mixed.num_idle, mixed.num_allocated, mixed.num_down) == (6, 3, 3, 0)
    assert (mixed.time_limit_minutes, mixed.max_cpus_per_node, mixed.max_gpus_per_node) == (24 * 60, 64, 4)
    assert mixed.cpus_per_gpu == 4
    assert mixed.has_gpus
    assert mixed.is_up
    assert mixed.preempt_mode == "CANCEL"
    assert [name for name, each in partitions.items() if each.is_default] == ["debug"]


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
    lab, urgent, other = parse_associations(ASSOCIATIONS)
    assert lab == Association("lab", "", ("high", "normal"), True, "normal", 3)
    assert urgent == Association("lab", "urgent", ("high",), True, "high", None)
    assert other == Association("other", "", ("normal",))


def test_lines_of_a_sites_banner_are_skipped() -> None:
    assert parse_jobs(BANNER + SQUEUE) == parse_jobs(SQUEUE)
    assert parse_partitions(BANNER + SINFO) == parse_partitions(SINFO)
    assert parse_associations(BANNER + ASSOCIATIONS) == parse_associations(ASSOCIATIONS)


@pytest.mark.parametrize(
    ("account", "qos", "partition", "expected"),
    [
        (None, None, None, 0),  # three of the default account's three
        ("lab", "high", None, 4),  # a QOS's limit replaces the account's: five minus one
        ("lab", None, "urgent", 4),
        ("other", None, None, None),
        ("unknown", None, None, None),
    ],
)
def test_how_many_more_jobs_may_be_submitted(
    account: str | None, qos: str | None, partition: str | None, expected: int | None
) -> None:
    jobs = "12_[3,5%1]|lab|normal\n13|lab|high\n14|other|normal\n"
    associations = parse_associations(ASSOCIATIONS)
    assert parse_limits(associations, "normal|\nhigh|5\n", jobs, account, qos, partition) == expected


def test_the_configuration_says_what_is_enforced() -> None:
    assert parse_config(CONFIG) == Config(1001, True, True)
    assert parse_config(CONFIG.replace("associations,limits,qos", "none")) == Config(1001, False, False)
    with pytest.raises(SlurmError, match="names no MaxArraySize"):
        parse_config(BANNER)


def test_the_last_start_that_ended_decides_whether_a_job_ran_out_of_memory() -> None:
    assert parse_out_of_memory(SACCT) == {"914278_0", "914280"}


def test_a_jobs_end_is_read_as_local_time() -> None:
    in_an_hour = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 3600))
    left = parse_end(SCONTROL_JOB.format(in_an_hour))
    assert left is not None
    assert 3590 < left <= 3600
    assert parse_end(SCONTROL_JOB.format("Unknown")) is None


def test_slurms_own_variable_says_when_the_job_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    left = time_left_seconds("12_3")
    assert left is not None
    assert 90 < left <= 100


def test_commands_see_nothing_of_a_users_defaults_or_of_a_job_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    bending = ("SBATCH_PARTITION", "SALLOC_ACCOUNT", "SQUEUE_FORMAT", "SLURM_CPU_BIND", "SLURM_CONF_SERVER")
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURMLAB")
    for name in (*bending, *kept):
        monkeypatch.setenv(name, "x")
    assert not set(bending) & set(environment())
    assert set(kept) <= set(environment())


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
