"""Divides a machine's GPUs and cores into slots. Each slot trains one cell at a time."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from launch.worker.spec import WorkerSpec
from suite.errors import UserError

_NVIDIA = Path("/dev")


class SlotError(UserError):
    """The machine has too few GPUs or cores for a single cell."""


@dataclass(frozen=True)
class Slot:
    """One cell's resources on each node. `devices` are entries of CUDA_VISIBLE_DEVICES, empty without GPUs."""

    devices: tuple[str, ...]
    num_processes: int
    num_threads: int
    """Cores of each process."""


def visible_gpus(visible: str | None, devices: Path = _NVIDIA) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    Args:
        visible: the variable's value; None if it is not set. As in CUDA, the first invalid entry hides all that follow:
            -1 hides all GPUs. Indices, GPU and MIG UUIDs are passed on unchanged.
        devices: folder of the driver's device files, which count if the variable is not set.
    """
    if visible is None:
        numbers = [found[1] for path in devices.glob("nvidia*") if (found := re.fullmatch(r"nvidia(\d+)", path.name))]
        return [str(place) for place in range(len(numbers))]
    gpus = []
    for entry in visible.split(","):
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", entry.strip()):
            break
        gpus.append(entry.strip())
    return gpus


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def slots_here(spec: WorkerSpec) -> list[Slot]:
    """The slots of this machine, divided as the spec says; by default one core each without GPUs.

    Raises:
        SlotError: fewer GPUs or cores than a cell needs.
    """
    gpus = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    shares = spec.gpus_per_cell, spec.cells_per_gpu, spec.cpus_per_cell, spec.max_slots
    return slots_of(gpus, num_cores(), *shares)


def slots_of(
    gpus: list[str],
    cores: int,
    gpus_per_cell: int = 1,
    cells_per_gpu: int = 1,
    cpus_per_cell: int | None = None,
    most: int | None = None,
) -> list[Slot]:
    """Divides GPUs and cores into slots; left-over GPUs stay idle, cores are shared evenly.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them; none: slots of cores only.
        cores: of this process.
        gpus_per_cell: GPUs of a slot, one training process each.
        cells_per_gpu: slots that share a GPU; only with gpus_per_cell 1.
        cpus_per_cell: cores of a slot without GPUs; default 1.
        most: maximum number of slots.

    Raises:
        SlotError: fewer GPUs or cores than a cell needs.
    """
    if not gpus:
        if gpus_per_cell > 1:
            raise SlotError(f"--gpus-per-cell {gpus_per_cell}: this machine has no usable GPU")
        count = cores // (cpus_per_cell or 1)
        if not count:
            raise SlotError(f"--cpus-per-cell {cpus_per_cell}: this process may use {cores} cores")
        count = min(count, most or count)
        return [Slot((), 1, max(cores // count, 1))] * count
    groups = [tuple(gpus[start : start + gpus_per_cell]) for start in range(0, len(gpus), gpus_per_cell)]
    groups = [group for group in groups if len(group) == gpus_per_cell] * cells_per_gpu
    if not groups:
        raise SlotError(f"--gpus-per-cell {gpus_per_cell}: only {len(gpus)} usable GPUs here ({', '.join(gpus)})")
    groups = groups[: most or len(groups)]
    return [Slot(group, gpus_per_cell, max(cores // (len(groups) * gpus_per_cell), 1)) for group in groups]
