"""What a job runs: a cell, or a pack of them side by side, on one node or several; and how a local one is stopped.

Ends with status 0 when its cells are settled, 1 when some failed for good, and EXIT_AGAIN when one is to go on later:
the batch script then has SLURM start the job again.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launch.attempt import Follower, Leader
from launch.plan import SETTLED
from suite.run.directory import RunDir
from suite.train import STOP_SIGNALS

EXIT_AGAIN = 75
STOP_SECONDS = 20.0
_POLL_SECONDS = 0.2
_END_SECONDS = 180.0
"""A signal to stop in the last minutes of the time limit is the limit's."""


class JobFailedError(Exception):
    """Cells of the job failed for good; the message says which, and the causes."""


@dataclass(frozen=True)
class Place:
    """Where a job's process is: `node` counts from 0, `start` names the job and how often SLURM started it again."""

    node: int = 0
    job_id: str = ""
    start: str = "local"
    time_limit_seconds: float | None = None
    _begun: float = field(default_factory=time.monotonic)

    @classmethod
    def of_slurm(cls, time_limit_seconds: float | None) -> "Place":
        """As SLURM's variables have it."""
        job_id = os.environ["SLURM_JOB_ID"]
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # SLURM_JOB_ID of the last task is the whole array's
            job_id = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        start = f"{job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        return cls(int(os.environ.get("SLURM_NODEID", "0")), job_id, start, time_limit_seconds)

    def is_out_of_time(self) -> bool:
        """Whether the job is about to reach its time limit."""
        limit = self.time_limit_seconds
        return limit is not None and time.monotonic() - self._begun > limit - _END_SECONDS


@dataclass(frozen=True)
class Job:
    """Callable that submitit pickles and calls once per node.

    Args:
        runs: absolute run directories; more than one are trained side by side on the same GPUs.
        data_dir: absolute.
        code: the code snapshot to train from; None: the code of this process.
        submission: token of the record that owns the cells; None: the local launcher's job.
        num_threads: per training process.
        num_processes: per node and cell.
        num_nodes: of the job.
        time_limit_seconds: of the SLURM job.
        train_options: further arguments of suite.train.
    """

    runs: tuple[Path, ...]
    data_dir: Path
    code: Path | None
    submission: str | None
    num_threads: int
    num_processes: int = 1
    num_nodes: int = 1
    time_limit_seconds: float | None = None
    train_options: tuple[str, ...] = ()

    def __call__(self) -> None:
        """Trains the cells; leaves their states true whatever happens to the training processes.

        Raises:
            JobFailedError: cells failed for good, and none is to go on.
            SystemExit: with EXIT_AGAIN, a cell is to go on later.
        """
        place = Place() if self.submission is None else Place.of_slurm(self.time_limit_seconds)
        kind = Follower if place.node else Leader
        attempts: list[Leader | Follower] = [kind(self, place, index) for index in range(len(self.runs))]
        self._train(attempts)
        if self.submission is None:
            return
        mine = [(attempt.run, attempt.run.state()) for attempt in attempts if attempt.is_mine]
        if any(state.state not in SETTLED for _, state in mine):
            raise SystemExit(EXIT_AGAIN)
        failed = [f"{run.cell().name}: {state.cause}" for run, state in mine if state.state == "failed"]
        if failed:
            raise JobFailedError(f"failed: {', '.join(failed)}")

    @staticmethod
    def _train(attempts: "list[Leader | Follower]") -> None:
        with _listening(attempts) as asked, ExitStack() as stack:
            active = []
            for attempt in attempts:
                stack.callback(attempt.end)
                if attempt.begin(asked):
                    active.append(attempt)
            while active:
                if asked:
                    for attempt in active:
                        attempt.ask(signal.Signals[asked[0]])
                active = [attempt for attempt in active if attempt.look(asked[0] if asked else "")]
                if active:
                    time.sleep(_POLL_SECONDS)


@contextmanager
def _listening(attempts: "list[Leader | Follower]") -> Iterator[list[str]]:
    """Inside, a signal to stop is noted, at once and in the run directories; names of those that came."""
    asked: list[str] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)
        for attempt in attempts:
            if attempt.is_mine and attempt.process is not None:
                with suppress(OSError):  # the disk is full, say: the processes are asked all the same
                    attempt.note_stop(asked[0])

    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(run: RunDir, reason: str) -> None:
    """Ends the run's training, if it trains, and has its job not begin, if it has not; checkpoints stay.

    Raises:
        TimeoutError: the training process does not end.
    """
    run.take_back()
    attempt = run.newest()
    if attempt is None or attempt.end() is not None:
        return
    deadline = time.monotonic() + STOP_SECONDS
    while (process := attempt.pid()) is not None and attempt.end() is None:
        attempt.stop()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run.path}: process {process} does not stop; kill -9 {process} does no harm")
        time.sleep(0.2)
    if (attempt.end() or {}).get("state") == "preempted":
        attempt.finish(reason=reason)
