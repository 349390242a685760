"""One attempt at one cell: on the job's first node, which decides and records, and on its other nodes, which follow."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from launch import rendezvous
from launch.ending import End, after_attempt, after_lost_job
from launch.memory import num_oom_kills
from launch.plan import SETTLED
from launch.rendezvous import Word
from launch.submissions import owners, read
from launch.training_process import TrainingProcess, command, devices_of, environment
from suite.recipe.cell import AS_IS
from suite.run import failures
from suite.run.attempt import Attempt, BusyError, newest_number
from suite.run.directory import RunDir, planned_executions
from suite.train import EXIT_BUSY

if TYPE_CHECKING:
    from launch.job import Job, Place

LOOK_SECONDS = 2.0
"""How often a running cell is asked whether it was cancelled."""
SETTLE_SECONDS, UNBEGUN_SECONDS = 60.0, 5.0
"""How long the first node waits for the last word of a training process on another one that has begun, or has not."""
FREE_SECONDS = 30.0
"""How long a job waits for an earlier one's processes to let go of the run."""
PARENT_SECONDS = 60.0
"""How long a shared file system may take to show another node's result."""
_NUM_TAIL_CHARS = 200


class Leader:
    """The cell's attempt as the job's first node sees it. `is_mine`: whether the run is this job's to care for."""

    def __init__(self, job: "Job", place: "Place", index: int) -> None:
        self.job, self.place, self.index = job, place, index
        self.run = RunDir(job.runs[index])
        self.before = self.run.state()
        self.checkpoint_before = ""
        self.word = Word(place.start, 0, 0, None)
        self.is_mine = False
        self.attempt: Attempt | None = None
        self.process: TrainingProcess | None = None
        self._num_oom_kills = num_oom_kills()
        self._next_look = self._ended = 0.0

    def begin(self, asked: list[str]) -> bool:
        """Starts training, unless there is no need or it is another's; other nodes are told. Whether it started."""
        if self._is_to_run(asked) and not asked:
            try:
                self.attempt = self.run.claim(self.place.job_id, is_jobs=True)
            except BusyError as error:
                print(error, flush=True)
                self.is_mine = False
            else:
                self.checkpoint_before = newest_checkpoint(self.run)
                self.word = replace(self.word, attempt=self.attempt.number)
                self._start()
                return True
        self._say(None)
        return False

    def ask(self, number: int) -> None:
        """Passes a signal to stop on."""
        if self.process is not None:
            self.process.ask(number)

    def note_stop(self, signal_name: str) -> None:
        """Notes that the job was asked to stop, for when all its processes are killed before they can say so."""
        if self.attempt is not None:
            failures.note_stop(self.attempt.path, signal_name)

    def end(self) -> None:
        """Nothing of the attempt runs any more."""
        if self.process is not None:
            self.process.end()

    def look(self, asked_by: str) -> bool:
        """Whether the attempt still goes on; when it has ended, its end.json says what comes of it."""
        if self.process is None:
            return False
        now = time.monotonic()
        exit_code = self.process.exit_code()
        if exit_code is None:
            if now >= self._next_look:
                self._next_look = now + LOOK_SECONDS
                if self.run.state().state == "cancelled":
                    self.process.ask(signal.SIGTERM)
            return True
        self._ended = self._ended or now
        if exit_code and not asked_by and self._address_was_taken():
            self._start()
            return True
        if self._others_still_write(now - self._ended):
            return True
        self._settle(exit_code, asked_by)
        self._say(None)
        return False

    def _is_to_run(self, asked: list[str]) -> bool:
        run, state = self.run, self.before
        if self.job.submission is None:
            self.is_mine = state.state == "queued"  # or it was stopped since it was submitted
        else:
            owner = owners(read(run.path.parent)).get(run.path.name)
            self.is_mine = owner is not None and owner[0].token == self.job.submission
        if not self.is_mine or state.state in SETTLED or not self._parent_is_done(asked):
            return False
        wait_seconds = 0.0 if self.job.submission is None else FREE_SECONDS
        before = run.newest()
        if before is not None:
            _eventually(lambda: not before.is_live(self.place.job_id), wait_seconds, asked)
            if before.end() is None and not before.is_live(self.place.job_id):
                lost = after_lost_job(run.state(), failures.noted_stop(before.path), newest_checkpoint(run))
                before.finish(**lost)
        self.before = run.state()
        return self.before.state not in SETTLED

    def _parent_is_done(self, asked: list[str]) -> bool:
        """If it failed, this cell is cancelled; if it still has to run, a later launch starts this one."""
        cell = self.run.cell()
        if cell.parent is None:
            return True
        parent = RunDir(self.run.path.parent / cell.parent)
        wait_seconds = 0.0 if self.job.submission is None else PARENT_SECONDS
        _eventually(lambda: parent.state().state in SETTLED, wait_seconds, asked)
        state = parent.state()
        if state.state == "done" or asked:
            return state.state == "done"
        name = parent.cell().name
        if state.state in SETTLED:
            what = f"failed: {state.cause}" if state.state == "failed" else "was cancelled"
            self.run.cancel(f"starts from {name}, which {what}")
        else:
            reason = f"starts from {name}, which is not done: launch the grid again"
            self.run.hand_over(self.place.job_id, "planned", reason)
            self.is_mine = False
        return False

    def _start(self) -> None:
        endpoint = None
        if self.job.num_nodes > 1:
            endpoint = rendezvous.free_endpoint(f"{self.place.start} {self.index} {self.word.generation}")
            self._say(endpoint)
        self._ended = 0.0
        self.process = start(self.job, self.place, self.index, replace(self.word, endpoint=endpoint))

    def _say(self, endpoint: str | None) -> None:
        """Tells the other nodes, if there are any."""
        if self.job.num_nodes > 1:
            self.word = replace(self.word, generation=self.word.generation + 1, endpoint=endpoint)
            rendezvous.say(self.run.path, self.word)

    def _address_was_taken(self) -> bool:
        """Another program was quicker, training has not begun, and other ports are left to try."""
        if self.job.num_nodes == 1 or self.word.generation >= rendezvous.MAX_GENERATIONS or self.process is None:
            return False
        return not self._is_begun() and rendezvous.is_taken(self.process.said())

    def _others_still_write(self, seconds: float) -> bool:
        """Whether training's first process, which may be on another node, has yet to say how it ended."""
        if self.job.num_nodes == 1 or self.run.state(as_told=True).state != "running":
            return False
        return seconds < (SETTLE_SECONDS if self._is_begun() else UNBEGUN_SECONDS)

    def _is_begun(self) -> bool:
        """Whether training got so far as to say anything."""
        return self.attempt is not None and (self.attempt.beat() is not None or self.attempt.end() is not None)

    def _settle(self, exit_code: int, asked_by: str) -> None:
        if self.attempt is None or newest_number(self.run.attempts) > self.attempt.number or exit_code == EXIT_BUSY:
            self.is_mine = False  # a later attempt has it
            return
        said = self.process.said() if self.process is not None and exit_code else ""
        last_lines = [line.strip("│ ") for line in said.splitlines() if any(map(str.isalnum, line))]
        end = End(
            exit_code,
            asked_by,
            is_out_of_memory=num_oom_kills() > self._num_oom_kills,
            is_out_of_time=self.place.is_out_of_time(),
            is_begun=self._is_begun(),
            is_group=self.job.num_processes * self.job.num_nodes > 1,
            last_line=last_lines[-1][:_NUM_TAIL_CHARS] if last_lines else "",
            checkpoint_before=self.checkpoint_before,
            checkpoint=newest_checkpoint(self.run),
        )
        changes = after_attempt(self.run.state(as_told=True), end)
        if changes or self.attempt.end() is None:
            self.attempt.finish(**changes)


class Follower:
    """The cell's attempt on another node of the job: does what the first one says, and decides nothing."""

    is_mine = False

    def note_stop(self, signal_name: str) -> None:
        """The first node does."""

    def __init__(self, job: "Job", place: "Place", index: int) -> None:
        self.job, self.place, self.index = job, place, index
        self.run = RunDir(job.runs[index])
        self.process: TrainingProcess | None = None
        self._generation = 0
        self._next_look, self._patience = 0.0, time.monotonic() + rendezvous.WAIT_SECONDS

    def begin(self, asked: list[str]) -> bool:
        """There is something to wait for."""
        return not asked

    def ask(self, number: int) -> None:
        """Passes a signal to stop on."""
        if self.process is not None:
            self.process.ask(number)

    def end(self) -> None:
        """Nothing of the attempt runs any more."""
        if self.process is not None:
            self.process.end()

    def look(self, asked_by: str) -> bool:
        """Whether the first node may still have something to say, or training goes on."""
        now = time.monotonic()
        is_running = self.process is not None and self.process.exit_code() is None
        if is_running:
            self._patience = now + rendezvous.WAIT_SECONDS
        elif asked_by or now > self._patience:
            return False
        if now < self._next_look:
            return True
        self._next_look = now + rendezvous.POLL_SECONDS
        word = rendezvous.heard(self.run.path, self.place.start, self._generation)
        if word is None:
            return True
        self._generation = word.generation
        self.end()
        if word.endpoint is None:
            return False
        self.process = start(self.job, self.place, self.index, word)
        return True


def start(job: "Job", place: "Place", index: int, word: Word) -> TrainingProcess:
    """Starts training of the job's cell `index` on this node, to meet the other nodes where the word says."""
    run = RunDir(job.runs[index])
    execution = planned_executions(run.path.parent).get(run.path.name, AS_IS)
    train = [str(run.cell_path), "--data-dir", str(job.data_dir), "--attempt", str(word.attempt)]
    train += ["--execution", execution.model_dump_json(exclude_defaults=True), *job.train_options]
    devices = devices_of(os.environ.get("CUDA_VISIBLE_DEVICES"), index, job.num_processes)
    log = Attempt(run.attempts, word.attempt).log(place.node)
    return TrainingProcess(
        command(train, job.num_processes, job.num_nodes, place.node, word),
        environment(job.code, job.num_threads, devices),
        job.code,
        log,
    )


def newest_checkpoint(run: RunDir) -> str:
    """Its name; empty where there is none. Without torch, which suite.run.checkpoint comes with."""
    return max((path.name for path in run.checkpoints.glob("epoch-*.pt")), default="")


def _eventually(is_true: Callable[[], bool], seconds: float, asked: list[str]) -> bool:
    """Whether it is, or becomes in time; no longer waited for once the job was asked to stop."""
    deadline = time.monotonic() + seconds
    while not (answer := is_true()) and time.monotonic() < deadline and not asked:
        time.sleep(0.5)
    return answer
