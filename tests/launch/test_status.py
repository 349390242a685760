"""Standings: run directories, and jobs where cells were submitted."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tiny_cells import put

from launch.cluster import LocalCluster
from launch.local import MAX_STARTS, launch
from launch.slurm import JobInfo
from launch.status import standings
from launch.submissions import Submission
from suite.recipe.cell import AS_IS, Cell
from suite.run.directory import RunDir, write_plan


def _job(job_id: str, state: str) -> JobInfo:
    return JobInfo(job_id, state, "", node="", name="")


def test_standings_are_the_plans_in_its_order(make_run: Callable[..., RunDir]) -> None:
    runs = [make_run(seed=seed) for seed in (2, 0, 1)]
    write_plan(runs[0].path.parent, [run.cell() for run in runs])
    put(runs[1], state="running", job_id="1", attempt=1)
    rows = standings(runs[0].path.parent)
    assert [row.cell.seed for row in rows] == [2, 0, 1]
    assert [row.state.state for row in rows] == ["planned", "preempted", "planned"]


def test_cells_without_run_directories_stand_where_their_jobs_do(
    tmp_path: Path, make_cell: Callable[..., Cell]
) -> None:
    cells = [make_cell(seed=seed) for seed in range(5)]
    Submission("first", tuple((cell.id,) for cell in cells[:4]), job_id="7").write(tmp_path)
    Submission("second", ((cells[3].id, cells[4].id),), job_id="8").write(tmp_path)
    queue = {"7_0": _job("7_0", "RUNNING"), "7_1": _job("7_1", "PENDING"), "8": _job("8", "PENDING")}
    rows = standings(tmp_path, cells, queue)
    assert [row.state.state for row in rows] == ["running", "queued", "planned", "queued", "queued"]
    assert [row.has_job for row in rows] == [True, True, False, True, True]
    assert [row.state.job_id for row in rows] == ["7_0", "7_1", "7_2", "8", "8"]
    assert list(tmp_path.iterdir()) == [tmp_path / "submissions"]


def test_a_cell_planned_again_by_hand_is_free_of_its_former_job(make_run: Callable[..., RunDir]) -> None:
    run = make_run()
    grid_dir, cells = run.path.parent, [run.cell()]
    queue = {"7": _job("7", "RUNNING")}
    Submission("a", ((run.path.name, "another of its pack"),), job_id="7").write(grid_dir)
    put(run, state="failed", cause="oom", attempt=1)
    assert standings(grid_dir, cells, queue)[0].is_settled
    run.plan_again()
    (row,) = standings(grid_dir, cells, queue)
    assert (row.state.state, row.has_job) == ("planned", False)
    Submission("b", ((run.path.name,),), job_id="8").write(grid_dir)
    (row,) = standings(grid_dir, cells, queue | {"8": _job("8", "PENDING")})
    assert (row.state.state, row.has_job) == ("queued", True)


def test_slurm_is_not_asked_where_everything_is_settled_or_was_never_submitted(
    make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run, local = make_run(), make_run(seed=1)
    grid_dir, cells = run.path.parent, [run.cell(), local.cell()]
    Submission("a", ((run.path.name,),), job_id="7").write(grid_dir)
    put(run, state="running", attempt=1)
    assert [row.state.state for row in standings(grid_dir, cells)] == ["running", "planned"]
    expected = "squeue is not on PATH: run this on a login node of the cluster; 1 cells are judged by their locks"
    assert capsys.readouterr().err.startswith(expected)
    put(run, state="failed", cause="error")
    assert [row.state.state for row in standings(grid_dir, cells)] == ["failed", "planned"]
    assert capsys.readouterr().err == ""


class _StillbornJobs(LocalCluster):
    """Every job ends before its training begins."""

    def submit(self, run: RunDir, code: Path) -> str:  # noqa: ARG002
        put(run, state="queued", job_id="7")
        return "7"

    def is_alive(self, job_id: str) -> bool:  # noqa: ARG002
        return False


def test_a_cell_whose_jobs_never_begin_fails_in_the_end(
    make_run: Callable[..., RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.POLL_SECONDS", 0.0)
    run = make_run()
    cells = [run.cell()]
    uri = "http://127.0.0.1:9"  # no store is needed, and none that is dead does harm
    console = Console(file=io.StringIO())
    (row,) = launch(run.path.parent, cells, cells, {run.path.name: AS_IS}, _StillbornJobs(tmp_path), uri, console)
    assert (row.state.state, row.state.reason) == ("failed", f"its job ended {MAX_STARTS} times without a result")


@pytest.mark.parametrize(("visible", "max_parallel"), [("0,1,2", 3), ("", None)])
def test_one_cell_per_gpu_else_one_per_core(
    monkeypatch: pytest.MonkeyPatch, visible: str, max_parallel: int | None
) -> None:
    import os

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    num_cores = len(os.sched_getaffinity(0))
    cluster = LocalCluster(Path("data"))
    assert cluster.max_parallel == (max_parallel or num_cores)
    assert cluster.num_threads == max(num_cores // cluster.max_parallel, 1)
    assert LocalCluster(Path("data"), max_parallel=1).num_threads == num_cores
