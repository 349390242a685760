"""Kills a training run repeatedly at random with SIGKILL; it must end bit-identical to an undisturbed one.

    python benchmarks/kills.py --kills 100
    python benchmarks/kills.py --kills 20 --set engine=deepspeed --set zero_stage=2
    python benchmarks/kills.py --kills 100 --forked
    python benchmarks/kills.py --kills 30 --forked --at-writes

Two processes under torchrun train ResNet-8 on the digits and save a checkpoint after every step. The whole process tree
is killed at a time drawn uniformly over a run's life: while importing torch, in a step, while writing a checkpoint. The
run is then resumed until it is done, and another run begins, until there were enough kills. Each run's weights,
accuracies and journal are compared with an undisturbed run's, and each must have been done only once. Before half of
the kills, the next launch starts while the first is still alive: it is refused, or it is still importing when the
first dies and then takes over. Exit status: 0 if all are equal, else 1.

With `--forked`, the two processes are forked from one that has already imported torch, without torchrun: lives are
short, and nearly all kills hit training or its checkpoints. With `--at-writes`, each kill waits until a checkpoint is
being written.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
import yaml

from suite.recipe.cell import Cell
from suite.run import failures, journal
from suite.run.directory import RunDir
from suite.train import main as main_of_a_run

MARK = "PROXBENCH_KILLS"
"""Environment variable that marks all descendants of a launch, whatever their session."""


def cell_of(epochs: int, *, is_averaged: bool) -> Cell:
    """ResNet-8 with 20 steps per epoch; with weight averaging if the engine supports it, which adds state to lose."""
    average = 0.9 if is_averaged else None
    return Cell.model_validate(
        {
            "dataset": "digits",
            "model": "resnet8",
            "quantizer": "bnn++",
            "seed": 0,
            "data": {"crop": "padded", "crop_padding": 1},
            "training": {
                "epochs": epochs,
                "batch_size": 64,
                "optimizer": "adamw",
                "learning_rate": 0.003,
                "ema_decay": average,
            },
            "quantization": {"sharpness": {"bnn++": {"shape": "exponential", "start": 2.0, "end": 500.0}}},
        }
    )


class Launch(Protocol):
    """One start of a run, including every process it starts."""

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it ended by itself within `seconds`. RuntimeError if it failed."""

    def kill(self) -> None:
        """Sends SIGKILL to all processes until none is left."""


class Torchrun:
    """A launch with torchrun, as a user would start it."""

    def __init__(self, run: RunDir, num_processes: int, execution: str) -> None:
        self.run, self.mark = run, uuid.uuid4().hex
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), "-m"]
        command = [sys.executable, "-m", *torchrun, "suite.train", str(run.cell_path), "--checkpoint-steps", "1"]
        command += ["--execution", execution]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: self.mark}
        with (run.path / "log").open("ab") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def wait(self, seconds: float | None = None) -> bool:
        """See Launch."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        require_success(self.run, status)
        return True

    def kill(self) -> None:
        """See Launch."""
        while found := self._living():
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()

    def _living(self) -> list[int]:
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found


class Forked:
    """The same program in forked processes that have already imported everything."""

    def __init__(self, run: RunDir, num_processes: int, execution: str) -> None:
        self.run, self.execution = run, execution
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
        self.pids = {self._fork(shared | rank) for rank in ranks}

    def _fork(self, environment: dict[str, str]) -> int:
        if pid := os.fork():
            return pid
        status = 1
        try:
            os.environ |= environment
            log = os.open(self.run.path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            main_of_a_run(self.run.cell_path, execution=self.execution, checkpoint_steps=1)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self, seconds: float | None = None) -> bool:
        """See Launch."""
        deadline = time.monotonic() + (1e9 if seconds is None else seconds)
        while self.pids:
            for pid in list(self.pids):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.pids.remove(pid)
                    require_success(self.run, status)
            if time.monotonic() > deadline and self.pids:
                return False
            time.sleep(0.002)
        return True

    def kill(self) -> None:
        """See Launch."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)


def require_success(run: RunDir, status: int) -> None:
    """Raises RuntimeError unless the status is 0."""
    if status:
        raise RuntimeError(f"{run.path}: {run.state().state}: {run.state().reason}; see {run.path / 'log'}")


def moment(run: RunDir, stale: set[Path]) -> str:
    """The activity of a run when it was killed, inferred from its files except the `stale` ones of earlier kills."""
    if _unfinished(run) - stale:
        return "writing a checkpoint"
    if run.result_path.exists():
        return "past its result"
    attempt = run.newest()
    beats = () if attempt is None or attempt.end() is not None else failures.beats(attempt.path).values()
    return "training" if any(beat.step is not None for beat in beats) else "starting"


def _unfinished(run: RunDir) -> set[Path]:
    """Checkpoints that are being written, or that a killed process left unfinished."""
    return set(run.checkpoints.glob(".*.tmp"))


def outcome(run: RunDir) -> dict[str, Any]:
    """All numbers of a done run except its speed."""
    metrics = journal.read_metrics(run.journal)
    kept = {epoch: {k: v for k, v in row.items() if not k.startswith("time/")} for epoch, row in metrics.items()}
    return {"result": run.result(), "journal": kept}


def main(
    kills: Annotated[int, typer.Option(help="Number of kills in total.")] = 100,
    epochs: Annotated[int, typer.Option(help="Epochs per run, of 20 steps each.")] = 10,
    processes: int = 2,
    forked: Annotated[bool, typer.Option(help="Fork the processes: no torchrun and no start-up time.")] = False,
    at_writes: Annotated[
        bool, typer.Option("--at-writes", help="Kill only while a checkpoint is being written.")
    ] = False,
    followed: Annotated[
        float, typer.Option(min=0, max=1, help="Share of kills before which the next launch starts.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Random seed of the kill times.")] = 0,
    execution: Annotated[list[str], typer.Option("--set", help="An execution setting, e.g. engine=deepspeed.")] = [],  # noqa: B006  (typer's)
    out: Annotated[Path | None, typer.Option(help="Folder to keep the runs in; default: a temporary one.")] = None,
) -> None:
    """Kills training runs at random times, resumes them, and compares the results."""
    settings = {key: yaml.safe_load(value) for key, value in (text.split("=", 1) for text in execution)}
    is_deepspeed = settings.get("engine") == "deepspeed"
    cell, chance = cell_of(epochs, is_averaged=not is_deepspeed), random.Random(seed)  # noqa: S311  (no secret)
    if forked:
        os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        for module in (
            "suite.training.trainer",
            *(["suite.engines.deepspeed.engine"] if is_deepspeed else []),
        ):
            import_module(module)
    start_of = partial(Forked if forked else Torchrun, num_processes=processes, execution=json.dumps(settings))
    with tempfile.TemporaryDirectory() as temporary:
        root = out or Path(temporary)
        undisturbed = RunDir.create(root / "undisturbed" / cell.id, cell)
        start = time.monotonic()
        start_of(undisturbed).wait()
        life_seconds = time.monotonic() - start
        print(f"undisturbed: {life_seconds:.1f} s, {undisturbed.result()}", flush=True)
        moments: Counter[str] = Counter()
        number = num_equal = 0
        start = time.monotonic()
        while moments.total() < kills:
            number += 1
            run = RunDir.create(root / f"killed-{number:03d}" / cell.id, cell)
            num_before = moments.total()
            plan = Plan(chance, kills, followed, at_writes=at_writes)
            life_seconds = _train_and_kill(run, start_of, plan, life_seconds, moments)
            equal = outcome(run) == outcome(undisturbed) and num_ends(run) <= 1
            num_equal += equal
            print(
                f"run {number}: {moments.total() - num_before} kills, {'equal' if equal else 'NOT EQUAL'}", flush=True
            )
        print(f"{moments.total()} kills in {time.monotonic() - start:.0f} s: {dict(moments)}")
        print(f"{num_equal} of {number} runs have the undisturbed one's weights, accuracies and journal")
        raise SystemExit(num_equal != number)


@dataclass(frozen=True)
class Plan:
    """Plan of the kills: random generator, total number, and share of kills before which the next launch starts."""

    chance: random.Random
    kills: int
    followed: float
    at_writes: bool


def num_ends(run: RunDir) -> int:
    """Number of attempts that recorded writing the result."""
    return sum((attempt.end() or {}).get("state") == "done" for attempt in run.all_attempts())


def _train_and_kill(
    run: RunDir, start_of: Callable[[RunDir], Launch], plan: Plan, life_seconds: float, moments: Counter[str]
) -> float:
    """Trains to the end, with kills until there were enough; returns the latest duration of a life in seconds."""
    chance, first = plan.chance, True
    follower: Launch | None = None
    while run.result() is None:
        stale, start = _unfinished(run), time.monotonic()
        launch, is_follower = follower or start_of(run), follower is not None
        follower = None
        enough = moments.total() >= plan.kills
        ended = _wait(run, launch, None if enough else chance.uniform(0, life_seconds), is_follower=is_follower)
        while plan.at_writes and not ended and not enough and not _unfinished(run) - stale:
            ended = launch.wait(0)
        if not ended:
            if chance.random() < plan.followed:
                follower = start_of(run)
                _wait(run, launch, chance.uniform(0, life_seconds / 2), is_follower=False)
            launch.kill()
            moments[f"{moment(run, stale)}{', followed' if follower else ''}"] += 1
        elif first:  # not killed: update the duration, because a shared machine varies in speed
            life_seconds = time.monotonic() - start
        first = False
    if follower is not None:
        follower.kill()
    return life_seconds


def _wait(run: RunDir, launch: Launch, seconds: float | None, *, is_follower: bool) -> bool:
    """Whether the launch ended in time, by itself or (only allowed for a follower) because it was refused."""
    try:
        return launch.wait(seconds)
    except RuntimeError:
        if not is_follower or run.state().state == "failed":
            raise
        launch.kill()
        return True


if __name__ == "__main__":
    typer.run(main)
