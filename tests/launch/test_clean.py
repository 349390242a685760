"""Cleaning deletes what nothing uses, and nothing else."""

from collections.abc import Callable
from pathlib import Path

from launch.clean import delete, old_checkpoints, old_jobs, orphans
from launch.plan import Standing
from launch.worker.spec import WorkerSpec
from suite.run.directory import Planned, RunDir, State


def _grid(folder: Path) -> Path:
    """Jobs a to d, whose workers train from the code snapshots of these names."""
    for job, code in (("a", "old"), ("b", "used"), ("c", "used too"), ("d", "newest")):
        WorkerSpec(folder, folder, folder / "code" / code).write(folder / "jobs" / job / "spec.json")
        (folder / "code" / code).mkdir(parents=True)
        (folder / "code" / code / "file").write_text("12345", encoding="utf-8")
    return folder


def _old_jobs(grid_dir: Path, *live: str, has_live_workers: bool = False) -> list[str]:
    jobs = {grid_dir / "jobs" / name for name in live}
    waste = old_jobs(grid_dir, jobs, str(grid_dir / "code" / "newest"), has_live_workers=has_live_workers)
    return [str(each.path.relative_to(grid_dir)) for each in waste]


def test_jobs_that_left_the_queue_and_code_that_none_uses_may_go(tmp_path: Path) -> None:
    grid_dir = _grid(tmp_path)
    assert _old_jobs(grid_dir, "b", "c") == ["jobs/a", "jobs/d", "code/old"]
    live = {grid_dir / "jobs" / name for name in "bc"}
    waste = old_jobs(grid_dir, live, str(grid_dir / "code" / "newest"), has_live_workers=False)
    spec = (grid_dir / "jobs" / "a" / "spec.json").stat().st_size
    assert waste[0].num_bytes == spec
    assert delete(waste) == sum(each.num_bytes for each in waste)
    assert sorted(path.name for path in grid_dir.glob("*/*")) == ["b", "c", "newest", "used", "used too"]
    assert _old_jobs(grid_dir, "b", "c") == []


def test_nothing_of_jobs_goes_where_slurm_cannot_be_asked(tmp_path: Path) -> None:
    assert old_jobs(_grid(tmp_path), None, "", has_live_workers=False) == []


def test_code_stays_while_a_worker_lives_that_may_use_it(tmp_path: Path) -> None:
    assert _old_jobs(_grid(tmp_path), "b", has_live_workers=True) == ["jobs/a", "jobs/c", "jobs/d"]


def test_done_cells_keep_their_newest_checkpoint_and_others_all(make_run: Callable[..., RunDir]) -> None:
    done, running = make_run(seed=0), make_run(seed=1)
    for run in (done, running):
        run.checkpoints.mkdir()
        for epoch in (1, 2):
            (run.checkpoints / f"epoch-{epoch:06d}-step-000000.pt").write_bytes(b"123")
    rows = [Standing(Planned(run.cell()), State(name)) for run, name in ((done, "done"), (running, "running"))]  # type: ignore[arg-type]
    waste = old_checkpoints(done.path.parent, rows)
    assert [each.path for each in waste] == [done.checkpoints / "epoch-000001-step-000000.pt"]
    assert delete(waste) == 3
    assert [path.name for path in done.checkpoints.iterdir()] == ["epoch-000002-step-000000.pt"]


def test_orphans_are_runs_in_no_plan_that_nobody_holds(make_run: Callable[..., RunDir]) -> None:
    planned, old, held = (make_run(seed=seed) for seed in range(3))
    grid_dir = old.path.parent
    attempt = held.claim()
    found = orphans(grid_dir, [planned.path.name])
    attempt.finish(state="preempted")
    assert [each.path for each in found] == [old.path]
    assert found[0].what == "run of a former recipe, digits/resnet8/bnn++/s1, queued"
    assert {each.path for each in orphans(grid_dir, [planned.path.name])} == {old.path, held.path}
    attempt = old.claim()
    assert delete(found) == 0, "a run that started in between is kept"
    attempt.finish(state="preempted")
    assert old.path.exists()
    assert delete(found) > 0
    assert not old.path.exists()
