"""What a job runs: one cell, in a process of its own (or torchrun's several); and how it is stopped."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.plan import MAX_ATTEMPTS
from suite.locks import holder
from suite.rundir import RunDir

STOP_SECONDS = 20.0


@dataclass(frozen=True)
class CellJob:
    """Callable that submitit pickles and calls where the job runs. `num_threads` is per process."""

    run_path: Path
    data_dir: Path
    num_threads: int
    num_processes: int = 1

    def __call__(self) -> None:
        """Trains the cell; leaves its state true whatever happens to the training process."""
        run = RunDir(self.run_path)
        if run.state().state != "queued":  # stopped since it was submitted
            return
        environment = os.environ | {"OMP_NUM_THREADS": str(self.num_threads), "PYTHONUNBUFFERED": "1"}
        exit_code = subprocess.run(self._command(), env=environment, check=False).returncode
        state = run.state()
        if exit_code and state.state in {"queued", "running"} and holder(run.lock) is None:
            self._record_death(run, exit_code, state.attempt)

    def _command(self) -> list[str]:
        python = [sys.executable, "-m"]
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.num_processes), "-m"]
        module = ["suite.train", str(self.run_path / "cell.yaml"), "--data-dir", str(self.data_dir)]
        return [*python, *(torchrun if self.num_processes > 1 else []), *module]

    @staticmethod
    def _record_death(run: RunDir, exit_code: int, attempt: int) -> None:
        """The training process went without a word: killed, or broken before it could speak."""
        if exit_code < 0:
            reason = f"killed by {signal.Signals(-exit_code).name} (by hand, or by the kernel when memory ran out)"
            if attempt < MAX_ATTEMPTS:
                run.update(state="preempted", reason=reason)
                return
        else:
            reason = f"the training process ended with status {exit_code} before it could say why: see its log"
        run.update(state="failed", cause="error", reason=reason)


def stop(run: RunDir, state: Literal["cancelled", "preempted"], reason: str) -> None:
    """Ends the run's training, if it trains, and its job, if that has not begun; checkpoints stay.

    Raises:
        TimeoutError: the training process does not end.
    """
    deadline = time.monotonic() + STOP_SECONDS
    while (process := holder(run.lock)) is not None:
        os.kill(process, signal.SIGTERM)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run.path}: process {process} does not stop; kill -9 {process} does no harm")
        time.sleep(0.2)
    run.update(state=state, reason=reason)
