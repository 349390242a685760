"""Ending cells on request: the waiting at once, the running as soon as they have saved."""

from collections.abc import Sequence
from pathlib import Path

from launch import slurm, submissions
from launch.job import stop
from launch.plan import Standing
from launch.submissions import Submission, owners
from suite.run.directory import RunDir

REASON = "cancelled by hand"


def cancel(grid_dir: Path, chosen: Sequence[Standing], rows: Sequence[Standing]) -> int:
    """Cancels the chosen cells that are not settled, and those that start from them; returns how many.

    On SLURM, jobs that have no other cell left to run are cancelled with them.

    Args:
        grid_dir: the grid.
        chosen: the cells to stop.
        rows: all cells.

    Raises:
        SlurmError: SLURM is away; the cells are cancelled, and their jobs find out.
        TimeoutError: a training process on this machine does not end.
    """
    reasons = {row.cell.id: REASON for row in chosen if not row.is_settled}
    for row in rows:
        if row.cell.parent in reasons and not row.is_settled:
            parent = RunDir(grid_dir / row.cell.parent).cell().name
            reasons.setdefault(row.cell.id, f"starts from {parent}, which was cancelled")
    runs = {cell_id: RunDir(grid_dir / cell_id) for cell_id in reversed(reasons)}
    for cell_id, run in runs.items():  # the waiting before the running, or they would start in between
        run.cancel(reasons[cell_id])
    owned = owners(submissions.read(grid_dir))
    tasks = {owned[cell_id] for cell_id in runs if cell_id in owned}
    jobs = [record.task_job_id(index) for record, index in tasks if _is_over(grid_dir, record, index)]
    slurm.cancel(sorted(jobs))
    for cell_id, run in runs.items():
        if cell_id not in owned:
            stop(run, reasons[cell_id])
    return len(runs)


def _is_over(grid_dir: Path, record: Submission, index: int) -> bool:
    """Whether no cell of the task is left to run."""
    return all(RunDir(grid_dir / cell_id).state().state in {"done", "cancelled"} for cell_id in record.tasks[index])
