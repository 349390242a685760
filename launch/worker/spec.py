"""A worker's instructions, GRID/jobs/TOKEN/spec.json, and its place: node, job and time left."""

import json
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from suite.run.atomic import write_json

EXIT_AGAIN = 75
"""Exit status of a worker that leaves work behind: the batch script has SLURM restart it."""
_END_SECONDS = 180.0
"""A stop signal is due to the time limit if at most this time is left, or half of the limit if that is shorter."""
_SHORT_SECONDS = 240.0
"""With less time left than this (or than half of the time limit, if that is less), a worker begins no cell."""


@dataclass(frozen=True)
class WorkerSpec:
    """Which cells a worker trains, and with which resources.

    Args:
        grid_dir: absolute.
        data_dir: absolute.
        code: the code snapshot to train from; None: the code of this process.
        shape: name of the resources that its cells need; empty: it takes any cell.
        cells: ids that it is limited to, in addition to cells that choices add later; None: no limit.
        only: patterns that limit the cells that choices add.
        num_nodes: nodes of its job; with several, a cell uses all GPUs of all nodes.
        num_gpus: GPUs that its job requested on each node.
        num_cores: cores that its job requested on each node; 0: all usable ones.
        gpus_per_cell: GPUs of a slot.
        cells_per_gpu: slots of a GPU.
        cpus_per_cell: cores of a slot without GPUs; default: on SLURM all of the job's, here 1.
        max_slots: maximum number of cells at a time.
        train_options: further arguments of suite.train.
        probe: if not empty, it only reports on its node to the doctor; the MLflow server to contact, or "none".
    """

    grid_dir: Path
    data_dir: Path
    code: Path | None = None
    shape: str = ""
    cells: tuple[str, ...] | None = None
    only: tuple[str, ...] = ()
    num_nodes: int = 1
    num_gpus: int = 0
    num_cores: int = 0
    gpus_per_cell: int = 1
    cells_per_gpu: int = 1
    cpus_per_cell: int | None = None
    max_slots: int | None = None
    train_options: tuple[str, ...] = ()
    probe: str = ""

    def write(self, path: Path) -> Path:
        """Writes it as JSON; returns the path."""
        write_json(
            path, {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        )
        return path

    @classmethod
    def read(cls, path: Path) -> "WorkerSpec":
        """Reads a spec that `write` wrote. Ignores unknown keys, which a newer launcher may have written."""
        known = {each.name for each in fields(cls)}
        raw = {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key in known}
        raw |= {key: Path(raw[key]) for key in ("grid_dir", "data_dir", "code") if raw.get(key) is not None}
        raw |= {key: tuple(raw[key]) for key in ("cells", "only", "train_options") if raw.get(key) is not None}
        return cls(**raw)


@dataclass(frozen=True)
class Place:
    """Where a worker runs: `node` counts from 0 within its job, `start` names the job and its restart count.

    `seconds` is the time from the worker's start to the job's limit; None without a limit.
    """

    node: int = 0
    job_id: str = ""
    start: str = "local"
    seconds: float | None = None
    host: str = field(default_factory=lambda: os.environ.get("SLURMD_NODENAME") or os.uname().nodename)
    _begun: float = field(default_factory=time.monotonic)

    @classmethod
    def of_slurm(cls) -> "Place":
        """The place according to SLURM's environment variables."""
        from launch.slurm import client

        job_id = os.environ["SLURM_JOB_ID"]
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # SLURM_JOB_ID of the last task is the whole array's
            job_id = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        start = f"{job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        return cls(int(os.environ.get("SLURM_NODEID", "0")), job_id, start, client.time_left_seconds(job_id))

    def seconds_left(self) -> float:
        """Time until the job's limit; infinite without one."""
        return float("inf") if self.seconds is None else self.seconds - (time.monotonic() - self._begun)

    def is_short_of_time(self) -> bool:
        """Whether too little time is left to begin another cell."""
        return self.seconds is not None and self.seconds_left() < min(_SHORT_SECONDS, self.seconds / 2)

    def is_out_of_time(self, since: float) -> bool:
        """Whether the time limit is ending an attempt that began at `since` (time.monotonic).

        False for an attempt that began in the second half of the job: the next job gives it more time.
        """
        if self.seconds is None:
            return False
        is_late = self.seconds_left() < min(_END_SECONDS, self.seconds / 2)
        return is_late and since - self._begun < self.seconds / 2
