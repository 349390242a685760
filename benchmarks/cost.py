"""What a grid's training takes, as an estimate: operations counted on the networks, over a rate that is assumed.

    python benchmarks/cost.py imagenet
    python benchmarks/cost.py cifar10 --share 0.01

GPU-hours = cells x epochs x (images trained x operations of a step + images held out x operations of a forward pass) /
(share x peak). Operations are two for each multiply-add, as torch's counter finds them in one forward and one backward
pass; element-wise work is not among them. No network is trained, and none is even drawn.
"""

from collections import defaultdict
from functools import cache
from typing import Annotated, NamedTuple

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

import models
from suite.recipe.cell import Cell
from suite.recipe.grid_file import load_grid


class Size(NamedTuple):
    """A data set's training images, classes and, as it comes, image side and channels."""

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
    """Of one image."""

    forward: float
    step: float


@cache
def operations(model: str, dataset: str, image_size: int | None) -> Operations:
    """Counted on two images without memory, for one: forward, and forward with backward."""
    size = SIZES[dataset]
    side = image_size or size.image_size
    with torch.device("meta"):
        network = models.create(model, size.num_classes, side, size.in_chans)
        images = torch.randn(2, size.in_chans, side, side)
    with FlopCounterMode(display=False) as counter:
        logits = network(images)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    return Operations(forward / 2, (forward + counter.get_total_flops()) / 2)


def total_operations(cell: Cell) -> float:
    """Of a cell's training, with the validation after each epoch; without its one test."""
    each = operations(cell.model, cell.dataset, cell.data.image_size)
    held_out = SIZES[cell.dataset].num_images * cell.data.validation_fraction
    trained = SIZES[cell.dataset].num_images - held_out
    return cell.training.epochs * (trained * each.step + held_out * each.forward)


def table(cells: list[Cell], rate: float) -> list[str]:
    """Markdown: a row for each model, start and length, then the sum. `rate` is in operations per second."""
    lines = [
        "| model | start | epochs | GFLOP an image and step | images/s | hours a cell | cells | GPU-hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.model, cell.init, cell.training.epochs].append(cell)
    for (model, init, epochs), group in groups.items():
        step = operations(model, group[0].dataset, group[0].data.image_size).step
        hours = total_operations(group[0]) / rate / 3600
        lines.append(
            f"| {model} | {init} | {epochs} | {step / 1e9:.2f} | {rate / step:,.0f} | {hours:,.1f} | {len(group)} "
            f"| {hours * len(group):,.0f} |"
        )
    total = sum(map(total_operations, cells)) / rate / 3600
    return [*lines, f"| all | | | | | | {len(cells)} | {total:,.0f} |"]


def main(
    grid: Annotated[str, typer.Argument(help="A bundled grid, or a file.")],
    peak: Annotated[float, typer.Option(help="TFLOP/s of the GPU; 312 is an A100's, dense bf16.")] = 312.0,
    share: Annotated[float, typer.Option(help="Of the peak, what training is assumed to sustain.")] = 0.2,
) -> None:
    """Print a Markdown table: hours of one cell and of all, by model, start and length."""
    cells = list(load_grid(grid).cells())
    if unknown := {cell.dataset for cell in cells} - SIZES.keys():
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: the number of images is not known here")
    print(f"Estimate: nothing is measured; {share:.0%} of {peak:g} TFLOP/s is assumed\n")
    print("\n".join(table(cells, share * peak * 1e12)))


if __name__ == "__main__":
    typer.run(main)
