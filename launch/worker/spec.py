"""A worker's instructions, GRID/jobs/TOKEN/spec.json, and its place: node, job and time left."""

import json
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from suite.run.atomic import write_json

EXIT_AGAIN = 75
"""Exit status of a worker that leaves work behind: the batch script has SLURM start it again."""
_END_SECONDS = 180.0
"""A signal to stop in the last minutes of the time limit, or its second half if that is shorter, is the limit's."""
_SHORT_SECONDS = 240.0
"""Too little time to begin another cell; or half of the time limit, if that is less."""


@dataclass(frozen=True)
class WorkerSpec:
    """Which cells a worker trains, and with which resources.

    Args:
        grid_dir: absolute.
        data_dir: absolute.
        code: the code snapshot to train from; None: the code of this process.
        shape: name of the resources that its cells need; empty: it takes any cell.
        cells: ids that it is limited to, and those that choices add later; None: no limit.
        only: patterns that limit the latter, too.
        num_nodes: of its job; with several, a cell takes all GPUs of all of them.
        num_gpus: that its job asked for, on each node.
        num_cores: likewise; 0: all that can be used.
        gpus_per_cell: GPUs of a slot.
        cells_per_gpu: slots of a GPU.
        cpus_per_cell: cores of a slot without GPUs; default: on SLURM all of the job's, here 1.
        max_slots: maximum number of cells at a time.
        train_options: further arguments of suite.train.
        probe: if not empty, it only reports on its node to the doctor: an MLflow server to look at, or "none".
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
        """What `write` wrote, possibly by a newer launcher: unknown keys are ignored."""
        known = {each.name for each in fields(cls)}
        raw = {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key in known}
        raw |= {key: Path(raw[key]) for key in ("grid_dir", "data_dir", "code") if raw.get(key) is not None}
        raw |= {key: tuple(raw[key]) for key in ("cells", "only", "train_options") if raw.get(key) is not None}
        return cls(**raw)


@dataclass(frozen=True)
class Place:
    """Where a worker runs: `node` counts from 0 within its job, `start` names the job and its restart count.

    `seconds` is the time until the job's limit, from the moment the worker starts; None without a limit.
    """

    node: int = 0
    job_id: str = ""
    start: str = "local"
    seconds: float | None = None
    host: str = field(default_factory=lambda: os.environ.get("SLURMD_NODENAME") or os.uname().nodename)
    _begun: float = field(default_factory=time.monotonic)

    @classmethod
    def of_slurm(cls) -> "Place":
        """Read from SLURM's variables."""
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
        """Whether another cell is better left to the next job."""
        return self.seconds is not None and self.seconds_left() < min(_SHORT_SECONDS, self.seconds / 2)

    def is_out_of_time(self, since: float) -> bool:
        """Whether the limit is what ends an attempt that began `since` (time.monotonic).

        One that began late in the job has not had its time: the next job will tell.
        """
        if self.seconds is None:
            return False
        is_late = self.seconds_left() < min(_END_SECONDS, self.seconds / 2)
        return is_late and since - self._begun < self.seconds / 2
