"""Where a grid stands: run directories and what SLURM says -> standings -> a matrix for people or JSON for programs."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch import slurm, submissions
from launch.plan import BUSY, SETTLED, Signs, Standing, stand, without_lost_children
from launch.slurm import JobInfo
from suite.recipe.cell import Cell
from suite.run.directory import RunDir, State, planned_cells

Queue = Mapping[str, JobInfo]


def standings(grid_dir: Path, cells: Sequence[Cell] | None = None, queue: Queue | None = None) -> list[Standing]:
    """Every cell, in order; says in one line on stderr where SLURM was to be asked and could not be.

    Args:
        grid_dir: where the runs lie, if there are any yet.
        cells: which ones, parents among them; default: those of the last launch.
        queue: SLURM's, of this moment. Default: one squeue and, for jobs it does not know, one sacct, where cells that
            are not settled were submitted.
    """
    by_id = planned_cells(grid_dir) if cells is None else {cell.id: cell for cell in cells}
    states = {cell_id: RunDir(grid_dir / cell_id).state() for cell_id in by_id}
    submitted = _submitted(grid_dir, states)
    jobs = _jobs(submitted, queue)
    rows = []
    for cell_id, cell in by_id.items():
        run, job_id = RunDir(grid_dir / cell_id), submitted.get(cell_id, "")
        job = jobs.get(job_id) if jobs is not None else None
        # A job that has left the queue may have settled its run since that was read.
        is_gone = bool(job_id) and not (job is not None and job.is_live)
        state = run.state() if is_gone else states[cell_id]
        rows.append(stand(cell, state, _signs(run, state, job_id, job, is_known=not job_id or jobs is not None)))
    return without_lost_children(rows, submitted)


def standing(run: RunDir, cell: Cell, is_alive: Callable[[str], bool]) -> Standing:
    """Where one run of the local launcher stands, whose directory need not exist."""
    state = run.state()
    is_held = state.state in BUSY and run.is_live()
    return stand(cell, state, Signs(is_held=is_held, is_alive=bool(state.job_id) and is_alive(state.job_id)))


def _submitted(grid_dir: Path, states: Mapping[str, State]) -> dict[str, str]:
    """Cell id -> SLURM's id of its newest job, of those that are not settled."""
    return {
        cell_id: record.task_job_id(index)
        for cell_id, (record, index) in submissions.owners(submissions.read(grid_dir)).items()
        if cell_id in states
        and states[cell_id].state not in SETTLED
        # Planned again by hand: a job that was submitted before that is not this cell's any more.
        and not (states[cell_id].state == "planned" and states[cell_id].heartbeat > record.made)
    }


def _jobs(submitted: Mapping[str, str], queue: Queue | None) -> Queue | None:
    """What SLURM knows of the jobs, None where it cannot be asked."""
    if queue is not None or not submitted:
        return queue or {}
    try:
        queue = slurm.queue()
    except slurm.SlurmError as error:
        print(f"{error}; {len(submitted)} cells are judged by their locks and heartbeats", file=sys.stderr)
        return None
    gone = {job_id.partition("_")[0] for job_id in submitted.values() if job_id not in queue}
    try:
        return {**(slurm.accounting(gone) if gone else {}), **queue}
    except slurm.SlurmError:  # it only adds how a job ended
        return queue


def _signs(run: RunDir, state: State, job_id: str, job: JobInfo | None, *, is_known: bool) -> Signs:
    is_busy = state.state in BUSY
    is_held = is_busy and run.is_live()
    is_local = is_busy and not is_held and state.job_id not in {"", job_id}
    age_seconds = None if is_known else time.time() - state.heartbeat
    return Signs(is_held, is_local and _is_alive(state.job_id), job_id, job, age_seconds)


def _is_alive(job_id: str) -> bool:
    from launch.cluster import is_alive  # late: imports submitit

    return is_alive(job_id)
