"""A grid on SLURM: hands over what is not in the queue yet, and returns; the jobs look after themselves from there."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from launch import slurm, snapshot, submissions
from launch.arrays import Array, arrays, dependency, limited, startable
from launch.cluster import SlurmCluster
from launch.preflight import LaunchError, preflight
from launch.resources import Profile, check
from launch.slurm import JobInfo
from launch.status import standings
from launch.submissions import Submission, job_name, new_token, owners
from suite.recipe.cell import Cell, Execution
from suite.run.directory import RunDir, write_plan
from suite.run.locks import holder, locked

_T = TypeVar("_T")
LOCK_SECONDS = 300.0
"""How long a launch waits for another one of the same grid, which takes seconds for a thousand cells."""


def launch(
    grid_dir: Path,
    cells: Sequence[Cell],
    wanted: Sequence[Cell],
    executions: Mapping[str, Execution],
    profile: Profile,
    cluster: Callable[[str], SlurmCluster],
    console: Console,
) -> list[Submission]:
    """Makes `cells` the grid's plan and submits those of the `wanted` ones that are to start; returns the records.

    Args:
        grid_dir: where the runs lie.
        cells: the whole grid.
        wanted: those to run.
        executions: how, by cell id.
        profile: what they ask for.
        cluster: makes the cluster for a code snapshot's hash.
        console: for progress.

    Raises:
        DataError: a data set is missing.
        LaunchError: a model cannot have binary inputs, or another launcher has the grid.
        ProfileError: the cluster has no such partition, account or QOS.
        SlurmError: SLURM is away or refuses an array; what was submitted before stays, and is not submitted again.
    """
    with _alone(grid_dir, console):
        queue = slurm.queue()
        _finish_broken_off(grid_dir, queue)
        write_plan(grid_dir, cells, executions)
        planned = planned_arrays(grid_dir, wanted, queue, profile)
        if not planned:
            return []
        check(array.resources for array in planned)
        starting = [cell for array in planned for task in array.tasks for cell in task]
        preflight(starting, executions, cluster("").data_dir, console)
        _create(grid_dir, starting, console)
        return _submit(grid_dir, planned, cluster(snapshot.take(grid_dir, starting)), console)


def _create(grid_dir: Path, cells: Sequence[Cell], console: Console) -> None:
    """The cells' run directories, several at a time: what takes long is the disk."""
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda cell: RunDir.create(grid_dir / cell.id, cell), cells)
        for _ in _bar(made, "run directories", len(cells), console):
            pass


def planned_arrays(
    grid_dir: Path, wanted: Sequence[Cell], queue: Mapping[str, JobInfo], profile: Profile
) -> list[Array]:
    """What a launch would submit now."""
    rows = standings(grid_dir, wanted, queue)
    unfinished = [row.cell.id for row in rows if row.state.state != "done"]
    planned = arrays(startable(rows), unfinished, profile.for_cell, slurm.max_array_size())
    return planned if profile.max_parallel is None else limited(planned, profile.max_parallel)


def _submit(grid_dir: Path, planned: Sequence[Array], cluster: SlurmCluster, console: Console) -> list[Submission]:
    made: list[Submission] = []
    jobs = _jobs(submissions.read(grid_dir))
    for number, array in enumerate(_bar(planned, "submitting", len(planned), console)):
        tasks = tuple(tuple(cell.id for cell in task) for task in array.tasks)
        record = Submission(new_token(number), tasks, cluster.code).write(grid_dir)
        words = dependency(array, [str(each.job_id) for each in made], jobs.get(array.parent or "", ""))
        record = replace(record, job_id=cluster.submit(array, record.token, words)).write(grid_dir)
        slurm.release(str(record.job_id))
        made.append(replace(record, is_released=True).write(grid_dir))
        jobs |= _jobs([record])
    return made


def _bar(items: Iterable[_T], what: str, num_items: int, console: Console) -> Iterable[_T]:
    return track(items, what, num_items, console=console, transient=True, disable=not console.is_terminal)


def _finish_broken_off(grid_dir: Path, queue: Mapping[str, JobInfo]) -> None:
    """Brings what a killed launcher left in the queue to its end: see launch.submissions."""
    for record in submissions.read(grid_dir):
        name = job_name(grid_dir, record.token)
        if record.job_id is None:
            slurm.cancel(sorted({job_id.partition("_")[0] for job_id, job in queue.items() if job.name == name}))
        elif not record.is_released:
            if any(job.name == name for job in queue.values()):
                slurm.release(record.job_id)
            replace(record, is_released=True).write(grid_dir)


def _jobs(records: Iterable[Submission]) -> dict[str, str]:
    """Cell id -> its job's."""
    return {cell_id: record.task_job_id(index) for cell_id, (record, index) in owners(records).items()}


@contextmanager
def _alone(grid_dir: Path, console: Console) -> Iterator[None]:
    """Holds the grid's launcher lock, for which it waits: two launches at once run every cell once."""
    path = grid_dir / "launcher.lock"
    deadline = time.monotonic() + LOCK_SECONDS
    with console.status("") as waiting:
        while True:
            with locked(path) as mine:
                if mine:
                    waiting.stop()
                    yield
                    return
            words = f"{grid_dir}: launcher {holder(path)} is at work on this grid"
            if time.monotonic() > deadline:
                raise LaunchError(f"{words}; see: python -m launch status")
            waiting.update(f"{words}: waiting for it")
            time.sleep(1.0)
