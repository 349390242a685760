"""Where jobs run, through submitit: SLURM's nodes or this machine's processes. The job is the same everywhere."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import submitit

from launch import snapshot
from launch.arrays import Array
from launch.job import EXIT_AGAIN, Job
from launch.resources import sbatch_parameters
from launch.slurm import SlurmError
from launch.submissions import job_name
from suite.recipe.cell import Cell
from suite.run.directory import RunDir

SIGNAL_SECONDS = 120
"""How long before its time limit SLURM tells a job to save what it has."""
TEARDOWN = (
    "status=$?",
    # SLURM_JOB_ID of an array's last task is the whole array's.
    "task=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}; task=${task:-$SLURM_JOB_ID}",
    f"# {EXIT_AGAIN}: a cell is to go on later. 128 and more: a signal came before the job could listen.",
    f"if [ $status -eq {EXIT_AGAIN} ] || {{ [ $status -ge 128 ] && [ ${{SLURM_RESTART_COUNT:-0}} -lt 20 ]; }}; then",
    "  # In any other state SLURM is requeueing it already, or somebody cancelled it.",
    '  if [ "$(squeue --noheader --jobs=$task --format=%T)" = RUNNING ]; then scontrol requeue $task && sleep 60; fi',
    "fi",
    "exit $status",
)
"""Ends the batch script: outside of any container, and once, however many nodes there are."""
_TIMEOUT_MINUTES = 60 * 24 * 365  # submitit's local jobs must have one


class SlurmCluster:
    """Jobs as tasks of SLURM arrays. What SLURM needs lies in GRID/jobs/TOKEN/: scripts, pickled jobs, their logs."""

    def __init__(self, grid_dir: Path, data_dir: Path, code: str, train_options: tuple[str, ...] = ()) -> None:
        self.grid_dir, self.data_dir = grid_dir.resolve(), data_dir.resolve()
        self.code = code
        self.train_options = train_options

    def submit(self, array: Array, token: str, dependency: str | None) -> str:
        """Hands the array over, held; returns its job id.

        Raises:
            SlurmError: sbatch refuses it.
        """
        executor = self._executor(array, token, dependency)
        try:
            with executor.batch():
                jobs = [executor.submit(self._job(array, token, task)) for task in array.tasks]
        except submitit.core.utils.FailedJobError as error:
            said = str(error).strip().splitlines()[-1].removeprefix("sbatch: error: ")
            raise SlurmError(
                f"sbatch: {said}; arrays submitted before stay, and launching again submits the rest "
                "(at a limit? scontrol show config: MaxJobCount; sacctmgr show qos: MaxSubmitJobs)"
            ) from error
        return str(jobs[0].job_id).partition("_")[0]

    def script(self, array: Array, token: str, dependency: str | None) -> str:
        """The batch script that `submit` would hand to sbatch."""
        executor = self._executor(array, token, dependency)
        if len(array.tasks) > 1:  # as submitit does on its way to an array
            executor.parameters["map_count"] = len(array.tasks)
        return str(executor._make_submission_file_text(executor._submitit_command_str, uid=""))  # noqa: SLF001

    def _executor(self, array: Array, token: str, dependency: str | None) -> submitit.SlurmExecutor:
        resources = array.resources
        executor = submitit.SlurmExecutor(folder=self.grid_dir / "jobs" / token, python=resources.python)
        parameters = sbatch_parameters(resources, mounts=(self.grid_dir, self.data_dir))
        # The script lives on after a signal, to tell SLURM what comes next.
        parameters["setup"] = ["trap : USR2 TERM", *resources.setup]
        additional = {
            "chdir": str(snapshot.folder_of(self.grid_dir, self.code)),
            "requeue": True,
            "hold": True,
            "kill-on-invalid-dep": "yes",
        }
        executor.update_parameters(
            **parameters,
            additional_parameters=additional,
            job_name=job_name(self.grid_dir, token),
            dependency=dependency,
            array_parallelism=array.max_parallel or len(array.tasks),
            signal_delay_s=min(SIGNAL_SECONDS, resources.time * 60 // 4),
            teardown=list(TEARDOWN),
        )
        return executor

    def _job(self, array: Array, token: str, cells: tuple[Cell, ...]) -> Job:
        resources = array.resources
        num_processes = max(resources.gpus_per_node, 1)
        return Job(
            runs=tuple(self.grid_dir / cell.id for cell in cells),
            data_dir=self.data_dir,
            code=snapshot.folder_of(self.grid_dir, self.code),
            submission=token,
            num_threads=max(resources.cpus_per_task // (num_processes * len(cells)), 1),
            num_processes=num_processes,
            num_nodes=resources.nodes,
            time_limit_seconds=resources.time * 60,
            train_options=self.train_options,
        )


class LocalCluster:
    """Jobs as processes of this machine; the cores are shared out evenly, GPUs go round."""

    def __init__(self, data_dir: Path, max_parallel: int | None = None, train_options: tuple[str, ...] = ()) -> None:
        self.data_dir = data_dir.resolve()
        self.train_options = train_options
        self.num_gpus = _num_gpus()
        num_cores = len(os.sched_getaffinity(0))
        self.max_parallel = max_parallel or self.num_gpus or num_cores
        self.num_threads = max(num_cores // self.max_parallel, 1)
        self._jobs: dict[str, submitit.Job[None]] = {}

    def submit(self, run: RunDir, code: Path) -> str:
        """Starts the run's job, which trains with that folder's code; returns its id. The run is queued from here."""
        executor = submitit.LocalExecutor(folder=run.path / "jobs")
        slot = len(self._jobs) % max(self.num_gpus, 1)
        gpus = {"gpus_per_node": 1, "visible_gpus": (slot,)} if self.num_gpus else {}
        executor.update_parameters(timeout_min=_TIMEOUT_MINUTES, stderr_to_stdout=True, **gpus)
        run.hand_over("")
        with _ctrl_c_ignored():
            job = executor.submit(self._job(run, code))
        self._jobs[job.job_id] = job
        run.hand_over(str(job.job_id))
        return str(job.job_id)

    def _job(self, run: RunDir, code: Path) -> Job:
        runs = (run.path.resolve(),)
        return Job(runs, self.data_dir, code, None, self.num_threads, train_options=self.train_options)

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
