"""Estimates the cost of training a grid: operations counted on the networks, divided by an assumed rate.

    python benchmarks/cost.py imagenet
    python benchmarks/cost.py cifar10 --share 0.01

GPU-hours = cells x epochs x (images trained x operations of a step + images held out x operations of a forward pass) /
(share x peak). A multiply-add counts as two operations, as torch's counter reports them for one forward and one
backward pass; element-wise work is not counted. No network is trained or even initialised.
"""

from collections import defaultdict
from typing import Annotated

import typer

from launch.cost import SIZES, operations, total_operations
from suite.recipe.cell import Cell
from suite.recipe.grid_file import load_grid


def table(cells: list[Cell], rate: float) -> list[str]:
    """Markdown: one row per model, start and length, then the sum. `rate` is in operations per second."""
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
    grid: Annotated[str, typer.Argument(help="Name of a bundled grid, or a file.")],
    peak: Annotated[float, typer.Option(help="Peak TFLOP/s of the GPU; 312 is an A100's, dense bf16.")] = 312.0,
    share: Annotated[float, typer.Option(help="Share of the peak that training is assumed to sustain.")] = 0.2,
) -> None:
    """Prints a Markdown table: hours of one cell and of all cells, by model, start and length."""
    cells = list(load_grid(grid).untuned().cells())
    if unknown := {cell.dataset for cell in cells} - SIZES.keys():
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: the number of images is not known here")
    print(f"Estimate: nothing is measured; {share:.0%} of {peak:g} TFLOP/s is assumed\n")
    print("\n".join(table(cells, share * peak * 1e12)))


if __name__ == "__main__":
    typer.run(main)
