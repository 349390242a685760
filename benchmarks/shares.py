"""Time in a training cell besides training: the shares of loader, journal, checkpoints and the MLflow forwarder.

    python benchmarks/shares.py

The cells run in this process as under `suite.train`, with a loader in memory, and every call to the four is timed in
place. An epoch's time is composed of medians: its first batch (which draws the epoch's order and augmentation), its
other batches (their mean, because several are made together), its steps with their heartbeats, and its end: journal
and checkpoint (a part of one, if epochs are short). So a few steps represent an epoch of a real data set's length.
Shares are of the whole epoch, without validation.

The forwarder is not part of a cell: the launcher calls it every few seconds. Its share is the CPU time of a call that
finds one changed cell in the grid, over that interval, as if it used the core that trains.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from machine import describe, verdict
from noise import cell_of, synchronize
from rich.console import Console
from rich.table import Table

from launch.here import SYNC_SECONDS
from suite.engines.process_group import joined
from suite.recipe.cell import Cell
from suite.recipe.grid_file import load_grid
from suite.run import mlflow_replica
from suite.run.directory import Planned, RunDir, write_plan
from suite.run.failures import Heartbeat
from suite.run.journal import Journal
from suite.run.saving import SAVING_SHARE, Checkpoints, Record
from suite.training.trainer import Trainer

BAR = 0.01
NUM_CELLS = 36
"""Cells of the forwarded grid: as many as in the bundled digits grid."""
NAMES = (
    *("train/loss", "train/top1", "val/top1", "mu", "health/flip_rate", "health/latent_gap", "health/masked_share"),
    *("time/images_per_second", "time/loader_stall_share"),
)
METRICS = dict.fromkeys(NAMES, 0.5)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Case:
    """A cell, and the number of steps per epoch of the real data set; None: the cell's own."""

    name: str
    cell: Cell
    num_steps: int | None


class Clock:
    """Seconds of calls, by purpose."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def time(self, what: str, call: Callable[[], Result]) -> Result:
        """Times the call; returns its result."""
        start = time.perf_counter()
        result = call()
        synchronize()
        self.seconds[what].append(time.perf_counter() - start)
        return result

    def median(self, what: str) -> float:
        """Median seconds of a call; 0 without calls."""
        return statistics.median(self.seconds[what] or [0.0])

    def mean(self, what: str) -> float:
        """Mean seconds of a call, for calls that do unequal work; 0 without calls."""
        return statistics.fmean(self.seconds[what] or [0.0])


def run(case: Case, folder: Path, num_epochs: int, max_steps: int) -> tuple[Clock, int]:
    """(seconds of the parts, steps per epoch), measured after one warm-up epoch."""
    directory = RunDir.create(folder / case.cell.id, case.cell)
    with joined() as layout:
        trainer = Trainer(case.cell, layout, folder, None)
        attempt = directory.claim()
        record = Record(directory, attempt, trainer)
        checkpoints = Checkpoints(directory, attempt, trainer, None, 10.0)
        heartbeat = Heartbeat(attempt.path, 0, num_epochs)
        clock = Clock()
        for epoch in range(1 + num_epochs):
            if epoch == 1:
                clock = Clock()
            _epoch(trainer, record, checkpoints, heartbeat, clock, max_steps)
        record.close()
        heartbeat.close()
        return clock, case.num_steps or trainer.steps_per_epoch


def _epoch(
    trainer: Trainer, record: Record, checkpoints: Checkpoints, heartbeat: Heartbeat, clock: Clock, max_steps: int
) -> None:
    """One epoch as in `suite.train`, ended after `max_steps`."""
    batches = trainer.loaders.train.epoch(trainer.epoch)
    for step in range(min(max_steps, trainer.steps_per_epoch)):
        images, labels = clock.time("loader" if step else "first batch", lambda: next(batches))
        clock.time("training", partial(trainer._train_step, images, labels))  # noqa: SLF001  (an epoch is too long)
        clock.time("signs of life", partial(heartbeat.beat, trainer.step, trainer.epoch))
        clock.time("looking at the clock", partial(checkpoints.step, step))
    trainer.epoch, trainer.step = trainer.epoch + 1, 0
    clock.time("journal", lambda: record.epoch(METRICS))
    clock.time("checkpoint", checkpoints.save)


def shares(clock: Clock, num_steps: int, forwarder: float) -> dict[str, float]:
    """Share of each part in an epoch of num_steps steps; the forwarder's share is passed through."""
    per_step = {what: num_steps * clock.median(what) for what in ("training", "signs of life", "looking at the clock")}
    parts = {
        "loader": clock.median("first batch") + (num_steps - 1) * clock.mean("loader"),
        "journal": clock.median("journal") + per_step["signs of life"],
        "checkpoint": clock.median("checkpoint") + per_step["looking at the clock"],
    }
    seconds = per_step["training"] + sum(parts.values())
    # If a checkpoint after each epoch would exceed SAVING_SHARE, suite.train saves less often.
    parts["checkpoint"] = min(parts["checkpoint"], SAVING_SHARE * seconds + per_step["looking at the clock"])
    return {what: part / seconds for what, part in parts.items()} | {"forwarder": forwarder}


def forwarder_share(folder: Path, num_calls: int) -> float:
    """CPU seconds of a call of `mlflow_replica.sync` over the seconds between calls, in a grid of NUM_CELLS cells."""
    template = load_grid("digits").untuned().cells()[0]
    cells = [Cell.model_validate(template.model_dump() | {"seed": seed}) for seed in range(NUM_CELLS)]
    grid = folder / "forwarded"
    runs = [RunDir.create(grid / cell.id, cell) for cell in cells]
    write_plan(grid, map(Planned, cells))
    seconds, journal = [], Journal(runs[0].journal, runs[0].claim())
    for call in range(1 + num_calls):
        journal.append(1 + call, METRICS)
        start = time.process_time()
        mlflow_replica.sync(grid, mlflow_replica.default_uri(folder))
        seconds.append(time.process_time() - start)
    journal.close()
    return statistics.median(seconds[1:]) / SYNC_SECONDS


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Timed epochs.")] = 3,
    steps: Annotated[
        int, typer.Option(min=2, help="Steps to run per epoch, at most; medians represent the rest.")
    ] = 30,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for the runs, on the disk to measure; default: a temporary one.")
    ] = None,
) -> None:
    """Measures the time around the training steps of two cells."""
    print(describe())
    digits = next(cell for cell in load_grid("digits").untuned().cells() if cell.name == "digits/resnet8/bnn++/s0")
    cases = [
        Case("ResNet-20, batch 128, 50,000 images as CIFAR-10's", cell_of("resnet20", "bnn++", 128), 50_000 // 128),
        Case("the digits grid's ResNet-8, batch 64", digits, None),
    ]
    console = Console()
    lines = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary, console.status("the forwarder") as status:
        forwarder = forwarder_share(Path(temporary), 5)
        for case in cases:
            status.update(case.name)
            clock, num_steps = run(case, Path(temporary), epochs, steps)
            found = shares(clock, num_steps, forwarder)
            milliseconds = {what: 1e3 * clock.median(what) for what in clock.seconds}
            table = Table("part", "ms each", "share of an epoch", title=f"{case.name}: {num_steps} steps an epoch")
            table.add_row("training step", f"{milliseconds['training']:.2f}", f"{1 - sum(found.values()):.2%}")
            first, other = milliseconds["first batch"], 1e3 * clock.mean("loader")
            table.add_row("loader", f"{other:.3f} a batch, {first:.2f} the first", f"{found['loader']:.3%}")
            beat, end = milliseconds["signs of life"], milliseconds["journal"]
            table.add_row("journal", f"{beat:.3f} a step, {end:.2f} an epoch", f"{found['journal']:.3%}")
            look, save = milliseconds["looking at the clock"], milliseconds["checkpoint"]
            table.add_row("checkpoint", f"{look:.3f} a step, {save:.2f} an epoch", f"{found['checkpoint']:.3%}")
            call = f"{1e3 * forwarder * SYNC_SECONDS:.0f} every {SYNC_SECONDS:g} s, {NUM_CELLS} cells"
            table.add_row("MLflow forwarder, elsewhere", call, f"{forwarder:.3%}")
            console.print(table)
            together = sum(found.values())
            lines.append(verdict(f"{case.name}: all four together", 100 * together, 100 * BAR, unit=" %"))
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
