"""Estimates the GPU-hours of a grid before it runs, from the operations of its networks and an assumed rate."""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from suite.recipe.cell import Cell

PEAK = 312e12
"""Operations per second of an A100 in dense bf16, according to NVIDIA's data sheet."""
SHARE, SMALL_SHARE = 0.2, 0.01
"""Assumed share of the peak that training sustains, on images of 64 pixels and more, and on smaller ones."""


class Size(NamedTuple):
    """A data set's training images, classes, image side and channels."""

    num_images: int
    num_classes: int
    image_size: int
    in_chans: int = 3


SIZES = {
    "digits": Size(1_438, 10, 8, 1),
    "fashion-mnist": Size(60_000, 10, 28, 1),
    "cifar10": Size(50_000, 10, 32),
    "cifar100": Size(50_000, 100, 32),
    "imagenet": Size(1_281_167, 1000, 224),
}


class Operations(NamedTuple):
    """Operations for one image; a multiply-add counts as two."""

    forward: float
    step: float


@cache
def operations(model: str, dataset: str, image_size: int | None) -> Operations:
    """A model's operations, counted by torch in one forward and one backward pass of two images on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import models

    size = SIZES[dataset]
    side = image_size or size.image_size
    network = models.skeleton(model, size.num_classes, side, size.in_chans)
    images = torch.randn(2, size.in_chans, side, side, device="meta")
    with FlopCounterMode(display=False) as counter:
        logits = network(images)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    return Operations(forward / 2, (forward + counter.get_total_flops()) / 2)


def total_operations(cell: Cell) -> float:
    """Operations of a cell's training, including validation after each epoch, excluding the final test."""
    each = operations(cell.model, cell.dataset, cell.data.image_size)
    held_out = SIZES[cell.dataset].num_images * cell.data.validation_fraction
    trained = SIZES[cell.dataset].num_images - held_out
    return cell.training.epochs * (trained * each.step + held_out * each.forward)


def gpu_hours(cells: Iterable[Cell]) -> float | None:
    """Estimated hours on one A100; None if a data set's size, or the cost of a user's own model, cannot be told."""
    total = 0.0
    for cell in cells:
        if cell.dataset not in SIZES:
            return None
        try:
            operations_of_cell = total_operations(cell)
        except Exception:  # a user's forward pass may need values, which the meta device does not have
            if ":" in cell.model:
                return None
            raise
        side = cell.data.image_size or SIZES[cell.dataset].image_size
        total += operations_of_cell / (PEAK * (SHARE if side >= 64 else SMALL_SHARE)) / 3600  # noqa: PLR2004
    return total
