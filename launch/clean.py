"""What of a launched grid can be deleted without losing anything still in use: listed first, deleted on request."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.plan import Standing
from launch.slurm import JobInfo
from launch.submissions import Submission, owners
from suite.run.directory import RunDir, run_dirs

Queue = Mapping[str, JobInfo]


@dataclass(frozen=True)
class Waste:
    """A file or folder that may go: what it is, for people, and its size. `run`: whose; training keeps it."""

    path: Path
    what: str
    num_bytes: int
    run: RunDir | None = None


def old_jobs(
    grid_dir: Path, rows: Iterable[Standing], records: Sequence[Submission], queue: Queue | None
) -> list[Waste]:
    """Folders of jobs that left the queue, and code snapshots that no job uses but the newest submission's.

    Nothing where SLURM could not be asked; no code while a cell runs on this machine.

    Args:
        grid_dir: the grid.
        rows: where its cells stand.
        records: its submissions, oldest first.
        queue: SLURM's, of this moment; None: it could not be asked. Empty is right where nothing was ever submitted.
    """
    if queue is None:
        return []
    old = [record for record in records if not _is_live(record, queue)]
    kept = {record.code for record in records if _is_live(record, queue)} | {record.code for record in records[-1:]}
    if any(row.has_job and row.state.job_id not in queue for row in rows):
        kept |= {path.name for path in _folders(grid_dir / "code")}
    jobs = [grid_dir / "jobs" / record.token for record in old]
    code = [path for path in _folders(grid_dir / "code") if path.name not in kept]
    return [
        *(_waste(path, "folder of a job that has ended") for path in jobs if path.is_dir()),
        *(_waste(path, "code that no job uses") for path in code),
    ]


def old_checkpoints(grid_dir: Path, rows: Iterable[Standing]) -> list[Waste]:
    """All checkpoints of done cells but the newest, from which others are finetuned and 1-bit files exported."""
    return [
        _waste(path, f"checkpoint of {row.cell.name}, done with a newer one", RunDir(grid_dir / row.cell.id))
        for row in rows
        if row.state.state == "done"
        for path in sorted(RunDir(grid_dir / row.cell.id).checkpoints.glob("epoch-*.pt"))[:-1]
    ]


def orphans(grid_dir: Path, planned: Iterable[str], records: Sequence[Submission], queue: Queue | None) -> list[Waste]:
    """Run directories of earlier recipes: in the plan no more, held by no process and no job in the queue.

    Args:
        grid_dir: the grid.
        planned: ids of the cells of the last launch.
        records: the grid's submissions, oldest first.
        queue: SLURM's; None: it could not be asked, and whatever was submitted stays.
    """
    has_job = {cell_id for cell_id, (record, _) in owners(records).items() if queue is None or _is_live(record, queue)}
    kept = {*planned, *has_job}
    return [
        _waste(run.path, f"run of an earlier recipe, {run.cell().name}, {run.state().state}", run)
        for run in run_dirs(grid_dir)
        if run.path.name not in kept and not run.is_live()
    ]


def delete(waste: Iterable[Waste]) -> int:
    """Deletes what nobody holds, and returns how many bytes that were."""
    num_bytes = 0
    for each in waste:
        if each.run is not None and each.run.is_live():  # looked at before, but the answer may have taken hours
            continue
        _remove(each.path)
        num_bytes += each.num_bytes
    return num_bytes


def _is_live(record: Submission, queue: Queue) -> bool:
    """Without an id, sbatch may be at work this very moment."""
    return record.job_id is None or any(
        queue[job_id].is_live
        for job_id in (record.task_job_id(index) for index in range(len(record.tasks)))
        if job_id in queue
    )


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir()) if path.is_dir() else []


def _waste(path: Path, what: str, run: RunDir | None = None) -> Waste:
    files = path.rglob("*") if path.is_dir() else [path]
    return Waste(path, what, sum(file.lstat().st_size for file in files if not file.is_dir()), run)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # a job's last process may still write: what it leaves goes next time
    else:
        path.unlink(missing_ok=True)
