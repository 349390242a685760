"""`python -m launch` on a real SLURM cluster: which workers are submitted, also by repeated and concurrent launches."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from tiny_cells import tiny_grid

from cluster.commands import MODEST, SOURCE, WriteGrid, command, launch, standings, states
from cluster.lab import Lab
from launch import launches
from launch.slurm import client
from launch.supply import jobs

# Two full-precision cells, and a cell that starts from each of them.
FAMILIES = {"quantizers": ["fp"], "seeds": [0, 1], "blocks": [{}, {"init": "finetune", "quantizers": ["bc"]}]}


def _content(grid_dir: Path) -> dict[str, bytes]:
    """The files that a launch could change."""
    paths = [grid_dir / "plan.json", grid_dir / "launches.jsonl", grid_dir / "scale.json", *grid_dir.glob("jobs/*/*")]
    return {str(path): path.read_bytes() for path in [*paths, *grid_dir.glob("*/*.yaml"), *grid_dir.glob("*/again*")]}


def test_each_ready_cell_gets_a_worker_and_a_second_launch_hands_in_none(write_grid: WriteGrid, waiting: Path) -> None:
    grid, grid_dir = write_grid(**FAMILIES), waiting / "tiny"
    first = launch("grid", grid, *MODEST, "--root", waiting, "--checkpoint-minutes", "3")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("submitted 2 workers for 4 cells (job ")
    before = jobs(grid_dir)
    assert {job_id.partition("_")[0] for job_id in before} == {first.stdout.split("(job ")[1].split(")")[0]}
    assert sorted(job_id.partition("_")[2] for job_id in before) == ["0", "1"]
    assert {job.spec.train_options for job in before.values()} == {("--checkpoint-minutes", "3.0")}
    second = launch("grid", grid, *MODEST, "--root", waiting)
    assert second.stdout.startswith("nothing to submit: 4 queued"), second
    assert set(jobs(grid_dir)) == set(before)

    remembered = launches.launches(grid_dir)
    assert [(each.command, each.place, each.num_cells) for each in remembered] == [("grid", "slurm", 4)] * 2
    assert remembered[0].flags["mem"] == "1G"
    assert remembered[0].train_options == ("--checkpoint-minutes", "3.0")
    assert remembered[0].text == grid.read_text(encoding="utf-8")
    ((shape, resources),) = remembered[0].resources.items()
    assert (resources["partition"], resources["time"], resources["mem"]) == ("gpu", 60, "1G")
    assert {job.spec.shape for job in before.values()} == {shape}

    assert launch("scale", "1", "--root", waiting).stdout == "at most 1 worker (before: no limit); 0 submitted\n"
    assert len(jobs(grid_dir)) == 1
    assert launch("scale", "9", "--root", waiting).stdout == "at most 9 workers (before: 1); 1 submitted\n"
    assert len(jobs(grid_dir)) == 2


@pytest.mark.slow
def test_two_launches_at_once_hand_in_each_worker_once(write_grid: WriteGrid, waiting: Path) -> None:
    words = command("grid", write_grid(**FAMILIES), *MODEST, "--root", waiting)
    both = [subprocess.Popen(words, cwd=SOURCE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(each.split(maxsplit=1)[0] for each in said) == ["nothing", "submitted"], said
    assert len(jobs(waiting / "tiny")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("is_after", "num_before"), [(False, 0), (True, 1)], ids=["before sbatch", "after sbatch"])
def test_a_killed_launchers_work_is_finished_by_the_next(
    write_grid: WriteGrid, waiting: Path, is_after: bool, num_before: int
) -> None:
    profile = waiting.parent / "cluster.yaml"  # two shapes: two calls of sbatch
    profile.write_text("partition: gpu\nmem: 1G\ngpus_per_node: 0\ncells: {bnn++: {mem: 2G}}\n", encoding="utf-8")
    where = ("--cluster", profile, "--root", waiting)
    killing = "\n".join(
        (
            "import os, signal",
            "from launch import __main__",
            "from launch.slurm import hand_over",
            "submit = hand_over.submit",
            "def killing(*arguments, **options):",
            f"    if {is_after}: submit(*arguments, **options)",
            "    os.kill(os.getpid(), signal.SIGKILL)",
            "hand_over.submit = killing",
            "__main__.app()",
        )
    )
    killed = subprocess.run(command("grid", write_grid(), *where, program=f"-c {killing}"), cwd=SOURCE, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(jobs(waiting / "tiny")) == num_before
    again = launch("grid", write_grid(), *where)
    assert again.stdout.startswith(f"submitted {2 - num_before} worker"), again
    assert len(jobs(waiting / "tiny")) == 2
    assert "JobHeldUser" not in {job.reason for job in client.queue().values()}


def test_a_dry_run_prints_the_very_script_and_submits_nothing(write_grid: WriteGrid, waiting: Path) -> None:
    grid = write_grid()
    shown = launch("grid", grid, *MODEST, "--root", waiting, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "# ---- 2 workers, 1 cell at a time each" in shown.stdout
    assert not waiting.exists()
    launch("grid", grid, *MODEST, "--root", waiting)
    (script,) = waiting.glob("tiny/jobs/*/*_submission.sh")
    code = launches.launches(waiting / "tiny")[0].code
    text = script.read_text(encoding="utf-8").replace(script.parent.name, "<token>")
    lines = text.replace(code, str(waiting / "tiny" / "code")).replace("'", "").splitlines()
    assert not [line for line in lines if line not in shown.stdout.replace("'", "").splitlines()]


def test_a_profile_gives_cells_workers_of_their_own(write_grid: WriteGrid, waiting: Path, tmp_path: Path) -> None:
    profile = {"partition": "gpu", "mem": "500M", "time": "30m", "cells": {"bnn++": {"gpus_per_node": 2, "time": "2h"}}}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(profile), encoding="utf-8")
    answer = launch("grid", write_grid(), "--cluster", path, "--root", waiting)
    assert answer.stdout.startswith("submitted 2 workers for 2 cells"), answer
    shown = {job_id: client_shows(job_id) for job_id in jobs(waiting / "tiny")}
    assert sorted("TimeLimit=02:00:00" in text and "gres:gpu:2" in text for text in shown.values()) == [False, True]
    assert sorted("TimeLimit=00:30:00" in text and "gres:gpu:1" in text for text in shown.values()) == [False, True]
    shapes = {row.planned.shape for row in standings(waiting / "tiny").values()}
    assert shapes == {job.spec.shape for job in jobs(waiting / "tiny").values()}
    assert len(shapes) == 2


def client_shows(job_id: str) -> str:
    """Everything that SLURM knows about a job."""
    return subprocess.check_output(["scontrol", "--oneliner", "show", "job", job_id], text=True)


REFUSED = {
    ("--partition", "gqu"): "unknown partition 'gqu'; did you mean 'gpu'? (",
    ("--partition", "gpu", "--mem", "999G"): "sbatch: Memory specification can not be satisfied",
    ("--partition", "gpu", "--sbatch", "reservation=x"): "sbatch: Batch job submission failed: Requested reservation",
    ("--partition", "gpu", "--setup", "if true"): "--setup: not valid shell: ",
}


def test_a_refused_launch_leaves_everything_as_it_was(write_grid: WriteGrid, waiting: Path) -> None:
    grid_dir = waiting / "tiny"
    for flags, said in REFUSED.items():
        refused = launch("grid", write_grid(), *flags, "--root", waiting)
        assert (refused.returncode, refused.stderr.count("\n"), refused.stdout) == (2, 1, ""), refused
        assert said in refused.stderr
        assert not waiting.exists()

    launch("grid", write_grid(), *MODEST, "--root", waiting)
    launch("cancel", "bnn++", "--root", waiting)
    before, queue = _content(grid_dir), set(client.queue())
    edited = write_grid(training={**tiny_grid()["training"], "epochs": 3})
    for flags, said in REFUSED.items():
        for words in (("grid", edited, "--cancel-former"), ("retry", "bnn++")):
            again = launch(*words, *flags, "--root", waiting)
            assert (again.returncode, said in again.stderr) == (2, True), again
            assert (_content(grid_dir), set(client.queue())) == (before, queue)
    assert states(grid_dir) == {"fp/s0": "queued", "bnn++/s0": "cancelled"}


def test_cancelling_all_empties_the_queue_and_a_retry_needs_no_flags(write_grid: WriteGrid, waiting: Path) -> None:
    grid_dir = waiting / "tiny"
    launch("grid", write_grid(**FAMILIES), *MODEST, "--root", waiting)
    assert len(jobs(grid_dir)) == 2
    assert launch("cancel", "fp/s0", "--root", waiting).stdout == "1 cancelled\n"
    assert "needs digits/resnet8/fp/s0, which was cancelled" in launch("status", "--root", waiting).stdout
    assert launch("cancel", "--root", waiting).returncode == 2  # cancelling all of them needs --yes
    assert launch("cancel", "--yes", "--root", waiting).stdout == "3 cancelled\n"
    assert client.queue() == {}
    assert set(states(grid_dir).values()) == {"cancelled"}
    shown = launch("retry", "--dry-run", "--root", waiting)
    assert (shown.returncode, jobs(grid_dir)) == (0, {}), shown
    again = launch("retry", "--root", waiting)
    assert again.stdout.startswith("submitted 2 workers for 4 cells"), again
    assert set(states(grid_dir).values()) == {"queued"}
    assert "TimeLimit=01:00:00" in client_shows(next(iter(jobs(grid_dir))))


@pytest.mark.slow
def test_a_launch_from_inside_a_job_is_as_its_flags_say(write_grid: WriteGrid, cluster: Lab, root: Path) -> None:
    bending = {"SBATCH_PARTITION": "debug", "SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1", "SBATCH_WAIT": "1"}
    around = ["salloc", "-Q", "-p", "debug", "--mem-per-cpu=150", "--gpus-per-node=1", "--time=5"]
    step = ["srun", "--cpu-bind=none", f"--chdir={SOURCE}"]
    words = command("grid", write_grid(), *MODEST, "--sbatch", "begin=now+1hour", "--root", root)
    environment = os.environ | bending
    said = subprocess.run([*around, *step, *words], env=environment, check=True, capture_output=True, text=True)
    assert said.stdout.startswith("submitted 2 workers for 2 cells"), said
    for job_id in jobs(root / "tiny"):
        shown = set(client_shows(job_id).split())
        assert {"Partition=gpu", "TimeLimit=01:00:00", "Requeue=1", "MinMemoryNode=1G"} <= shown
    assert cluster.run("squeue", "-h", "-o", "%T").split() == ["PENDING"]
