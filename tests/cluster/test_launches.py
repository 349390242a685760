"""`python -m launch` on a real SLURM cluster: what is submitted, once, by whoever launches however often."""

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.commands import MODEST, WriteGrid, launch
from cluster.lab import Lab
from launch import slurm, submissions
from launch.submissions import job_name, owners
from suite.run.directory import planned_cells

# Three arrays: two full-precision cells, and one cell that starts from each.
FAMILIES = {"quantizers": ["fp"], "seeds": [0, 1], "blocks": [{}, {"init": "finetune", "quantizers": ["bc"]}]}


def live_jobs(grid_dir: Path) -> Counter[str]:
    """Cell id -> how many jobs in SLURM's queue, held or not, are going to run it."""
    names = {job_name(grid_dir, record.token): record for record in submissions.read(grid_dir)}
    counts: Counter[str] = Counter()
    for job in slurm.queue().values():
        if job.name in names and job.is_live:
            record = names[job.name]
            index = int(job.job_id.partition("_")[2] or 0)
            counts.update(record.tasks[index])
    return counts


@pytest.fixture
def waiting(cluster: Lab, tmp_path: Path) -> Iterator[Path]:
    """A ROOT, and a cluster on which jobs only wait; they are cancelled afterwards."""
    nodes = ",".join(cluster.nodes)
    cluster.run("scontrol", "update", f"nodename={nodes}", "state=drain", "reason=test")
    yield tmp_path / "runs"
    cluster.run("scancel", "--user=root")
    cluster.run("scontrol", "update", f"nodename={nodes}", "state=resume")


def test_a_launch_submits_every_cell_once_and_a_second_none(write_grid: WriteGrid, waiting: Path) -> None:
    grid = write_grid(**FAMILIES)
    first = launch("grid", grid, *MODEST, "--root", waiting)
    assert first.returncode == 0, first.stderr
    assert "submitted 4 cells as 3 jobs" in first.stdout
    before = live_jobs(waiting / "tiny")
    assert before == dict.fromkeys(planned_cells(waiting / "tiny"), 1)
    second = launch("grid", grid, *MODEST, "--root", waiting)
    assert "nothing to submit" in second.stdout
    assert live_jobs(waiting / "tiny") == before
    assert len(submissions.read(waiting / "tiny")) == 3


def test_cells_wait_for_their_parents_job(write_grid: WriteGrid, waiting: Path) -> None:
    launch("grid", write_grid(**FAMILIES), *MODEST, "--root", waiting)
    cells = planned_cells(waiting / "tiny")
    jobs = {cell: record.task_job_id(at) for cell, (record, at) in owners(submissions.read(waiting / "tiny")).items()}
    for cell in cells.values():
        if cell.parent is not None:
            shown = subprocess.check_output(["scontrol", "show", "job", jobs[cell.id]], text=True)
            assert f"Dependency=afterok:{jobs[cell.parent]}(" in shown


def test_two_launches_at_once_submit_every_cell_once(write_grid: WriteGrid, waiting: Path) -> None:
    command = [sys.executable, "-m", "launch", "grid", str(write_grid(**FAMILIES)), *MODEST, "--root", str(waiting)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("submitted 4 cells" in output for output in outputs) == 1
    assert set(live_jobs(waiting / "tiny").values()) == {1}


@pytest.mark.parametrize(
    ("moment", "num_before"),
    [("sbatch", 2), ("id", 2), ("release", 3)],
    ids=["before the second sbatch", "before its id is noted", "before it is released"],
)
def test_a_launcher_killed_between_two_arrays_is_taken_over(
    write_grid: WriteGrid, waiting: Path, moment: str, num_before: int
) -> None:
    grid = write_grid(**FAMILIES)
    killed = launch("grid", grid, *MODEST, "--root", waiting, program=f"-c {_killing_at(moment)}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(owners(submissions.read(waiting / "tiny"))) == num_before
    again = launch("grid", grid, *MODEST, "--root", waiting)
    assert f"submitted {4 - num_before} cell" in again.stdout, again.stderr
    assert live_jobs(waiting / "tiny") == dict.fromkeys(planned_cells(waiting / "tiny"), 1)
    assert "JobHeldUser" not in {job.reason for job in slurm.queue().values()}


def _killing_at(moment: str) -> str:
    """A launcher that is killed, really, as it comes to a moment of its second array."""
    return "\n".join(
        (
            "import os, signal, sys",
            "from launch import __main__, cluster, slurm",
            "num_calls = 0",
            "def killing(function, is_after):",
            "    def call(*arguments):",
            "        global num_calls",
            "        num_calls += 1",
            "        answer = function(*arguments) if is_after or num_calls < 2 else None",
            "        if num_calls == 2: os.kill(os.getpid(), signal.SIGKILL)",
            "        return answer",
            "    return call",
            f"if {moment!r} == 'release': slurm.release = killing(slurm.release, False)",
            f"else: cluster.SlurmCluster.submit = killing(cluster.SlurmCluster.submit, {moment == 'id'})",
            "__main__.app()",
        )
    )


def test_a_dry_run_prints_the_very_script_and_submits_nothing(write_grid: WriteGrid, waiting: Path) -> None:
    grid = write_grid()
    shown = launch("grid", grid, *MODEST, "--root", waiting, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "at most 0 GPU-hours (2 node-hours)" in shown.stdout
    assert not waiting.exists()
    launch("grid", grid, *MODEST, "--root", waiting)
    (record,) = submissions.read(waiting / "tiny")
    (script,) = (waiting / "tiny" / "jobs" / record.token).glob("*_submission.sh")
    (token,) = {line.split("=tiny-")[1] for line in shown.stdout.splitlines() if line.startswith("#SBATCH --job-name")}
    assert script.read_text().replace(record.token, token).strip() in shown.stdout


def test_arrays_are_as_long_as_the_cluster_allows(write_grid: WriteGrid, waiting: Path) -> None:
    limit = slurm.max_array_size()
    launch("grid", write_grid(quantizers=["fp"], seeds=list(range(limit + 4))), *MODEST, "--root", waiting)
    assert [len(record.tasks) for record in submissions.read(waiting / "tiny")] == [limit, 4]
    assert len(live_jobs(waiting / "tiny")) == limit + 4


def test_a_profile_gives_cells_resources_of_their_own(write_grid: WriteGrid, waiting: Path, tmp_path: Path) -> None:
    profile = {"partition": "gpu", "mem": "500M", "time": "30m", "cells": {"bnn++": {"gpus_per_node": 2, "time": "2h"}}}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(profile))
    answer = launch("grid", write_grid(), "--cluster", path, "--root", waiting)
    assert answer.returncode == 0, answer.stderr
    cells = planned_cells(waiting / "tiny")
    for record in submissions.read(waiting / "tiny"):
        ((cell_id,),) = record.tasks
        shown = subprocess.check_output(["scontrol", "show", "job", str(record.job_id)], text=True)
        is_big = cells[cell_id].quantizer == "bnn++"
        assert f"TimeLimit={'02:00:00' if is_big else '00:30:00'}" in shown
        assert f"gres:gpu:{2 if is_big else 1}" in shown


def test_an_unknown_partition_is_told_with_the_valid_ones_and_nothing_is_written(
    write_grid: WriteGrid, waiting: Path
) -> None:
    answer = launch("grid", write_grid(), "--partition", "gqu", "--root", waiting)
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1)
    assert "unknown partition 'gqu'; did you mean 'gpu'? (" in answer.stderr
    assert not list(waiting.glob("tiny/*/cell.yaml"))
    assert live_jobs(waiting / "tiny") == {}


def test_cancelled_cells_leave_the_queue_and_a_retry_brings_them_back(write_grid: WriteGrid, waiting: Path) -> None:
    launch("grid", write_grid(**FAMILIES), *MODEST, "--root", waiting)
    assert launch("cancel", "fp/s0", "--root", waiting).stdout == "2 cancelled\n"
    rows = {row["name"]: row for row in json.loads(launch("status", "--json", "--root", waiting).stdout)}
    child = rows["digits/resnet8/bc/s0/finetune"]
    assert (child["state"], child["reason"]) == ("cancelled", "starts from digits/resnet8/fp/s0, which was cancelled")
    assert set(live_jobs(waiting / "tiny")) == {row["cell"] for name, row in rows.items() if "/s1" in name}
    again = launch("retry", *MODEST, "--root", waiting)
    assert "submitted 2 cells as 2 jobs" in again.stdout, again.stderr
    assert live_jobs(waiting / "tiny") == dict.fromkeys(planned_cells(waiting / "tiny"), 1)
