"""CIFAR-10 with ResNet-20 on a GPU: full precision and five binary methods, in the remaining time.

The recipe comes from the bundled grid cifar10, untuned and shortened: it shows that grids train on a GPU, and the
methods' first epochs.
"""

import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpu_speed import launch

from suite.run import journal
from suite.run.directory import RunDir, read_plan

METHODS = ("fp", "bc", "pc", "bnn", "bnn+", "bnn++")
NUM_IMAGES = 45_000
"""The grid trains on 90 % of CIFAR-10's training images and validates on the rest."""
USUAL_RATE = 20_000.0
"""Training images per second over all cells, if not measured: a low estimate for a GPU."""
SHARE = 0.7
"""Planned share of the remaining time; the rest is for start-up, tests of the networks and estimation errors."""


@dataclass(frozen=True)
class Design:
    """Numbers of seeds and epochs; the cells are METHODS times seeds."""

    num_seeds: int
    epochs: int


def design(seconds: float, rate: float) -> Design | None:
    """The design that fits into `seconds` at `rate` images per second.

    It has 3 seeds of up to 60 epochs; beyond that, up to 8 seeds; beyond that, up to 300 epochs. None if not even 3
    seeds of 2 epochs fit.
    """
    epochs_in_all = int(SHARE * seconds * rate / NUM_IMAGES)
    per_seed = epochs_in_all // len(METHODS)
    num_seeds = min(max(per_seed // 60, 3), 8)
    epochs = min(per_seed // num_seeds, 300)
    return Design(num_seeds, epochs) if epochs > 1 else None


@contextmanager
def images(place: Path) -> Iterator[Path]:
    """Folder of the data sets: `place`, or a temporary folder into which its cifar10.tar.xz is unpacked."""
    archive = place / "cifar10.tar.xz"
    if (place / "cifar10").is_dir() or not archive.is_file():
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="cifar10-") as folder:
        with tarfile.open(archive, "r:xz") as file:
            file.extractall(folder, filter="data")
        yield Path(folder)


def train(
    data_dir: Path,
    chosen: Design,
    at_once: int,
    device: Literal["cuda", "cpu"],
    seconds: float,
    model: str = "resnet20",
) -> dict[str, Any]:
    """Trains the grid; returns its design, a row for each done cell, and the seconds it took.

    Raises:
        RuntimeError: the grid cannot run.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder, images(data_dir) as place:
        settings = {
            "models": f"[{model}]",
            "quantizers": f"[{', '.join(METHODS)}]",
            "seeds": str(list(range(chosen.num_seeds))),
            "tune": "null",
            "training.epochs": str(chosen.epochs),
            "training.warmup_epochs": str(min(5, chosen.epochs - 1)),
            "training.precision": "bf16" if device == "cuda" else "float32",
        }
        more = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        grid = Path(folder) / "gpu-cifar10.yaml"
        grid.write_text(_first_block(), encoding="utf-8")
        launch(grid, Path(folder) / "runs", place, at_once, device, *more, seconds=seconds)
        rows = list(_rows(Path(folder) / "runs" / "gpu-cifar10"))
    return {
        "model": model,
        "num_seeds": chosen.num_seeds,
        "epochs": chosen.epochs,
        "at_once": at_once,
        "seconds": time.perf_counter() - start,
        "cells": rows,
    }


def _first_block() -> str:
    """The first block of the bundled grid cifar10: ResNets trained from scratch."""
    import yaml

    import suite.recipe

    path = Path(next(iter(suite.recipe.__path__))) / "grids" / "cifar10.yaml"
    grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    return yaml.safe_dump(grid | {"name": "gpu-cifar10", "blocks": grid["blocks"][:1]}, sort_keys=False)


def _rows(grid_dir: Path) -> Iterator[dict[str, Any]]:
    for planned in read_plan(grid_dir).values():
        run, cell = RunDir(grid_dir / planned.cell.id), planned.cell
        result = run.result()
        if result is None:
            continue
        metrics = journal.read_metrics(run.journal)
        yield {
            "cell": cell.id,
            "quantizer": cell.quantizer,
            "seed": cell.seed,
            "result": result,
            "train/loss": [metrics[epoch]["train/loss"] for epoch in sorted(metrics)],
            "val/top1": [metrics[epoch]["val/top1"] for epoch in sorted(metrics) if "val/top1" in metrics[epoch]],
        }
