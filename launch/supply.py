"""How many workers of which shape a grid needs on SLURM, and handing them in as far as the site allows."""

import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launch import launches
from launch.launches import Launch
from launch.plan import Standing, ready
from launch.slurm import client, hand_over
from launch.slurm.client import JobInfo
from launch.slurm.resources import Resources
from launch.status import cost, standings
from launch.view import NUM_SHOWN, plural
from launch.worker import registry
from launch.worker.spec import WorkerSpec
from suite.run.directory import read_plan
from suite.run.locks import locked

SHOWN_HOURS = 0.05
MAX_DEATHS = 3
"""So many jobs that ended before Python could start mean that it will not: only a user hands in more."""


@dataclass(frozen=True)
class HandedIn:
    """Jobs given to SLURM. `held_back`: how many more workers would find work, if the site allowed them."""

    job_ids: tuple[str, ...] = ()
    num_workers: int = 0
    held_back: int = 0


@dataclass(frozen=True)
class Job:
    """A worker's job in the queue, and what it was told."""

    info: JobInfo
    spec: WorkerSpec


def lacking(
    rows: Sequence[Standing], num_slots: Mapping[str, int], at_work: Mapping[str, int], limit: int | None
) -> dict[str, int]:
    """How many more workers of each shape could train something now.

    Args:
        rows: the whole grid.
        num_slots: cells that a worker trains at a time, by shape.
        at_work: workers that there are, running or in the queue, by shape.
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
    """Workers that ended before Python could start, or with their whole job, oldest first."""
    found = [death for path in grid_dir.glob("jobs/*") for death in hand_over.died(path)]
    return sorted(found, key=lambda death: death.time)


def supply(grid_dir: Path, *, is_asked: bool = False, rows: Sequence[Standing] | None = None) -> HandedIn:
    """Hands in the workers that are missing. Two at once do no harm: a surplus worker finds nothing to do.

    Args:
        grid_dir: the grid.
        is_asked: a user asks for it, who has seen that earlier workers could not start.
        rows: where the whole grid stands; default: looked up.

    Raises:
        SlurmError: SLURM is away or refuses such jobs, other than for a limit on their number.
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
        unbegun = [path for path in grid_dir.glob("jobs/*/*.died") if not path.with_suffix(".began").exists()]
        if not is_asked and len(unbegun) >= MAX_DEATHS:
            return HandedIn()
        exclude = registry.sick_nodes(found)
        handed: list[str] = []
        num_workers = 0
        for shape, count in missing.items():
            made, given = _hand_in(grid_dir, launch, shape, resources[shape], count, exclude)
            handed += made
            num_workers += given
        held_back = sum(missing.values()) - num_workers
        if held_back and not (num_workers or queued or registry.live_numbers(grid_dir, set())):
            raise client.SlurmError(
                "SLURM takes no more jobs of yours (MaxSubmitJobs), and none of this grid is in the queue: launch "
                "again when others have ended"
            )
        return HandedIn(tuple(handed), num_workers, held_back)


def hand_on(spec_path: Path) -> str:
    """Hands in a successor of the worker with this spec; returns its job id."""
    spec = WorkerSpec.read(spec_path)
    launch = launches.last(spec.grid_dir, "slurm")
    if launch is None or spec.shape not in launch.resources:
        raise client.SlurmError(f"{spec.grid_dir}: no cell needs such workers any more")
    resources = Resources.model_validate(launch.resources[spec.shape])
    exclude = registry.sick_nodes(registry.workers(spec.grid_dir))
    return hand_over.submit(resources, _spec(spec), 1, exclude=exclude)


def spec_of(grid_dir: Path, launch: Launch, shape: str, resources: Resources) -> WorkerSpec:
    """What a worker of this shape is told."""
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
    """Ids of the jobs and the number of workers that SLURM took: as many as it takes, if not all."""
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
        except hand_over.LimitError:  # a limit that cannot be read, or others were quicker
            left = portion // 2
            size = max(left, 1)
            continue
        left -= portion
        given += portion
    return handed, given


def _spec(spec: WorkerSpec) -> Path:
    """The spec, written to a folder of its own."""
    return spec.write(spec.grid_dir / "jobs" / secrets.token_hex(6) / "spec.json")


def withdraw(grid_dir: Path, num_left: int) -> None:
    """Takes jobs that have not started out of the queue, the newest first, until `num_left` are left in all."""
    found = jobs(grid_dir) if client.available() else {}
    waiting = [job_id for job_id, job in found.items() if job.info.state == "PENDING"]
    surplus = max(len(found) - num_left, 0)
    client.cancel(waiting[::-1][:surplus])


def overview(grid_dir: Path, rows: Sequence[Standing]) -> list[str]:
    """Lines on the workers, those that could not start, why jobs wait, and what the grid has cost and will cost."""
    found = registry.workers(grid_dir)
    live = [worker for worker in found if worker.is_live]
    lines = []
    for worker in live:
        hours = (time.time() - worker.made) / 3600
        job = f", job {worker.job_id}" if worker.job_id else ""
        lines.append(
            f"worker {worker.number} on {worker.host}{job}: {plural(worker.num_slots, 'cell')} at a time, "
            f"for {hours:.1f} h"
        )
    lines = lines[:NUM_SHOWN] + ([f"… and {len(lines) - NUM_SHOWN} more workers"] if len(lines) > NUM_SHOWN else [])
    num_queued = 0
    if client.available():
        try:
            queued = [job.info for job in jobs(grid_dir).values() if job.info.state != "RUNNING"]
        except client.SlurmError as error:
            lines.append(f"{error}")
        else:
            num_queued = len(queued)
            reasons = Counter((job.state.lower(), job.reason) for job in queued)
            for (state, reason), count in reasons.items():
                lines.append(f"{plural(count, 'worker')} {state}{f': {reason}' if reason else ''}")
    lines += [
        f"worker {worker.number} {worker.reason}" for worker in found if worker.reason.startswith(registry.RETIRED)
    ]
    dead = deaths(grid_dir)
    lines += [f"job {death.job} on {death.node}: {death.reason}" for death in dead[-3:]]
    if not live and not num_queued and ready(rows):
        lines.append(f"no worker: python -m launch grid {grid_dir.name} (as before) goes on")
    price = cost(rows, found)
    if price.spent >= SHOWN_HOURS:
        to_go = "" if price.to_go is None else f", about {price.to_go:,.1f} to go"
        eta = (
            ""
            if price.eta is None
            else f", ready about {datetime.fromtimestamp(price.eta).astimezone():%a %d %b %H:%M}"
        )
        lines.append(f"{price.spent:,.1f} {price.unit} spent{to_go}{eta}")
    limit = registry.limit(grid_dir)
    return lines + (
        [f"at most {plural(limit, 'worker')}: python -m launch scale N"] if limit is not None and live else []
    )
