"""Data sets of random pixels in CIFAR-10's size and shape, or larger: the cost of a step does not depend on content.

A model is written `resnet20`, or `resnet18@64` for images of 64 px instead of 32.
"""

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suite.data.in_memory import LOADERS
from suite.data.source import Pixels, Source
from suite.engines.process_group import Layout
from suite.recipe.cell import Cell
from suite.recipe.settings import AS_IS, Execution
from suite.training.trainer import Trainer

SIZE = 32
NUM_BYTES = 20_000 * 3 * SIZE * SIZE
"""Bytes of a data set's training images, for any image size."""


def data_set(size: int) -> str:
    """Registers a data set of random images of `size` px and returns its name; only benchmarks use it."""
    name = f"noise{size}"
    LOADERS.setdefault(name, lambda _, *, with_test: _noise(size))  # noqa: ARG005  (signature of LOADERS)
    return name


@cache
def _noise(size: int) -> Source:
    num_images = NUM_BYTES // (3 * size * size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, size, size), dtype=torch.uint8, generator=generator)
    data = Pixels(images, torch.arange(num_images) % 10)
    return Source(tuple("0123456789"), data, data, size, checksum="")


def cell_of(model: str, quantizer: str, batch_size: int, precision: str = "float32", **training: object) -> Cell:
    """SGD with momentum for convolutions, AdamW for transformers; crops and flips; `training` overrides the recipe."""
    name, _, size = model.partition("@")
    base: dict[str, Any] = (
        {"optimizer": "adamw", "learning_rate": 1e-3}
        if name.startswith(("vit", "deit"))
        else {"optimizer": "sgd", "learning_rate": 0.05}
    )
    recipe = {"epochs": 10, "batch_size": batch_size, "precision": precision, "weight_decay": 1e-4, **base, **training}
    sharp = {quantizer: {"shape": "linear", "start": 2.0, "end": 50.0}} if quantizer == "bnn++" else {}
    return Cell.model_validate(
        {
            "dataset": data_set(int(size or SIZE)),
            "model": name,
            "quantizer": quantizer,
            "seed": 0,
            "data": {"crop": "padded", "horizontal_flip": True},
            "training": recipe,
            "quantization": {"sharpness": sharp},
        }
    )


def trainer_of(
    model: str,
    quantizer: str,
    batch_size: int,
    precision: str = "float32",
    execution: Execution = AS_IS,
    **training: object,
) -> Trainer:
    """A trainer of `model` on noise, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cell = cell_of(model, quantizer, batch_size, precision, **training)
    return Trainer(cell, Layout(device=device), Path(), None, execution)


class Stepping:
    """Single steps of a trainer, repeating its first epoch."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._batches: Iterator[tuple[Tensor, Tensor]] = iter(())

    def step(self, number: int = 1) -> float:
        """Mean seconds per step of the next `number` steps, including loading."""
        start = time.perf_counter()
        for _ in range(number):
            batch = next(self._batches, None)
            if batch is None:
                self._batches, self.trainer.step = self.trainer.loaders.train.epoch(0), 0
                batch = next(self._batches)
            self.trainer._train_step(*batch)  # noqa: SLF001  (an epoch would be too long)
        synchronize()
        return (time.perf_counter() - start) / number


def synchronize() -> None:
    """Waits for the GPU, if there is one, so that the next clock reading includes its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
