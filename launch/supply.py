"""Computes how many workers of each shape a grid needs on SLURM, and submits as many as the site allows."""

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import launches
from launch.launches import Launch
from launch.plan import Standing, ready
from launch.slurm import client, hand_over
from launch.slurm.client import JobInfo
from launch.slurm.resources import Resources
from launch.status import standings
from launch.worker import registry
from launch.worker.spec import WorkerSpec
from suite.run.directory import read_plan
from suite.run.locks import locked

MAX_DEATHS = 3
"""After this many jobs have ended before Python started, only a user's command submits more."""


@dataclass(frozen=True)
class HandedIn:
    """Jobs submitted to SLURM. `held_back`: how many more workers would find work if the site allowed them."""

    job_ids: tuple[str, ...] = ()
    num_workers: int = 0
    held_back: int = 0


@dataclass(frozen=True)
class Job:
    """A worker's job in the queue, and its spec."""

    info: JobInfo
    spec: WorkerSpec


def lacking(
    rows: Sequence[Standing], num_slots: Mapping[str, int], at_work: Mapping[str, int], limit: int | None
) -> dict[str, int]:
    """How many more workers of each shape could train something now.

    Args:
        rows: the whole grid.
        num_slots: cells that a worker trains at a time, by shape.
        at_work: existing workers, running or queued, by shape.
        limit: maximum number of workers of all shapes.
    """
    shapes = Counter(row.planned.shape for row in ready(rows))
    shapes.update(row.planned.shape for row in rows if row.state.state == "running")
    missing = {
        shape: max(-(-count // num_slots[shape]) - at_work.get(shape, 0), 0)
        for shape, count in shapes.items()
        if shape in num_slots
    }
    room = sum(missing.values()) if limit is None else max(limit - sum(at_work.values()), 0)
    granted = dict.fromkeys(missing, 0)
    while room and granted != missing:
        for shape, count in missing.items():  # in turn: each shape gets its share of a limit
            if room and granted[shape] < count:
                granted[shape] += 1
                room -= 1
    return {shape: count for shape, count in granted.items() if count}


def jobs(grid_dir: Path, queue: Mapping[str, JobInfo] | None = None) -> dict[str, Job]:
    """The grid's workers in SLURM's queue, by job id."""
    specs = {f"{grid_dir.name}-{path.parent.name}": path for path in grid_dir.glob("jobs/*/spec.json")}
    queue = queue if queue is not None else client.queue() if specs else {}
    live = {job_id: job for job_id, job in queue.items() if job.is_live and job.name in specs}
    read = {name: WorkerSpec.read(specs[name]) for name in {job.name for job in live.values()}}
    return {job_id: Job(job, read[job.name]) for job_id, job in live.items()}


def deaths(grid_dir: Path) -> list[hand_over.DeadStart]:
    """Workers submitted since the last launch that ended before Python started, or were killed with their whole job."""
    found = [death for folder in _folders(grid_dir) for death in hand_over.died(folder)]
    return sorted(found, key=lambda death: death.time)


def _folders(grid_dir: Path) -> list[Path]:
    """Folders of the jobs submitted since the last launch; both times are the file server's."""
    path = grid_dir / "launches.jsonl"
    launched = path.stat().st_mtime if path.exists() else 0.0
    return [spec.parent for spec in grid_dir.glob("jobs/*/spec.json") if spec.stat().st_mtime >= launched]


def supply(grid_dir: Path, *, is_asked: bool = False, rows: Sequence[Standing] | None = None) -> HandedIn:
    """Submits the missing workers. Two concurrent calls do no harm: a surplus worker finds nothing to do.

    Args:
        grid_dir: the grid.
        is_asked: a user requested it; workers are then submitted even after MAX_DEATHS failed starts.
        rows: the whole grid; default: read from disk.

    Raises:
        SlurmError: SLURM does not answer or refuses such jobs. A limit on their number is an error only if the grid has
            no other worker.
    """
    launch = launches.last(grid_dir, "slurm")
    if launch is None:
        return HandedIn()
    with locked(grid_dir / "supply.lock"):
        resources = {shape: Resources.model_validate(each) for shape, each in launch.resources.items()}
        queued = jobs(grid_dir)
        found = registry.workers(grid_dir)
        leaving = {worker.job_id for worker in found if worker.reason.startswith(registry.RETIRED)}
        at_work = Counter(job.spec.shape for job_id, job in queued.items() if job_id not in leaving)
        rows = rows or standings(grid_dir, read_plan(grid_dir))
        slots = {shape: each.num_slots for shape, each in resources.items()}
        missing = lacking(rows, slots, at_work, registry.limit(grid_dir))
        dead = [path for folder in _folders(grid_dir) for path in folder.glob("*.died")]
        if not is_asked and sum(not path.with_suffix(".began").exists() for path in dead) >= MAX_DEATHS:
            return HandedIn()
        exclude = registry.sick_nodes(found)
        handed: list[str] = []
        num_workers = 0
        for shape, count in missing.items():
            made, given = _hand_in(grid_dir, launch, shape, resources[shape], count, exclude)
            handed += made
            num_workers += given
        held_back = sum(missing.values()) - num_workers
        if held_back and not (num_workers or queued or registry.live_numbers(grid_dir)):
            raise client.SlurmError(
                "SLURM refuses further jobs of yours (MaxSubmitJobs), and none of this grid's jobs is queued: launch "
                "again when other jobs have ended"
            )
        return HandedIn(tuple(handed), num_workers, held_back)


def hand_on(spec_path: Path) -> str:
    """Submits a successor of the worker with this spec; returns its job id."""
    spec = WorkerSpec.read(spec_path)
    launch = launches.last(spec.grid_dir, "slurm")
    if launch is None or spec.shape not in launch.resources:
        raise client.SlurmError(f"{spec.grid_dir}: no cell needs such workers any more")
    resources = Resources.model_validate(launch.resources[spec.shape])
    exclude = registry.sick_nodes(registry.workers(spec.grid_dir))
    return hand_over.submit(resources, _spec(spec), 1, exclude=exclude)


def spec_of(grid_dir: Path, launch: Launch, shape: str, resources: Resources) -> WorkerSpec:
    """The instructions for a worker of this shape."""
    return WorkerSpec(
        grid_dir.resolve(),
        Path(launch.data_dir),
        Path(launch.code),
        shape,
        num_nodes=resources.nodes,
        num_gpus=resources.num_gpus,
        num_cores=resources.cpus_per_task,
        gpus_per_cell=resources.gpus_per_cell,
        cells_per_gpu=resources.cells_per_gpu,
        cpus_per_cell=resources.cpus_per_cell,
        train_options=launch.train_options,
    )


def _hand_in(
    grid_dir: Path, launch: Launch, shape: str, resources: Resources, count: int, exclude: Sequence[str]
) -> tuple[list[str], int]:
    """Submits as many workers as SLURM accepts; returns the job ids and the number of workers accepted."""
    handed: list[str] = []
    size = client.config().max_array_size
    room = client.limits(resources.account, resources.qos, resources.partition)
    left = count if room is None else min(count, room)
    given = 0
    while left:
        portion = min(left, size)
        spec = _spec(spec_of(grid_dir, launch, shape, resources))
        try:
            handed.append(hand_over.submit(resources, spec, portion, exclude=exclude))
        except hand_over.LimitError:  # a limit that cannot be read, or other jobs came first
            left = portion // 2
            size = max(left, 1)
            continue
        left -= portion
        given += portion
    return handed, given


def _spec(spec: WorkerSpec) -> Path:
    """Writes the spec to a new job folder; returns its path."""
    return spec.write(spec.grid_dir / "jobs" / secrets.token_hex(6) / "spec.json")


def withdraw(grid_dir: Path, num_left: int) -> None:
    """Cancels pending jobs, the newest first, until at most `num_left` jobs are left in total."""
    found = jobs(grid_dir) if client.available() else {}
    waiting = [job_id for job_id, job in found.items() if job.info.state == "PENDING"]
    surplus = max(len(found) - num_left, 0)
    client.cancel(waiting[::-1][:surplus])
