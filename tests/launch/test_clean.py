"""Cleaning deletes what nothing uses, and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launch.clean import delete, old_checkpoints, old_jobs, orphans
from launch.plan import Standing
from launch.slurm import JobInfo
from launch.submissions import Submission
from suite.run.directory import RunDir, State

QUEUE = {"8_1": JobInfo("8_1", "PENDING", "", "", "grid-b"), "1": JobInfo("1", "RUNNING", "", "", "another grid's")}
RECORDS = [
    Submission("a", (("x",), ("y",)), code="old", job_id="7", made=1.0),
    Submission("b", (("x",), ("y",)), code="used", job_id="8", made=2.0),
    Submission("c", (("z",),), code="used too", job_id=None, made=3.0),
    Submission("d", (("z",),), code="newest", job_id="9", made=4.0),
]


def _grid(tmp_path: Path) -> Path:
    for name in ("jobs/a", "jobs/b", "jobs/c", "jobs/d", "code/old", "code/used", "code/used too", "code/newest"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("12345", encoding="utf-8")
    return tmp_path


def test_jobs_that_left_the_queue_and_code_that_none_uses_may_go(tmp_path: Path) -> None:
    waste = old_jobs(_grid(tmp_path), [], RECORDS, QUEUE)
    assert [str(each.path.relative_to(tmp_path)) for each in waste] == ["jobs/a", "jobs/d", "code/old"]
    assert [each.num_bytes for each in waste] == [5, 5, 5]
    assert delete(waste) == 15
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["b", "c", "newest", "used", "used too"]
    assert old_jobs(tmp_path, [], RECORDS, QUEUE) == []


def test_nothing_of_jobs_goes_where_slurm_cannot_be_asked(tmp_path: Path) -> None:
    assert old_jobs(_grid(tmp_path), [], RECORDS, None) == []


def test_code_stays_while_a_cell_runs_on_this_machine(tmp_path: Path, make_run: Callable[..., RunDir]) -> None:
    row = Standing(make_run().cell(), State(state="running", job_id="4711"), has_job=True)
    assert {each.path.name for each in old_jobs(_grid(tmp_path), [row], RECORDS, QUEUE)} == {"a", "d"}
    on_slurm = replace(row, state=replace(row.state, job_id="8_1"))
    assert {each.path.name for each in old_jobs(tmp_path, [on_slurm], RECORDS, QUEUE)} == {"a", "d", "old"}


def test_done_cells_keep_their_newest_checkpoint_and_others_all(make_run: Callable[..., RunDir]) -> None:
    done, running = make_run(seed=0), make_run(seed=1)
    for run in (done, running):
        run.checkpoints.mkdir()
        for epoch in (1, 2):
            (run.checkpoints / f"epoch-{epoch:06d}-step-000000.pt").write_bytes(b"123")
    rows = [Standing(done.cell(), State(state="done")), Standing(running.cell(), State(state="running"))]
    waste = old_checkpoints(done.path.parent, rows)
    assert [each.path for each in waste] == [done.checkpoints / "epoch-000001-step-000000.pt"]
    assert delete(waste) == 3
    assert [path.name for path in done.checkpoints.iterdir()] == ["epoch-000002-step-000000.pt"]


def test_orphans_are_runs_in_no_plan_that_nobody_holds(make_run: Callable[..., RunDir]) -> None:
    planned, old, queued, held = (make_run(seed=seed) for seed in range(4))
    grid_dir = old.path.parent
    records = [Submission("b", ((queued.path.name,),), job_id="1")]
    attempt = held.claim()
    found = orphans(grid_dir, [planned.path.name], records, QUEUE)
    attempt.finish(state="preempted")
    assert [each.path for each in found] == [old.path]
    assert found[0].what == "run of an earlier recipe, digits/resnet8/bnn++/s1, planned"
    assert {each.path for each in orphans(grid_dir, [planned.path.name], records, {})} == {
        old.path,
        queued.path,
        held.path,
    }
    attempt = old.claim()
    assert delete(found) == 0, "who began to run in between keeps his run"
    attempt.finish(state="preempted")
    assert old.path.exists()
    assert delete(found) > 0
    assert not old.path.exists()
