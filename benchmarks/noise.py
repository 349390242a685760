"""A data set of random pixels, CIFAR-10's size and shape: what a step costs does not depend on what is in them."""

from pathlib import Path
from typing import Any

import torch

from suite.config import Cell
from suite.data.parts import Pixels, Source
from suite.data.small import LOADERS
from suite.distributed import Layout
from suite.trainer import Trainer

NAME = "noise"
NUM_IMAGES = 20_000


def _noise(_directory: Path) -> Source:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = Pixels(images, torch.arange(NUM_IMAGES) % 10)
    return Source(tuple("0123456789"), data, data, 32, checksum="")


def trainer_of(model: str, quantizer: str, batch_size: int, precision: str) -> Trainer:
    """A trainer of `model` on noise: SGD with momentum for convolutions, AdamW for transformers; crops and flips."""
    LOADERS.setdefault(NAME, _noise)  # a data set for nobody else
    base: dict[str, Any] = (
        {"optimizer": "adamw", "learning_rate": 1e-3}
        if model.startswith("vit")
        else {"optimizer": "sgd", "learning_rate": 0.05}
    )
    cell = Cell.model_validate(
        {
            "dataset": NAME,
            "model": model,
            "quantizer": quantizer,
            "seed": 0,
            "data": {"crop": "padded", "horizontal_flip": True},
            "training": {"epochs": 10, "batch_size": batch_size, "precision": precision, "weight_decay": 1e-4, **base},
            "quantization": {"sharpness": {quantizer: {"shape": "linear", "start": 2.0, "end": 50.0}}}
            if quantizer != "fp"
            else {},
        }
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Trainer(cell, Layout(device=device), Path(), None)


def synchronize() -> None:
    """Waits for the GPU, if there is one, so that a clock read next is true."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
