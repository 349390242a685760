"""Table and curves -> pictures. Renders only; just `write` has an effect."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from analysis.compare.table import Block, Table
from analysis.render import tuning
from analysis.render.epochs import ACCURACY, FLIP_RATE, LATENT_GAP, MASKED_SHARE, over_epochs
from analysis.render.forest import forest
from analysis.render.points import accuracy_against_size, gap_against_sharpness
from analysis.render.profiles import performance_profiles
from analysis.render.rank_diagram import critical_differences
from analysis.render.style import Picture, house_style, save
from analysis.runs import curves

MAX_MODELS = 12
"""Models of a block in one picture; further models go to pictures NAME-2, NAME-3 and so on."""


def pictures(table: Table, recorded: pd.DataFrame) -> list[Picture]:
    """Every picture that these cells allow, block by block, and for each other one the reason why it is not drawn.

    `recorded` has columns curves.SCHEMA.
    """
    by_cell = curves.by_cell(recorded)
    drawn = []
    with house_style():
        for block in table.blocks:
            drawn += [forest(table, block), performance_profiles(block, table.findings)]
            for number, part in enumerate(_pages(block), start=1):
                page = [
                    *(
                        picture
                        for quantity in (ACCURACY, FLIP_RATE, MASKED_SHARE, LATENT_GAP)
                        for picture in over_epochs(part, by_cell, quantity, table.findings)
                    ),
                    gap_against_sharpness(part, by_cell, table.findings),
                    accuracy_against_size(part, table.findings),
                ]
                drawn += (
                    page if number == 1 else [replace(picture, name=f"{picture.name}-{number}") for picture in page]
                )
        drawn += critical_differences(table)
        drawn += tuning.pictures(table.tuning)
    return drawn


def _pages(block: Block) -> Iterator[Block]:
    """The block itself, or parts of it with at most MAX_MODELS models each."""
    for start in range(0, len(block.models), MAX_MODELS):
        models = block.models[start : start + MAX_MODELS]
        yield replace(block, models=models, entries=tuple(entry for entry in block.entries if entry.model in models))


def write(drawn: Iterable[Picture], folder: Path) -> list[Path]:
    """Writes FOLDER/NAME.pdf and FOLDER/NAME.png for each picture that has a figure; returns their paths."""
    with house_style():
        return [path for picture in drawn if picture.figure for path in save(picture.figure, folder / picture.name)]
