"""Where jobs run, through submitit: this machine's processes. The job is the same everywhere."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import submitit

from launch.job import CellJob
from suite.rundir import RunDir

_TIMEOUT_MINUTES = 60 * 24 * 365  # submitit's local jobs must have one


class LocalCluster:
    """Jobs as processes of this machine; the cores are shared out evenly, GPUs go round."""

    def __init__(self, data_dir: Path, max_parallel: int | None = None) -> None:
        self.data_dir = data_dir
        self.num_gpus = _num_gpus()
        num_cores = len(os.sched_getaffinity(0))
        self.max_parallel = max_parallel or self.num_gpus or num_cores
        self.num_threads = max(num_cores // self.max_parallel, 1)
        self._jobs: dict[str, submitit.Job[None]] = {}

    def submit(self, run: RunDir) -> str:
        """Starts the run's job; returns its id. The run is queued from here on."""
        executor = submitit.LocalExecutor(folder=run.logs)
        slot = len(self._jobs) % max(self.num_gpus, 1)
        gpus = {"gpus_per_node": 1, "visible_gpus": (slot,)} if self.num_gpus else {}
        executor.update_parameters(timeout_min=_TIMEOUT_MINUTES, stderr_to_stdout=True, **gpus)
        run.update(state="queued", job_id="", cause=None, reason="")
        with _ctrl_c_ignored():
            job = executor.submit(CellJob(run.path.resolve(), self.data_dir.resolve(), self.num_threads))
        self._jobs[job.job_id] = job
        run.update(job_id=job.job_id)
        return str(job.job_id)

    def is_alive(self, job_id: str) -> bool:
        """Whether the job's process lives, whichever launcher started it."""
        if job_id in self._jobs:
            return not self._jobs[job_id].done()
        return is_alive(job_id)


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C: it is the launcher's, who stops them in order."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def is_alive(job_id: str) -> bool:
    """Whether a local job of some launcher lives: its id is the process id of submitit's controller."""
    try:
        return b"submitit" in Path(f"/proc/{job_id}/cmdline").read_bytes()
    except OSError:
        return False


def _num_gpus() -> int:
    """GPUs this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device])
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return listing.count("GPU ")


def has_slurm() -> bool:
    """Whether this machine submits to SLURM."""
    from shutil import which

    return which("sbatch") is not None
