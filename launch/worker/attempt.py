"""A worker's attempt at one cell: the job's first node decides and records, the other nodes follow it."""

import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch.plan import WAITING, Standing
from launch.slurm import client
from launch.worker import rendezvous
from launch.worker.ending import End, after_attempt, after_lost_worker
from launch.worker.memory import num_oom_kills
from launch.worker.nursery import Nursery
from launch.worker.rendezvous import Word
from launch.worker.slots import Slot
from launch.worker.spec import Place, WorkerSpec
from launch.worker.training_process import TrainingProcess, command, environment
from suite.recipe.settings import Execution
from suite.run import failures
from suite.run.attempt import Attempt, BusyError, SupersededError, newest_number
from suite.run.directory import RunDir
from suite.train import EXIT_BAD_INPUT, EXIT_BUSY

LOOK_SECONDS = 2.0
"""How often a running cell is checked for a cancellation."""
TOUCH_SECONDS = 10.0
"""How often the worker touches the attempt, to show other machines that it supervises it."""
SETTLE_SECONDS, UNBEGUN_SECONDS = 60.0, 5.0
"""How long the first node waits for another one to record the attempt's end: if training has begun, and if not."""
_NUM_TAIL_CHARS = 200


@dataclass
class Site:
    """What all attempts of a worker share. `meeting`: the file from which the job's other nodes read what to train."""

    spec: WorkerSpec
    place: Place
    meeting: Path
    worker: int = 0
    word: Word = field(default_factory=lambda: Word(""))
    nurseries: dict[int, Nursery] = field(default_factory=dict)

    def say(self, word: Word) -> Word:
        """Sends the word to the job's other nodes, if any; returns it with its generation."""
        if self.spec.num_nodes > 1:
            self.word = replace(word, start=self.place.start, generation=self.word.generation + 1)
            rendezvous.say(self.meeting, self.word)
            return self.word
        return word

    def start(self, word: Word, slot: Slot, execution: Execution) -> TrainingProcess:
        """Starts to train the word's cell on this node."""
        run = RunDir(self.spec.grid_dir / word.cell)
        execution = execution.model_copy(update={"num_workers": execution.num_workers or slot.num_threads})
        train = [str(run.cell_path), "--data-dir", str(self.spec.data_dir), "--attempt", str(word.attempt)]
        train += ["--execution", execution.model_dump_json(exclude_defaults=True), *self.spec.train_options]
        log = Attempt(run.attempts, word.attempt).log(self.place.node)
        variables = environment(self.spec.code, slot.num_threads)
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(slot.devices)} if slot.devices else {}
        if slot.num_processes * self.spec.num_nodes == 1 and execution.engine == "plain":
            nursery = self.nurseries.setdefault(slot.num_threads, Nursery(variables, self.spec.code))
            try:
                return TrainingProcess.forked(nursery, train, devices, log)
            except OSError as error:  # a plain process also works, but starts more slowly
                print(f"warm start failed, starting a new process instead: {error}", file=sys.stderr, flush=True)
        line = command(train, slot.num_processes, self.spec.num_nodes, self.place.node, word)
        return TrainingProcess.of_command(line, variables | devices, self.spec.code, log)

    def close(self) -> None:
        """Ends the nurseries, and tells the other nodes to exit."""
        self.say(Word(""))
        for nursery in self.nurseries.values():
            nursery.close()


class Training:
    """A cell in training, as the job's first node sees it."""

    def __init__(self, site: Site, standing: Standing, slot: Slot, attempt: Attempt) -> None:
        self.site, self.planned, self.slot, self.attempt = site, standing.planned, slot, attempt
        self.run = RunDir(site.spec.grid_dir / standing.cell.id)
        self.begun = time.monotonic()
        self._checkpoint_before = newest_checkpoint(self.run)
        self._num_oom_kills = num_oom_kills()
        self._next_look = self._ended = 0.0
        self._next_touch = self.begun + TOUCH_SECONDS
        self._num_ports = 0
        self._is_bad_input = False
        self.process = self._start()

    def ask(self, number: int) -> None:
        """Forwards a stop signal to the training process."""
        self.process.ask(number)

    def note_stop(self, name: str) -> None:
        """Records that the worker was asked to stop, in case all its processes are killed before they can."""
        with suppress(OSError):  # e.g. the disk is full: the processes get the signal anyway
            failures.note_stop(self.attempt.path, name)

    def look(self, asked_by: str) -> bool:
        """Whether the attempt is still running; once it has ended, records whether it will be retried."""
        now = time.monotonic()
        if now >= self._next_touch:
            self._next_touch = now + TOUCH_SECONDS
            self.attempt.touch()
        exit_code = self.process.exit_code()
        if exit_code is None:
            if now >= self._next_look:
                self._next_look = now + LOOK_SECONDS
                if self.run.is_cancelled():
                    self.process.ask(signal.SIGTERM)
            return True
        self._ended = self._ended or now
        if exit_code and not asked_by and self._address_was_taken():
            self.process = self._start()
            return True
        if self._others_still_write(now - self._ended):
            return True
        self.site.say(Word("", cell=self.run.path.name))
        self._settle(exit_code, asked_by)
        return False

    def end(self) -> None:
        """Stops the training process, and waits until it has ended."""
        self.process.end()

    def made_no_step(self) -> bool:
        """Whether the attempt failed before its first step: the machine may be to blame."""
        beat, end = self.attempt.beat(), self.attempt.end() or {}
        has_failed = end.get("cause") in {"error", "node", "oom"} and not self._is_bad_input
        return has_failed and (beat is None or beat.step is None)

    def _start(self) -> TrainingProcess:
        endpoint = None
        if self.site.spec.num_nodes > 1:
            seed = f"{self.site.place.start} {self.run.path.name} {self.attempt.number} {self._num_ports}"
            endpoint, self._num_ports = rendezvous.free_endpoint(seed), self._num_ports + 1
        self._ended = 0.0
        word = self.site.say(Word("", 0, self.run.path.name, self.attempt.number, endpoint))
        return self.site.start(word, self.slot, self.planned.execution)

    def _address_was_taken(self) -> bool:
        """Whether another program took the port before training began, and there are ports left to try."""
        if self.site.spec.num_nodes == 1 or self._num_ports >= rendezvous.MAX_GENERATIONS:
            return False
        return not self._is_begun() and rendezvous.is_taken(self.process.said())

    def _others_still_write(self, seconds: float) -> bool:
        """Whether training's first process, which may be on another node, has yet to record how it ended."""
        if self.site.spec.num_nodes == 1 or self.run.state(as_told=True).state != "running":
            return False
        return seconds < (SETTLE_SECONDS if self._is_begun() else UNBEGUN_SECONDS)

    def _is_begun(self) -> bool:
        return self.attempt.beat() is not None or self.attempt.end() is not None

    def _settle(self, exit_code: int, asked_by: str) -> None:
        if newest_number(self.run.attempts) > self.attempt.number or exit_code == EXIT_BUSY:
            return
        self._is_bad_input = exit_code == EXIT_BAD_INPUT
        last_lines = [line.strip("│ ") for line in self.process.said().splitlines() if any(map(str.isalnum, line))]
        end = End(
            exit_code,
            asked_by,
            is_out_of_memory=num_oom_kills() > self._num_oom_kills,
            is_out_of_time=self.site.place.is_out_of_time(self.begun),
            is_begun=self._is_begun(),
            is_group=self.slot.num_processes * self.site.spec.num_nodes > 1,
            last_line=last_lines[-1][:_NUM_TAIL_CHARS] if exit_code and last_lines else "",
            checkpoint_before=self._checkpoint_before,
            checkpoint=newest_checkpoint(self.run),
        )
        changes = after_attempt(self.run.state(as_told=True), end)
        if changes or self.attempt.end() is None:
            with suppress(SupersededError):  # another worker has just taken the cell over
                self.attempt.finish(**changes)


def begin(site: Site, standing: Standing, slot: Slot) -> Training | None:
    """Claims the cell and starts to train it; None if another worker has it, or if it has now failed for good."""
    run = RunDir(site.spec.grid_dir / standing.cell.id)
    before = run.newest()
    if before is not None and before.end() is None:
        if before.is_live(site.place.job_id):
            return None
        is_oom = bool(before.job_id) and _ran_out_of_memory(site.spec.grid_dir, before)
        asked_by = failures.noted_stop(before.path)
        lost = after_lost_worker(run.state(), asked_by, newest_checkpoint(run), is_out_of_memory=is_oom)
        try:
            before.finish(**lost)
        except SupersededError:  # another worker was faster
            return None
    if run.state().state not in WAITING:
        return None
    try:
        attempt = run.claim(site.place.job_id, is_jobs=True, worker=site.worker)
    except BusyError:
        return None
    return Training(site, standing, slot, attempt)


def follow(site: Site, slot: Slot, asked: list[str], executions: Callable[[str], Execution]) -> None:
    """Runs on the job's other nodes: trains the cells that the first node names, until it says to exit.

    Also returns after a stop signal, or if the first node sends nothing for WAIT_SECONDS while no training runs here.
    """
    process: TrainingProcess | None = None
    generation, patience = 0, time.monotonic() + rendezvous.WAIT_SECONDS
    try:
        while not (asked and process is None) and time.monotonic() < patience:
            if asked and process is not None:
                process.ask(signal.Signals[asked[0]])
            if process is not None and process.exit_code() is None:
                patience = time.monotonic() + rendezvous.WAIT_SECONDS
            elif asked:
                return
            word = rendezvous.heard(site.meeting, site.place.start, generation)
            if word is None:
                time.sleep(rendezvous.POLL_SECONDS)
                continue
            generation = word.generation
            if process is not None:
                process.end()
                process = None
            if not word.cell:
                return
            if word.endpoint is not None:
                process = site.start(word, slot, executions(word.cell))
    finally:
        if process is not None:
            process.end()


def _ran_out_of_memory(grid_dir: Path, attempt: Attempt) -> bool:
    """Whether the attempt's job ran out of memory according to sacct, or got SIGKILL according to its batch script.

    SIGKILL comes from memory limits that sacct does not know, but it can also have another cause.
    """
    from launch.slurm.hand_over import died  # late: imports submitit, which a local worker does not need

    job_id, made = attempt.job_id, attempt.facts.get("made", 0.0)
    deaths = (death for path in grid_dir.glob("jobs/*") for death in died(path) if death.job == job_id)
    was_killed = any(death.status == 128 + signal.SIGKILL and death.time >= int(made) for death in deaths)
    return was_killed or job_id in client.out_of_memory([job_id])


def newest_checkpoint(run: RunDir) -> str:
    """Name of the run's newest checkpoint, or empty. Avoids suite.run.checkpoint, which imports torch."""
    return max((path.name for path in run.checkpoints.glob("epoch-*.pt")), default="")
