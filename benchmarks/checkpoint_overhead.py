"""Cost of checkpoints: seconds of a save over seconds of the steps between two saves, alternating in one run.

    python benchmarks/checkpoint_overhead.py --every 100
    python benchmarks/checkpoint_overhead.py --models resnet20 --steps 20        a shorter measurement

A save includes everything that training waits for: gathering the state, its checksum, the write and the flush to disk.
If `--steps` is below `--every`, fewer steps are timed between saves, and their mean is used for the others.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from machine import describe
from noise import Stepping, trainer_of

from suite.run import checkpoint
from suite.training.trainer import Trainer


def measure(trainer: Trainer, num_steps: int, num_saves: int, folder: Path) -> tuple[list[float], list[float], int]:
    """(seconds of each step, seconds of each save, bytes of a checkpoint)."""
    steps: list[float] = []
    saves: list[float] = []
    path = folder
    stepping = Stepping(trainer)
    for _ in range(3):  # the first steps allocate memory
        stepping.step()
    for _ in range(num_saves):
        steps.extend(stepping.step() for _ in range(num_steps))
        start = time.perf_counter()
        path = checkpoint.save(folder, trainer.state_dict())
        saves.append(time.perf_counter() - start)
    return steps, saves, path.stat().st_size


def main(
    every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
    steps: Annotated[int, typer.Option(help="Steps timed between two saves.")] = 100,
    saves: Annotated[int, typer.Option(help="Number of saves to time.")] = 3,
    models: str = "resnet20,vit_mini_patch4_32",
    batch_size: int = 128,
    precision: str = "float32",
    folder: Annotated[
        Path | None, typer.Option(help="Checkpoint folder, on the disk to measure; default: a temporary one.")
    ] = None,
) -> None:
    """Times training steps and checkpoints of BNN++ models."""
    print(f"{describe()}\nbatch {batch_size}, {precision}")
    for model in models.split(","):
        trainer = trainer_of(model, "bnn++", batch_size, precision)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            step_seconds, save_seconds, num_bytes = measure(trainer, steps, saves, Path(temporary))
        step, save = statistics.mean(step_seconds), statistics.mean(save_seconds)
        print(
            f"{model}: step {1e3 * step:.1f} ms, save {1e3 * save:.1f} ms (worst {1e3 * max(save_seconds):.1f}), "
            f"{num_bytes:,} bytes: {save / (every * step):.2%} every {every} steps"
        )


if __name__ == "__main__":
    typer.run(main)
