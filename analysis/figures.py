"""Results and curves -> pictures: pure, but for `draw`, which writes them. Rendering only."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from analysis import curves
from analysis.cells import Results
from analysis.comparison import Table, comparison
from analysis.figure_cells import cells_by_block, key_of
from analysis.figure_differences import forest
from analysis.figure_epochs import ACCURACY, FLIP_RATE, over_epochs
from analysis.figure_points import accuracy_against_size, gap_against_sharpness
from analysis.figure_ranks import critical_differences
from analysis.figure_style import Picture, house_style, save


def pictures(frame: pd.DataFrame, table: Table, recorded: pd.DataFrame) -> list[Picture]:
    """Everything that these cells allow to draw, block by block, and why the rest is not drawn.

    `frame` has columns cells.SCHEMA, `recorded` curves.SCHEMA, `table` is the comparison of the frame.
    """
    members, by_cell = cells_by_block(frame), curves.by_cell(recorded)
    drawn = []
    with house_style():
        for block in table.blocks:
            own = members[key_of(block)]
            drawn += [
                forest(block, own, table.against, table.findings),
                *over_epochs(block, own, by_cell, ACCURACY, table.findings),
                *over_epochs(block, own, by_cell, FLIP_RATE, table.findings),
                gap_against_sharpness(block, own, by_cell, table.findings),
                accuracy_against_size(block, own, table.findings),
            ]
        drawn += critical_differences(table)
    return drawn


def write(drawn: Iterable[Picture], folder: Path) -> list[Path]:
    """The files of each picture that has a figure: FOLDER/NAME.pdf and FOLDER/NAME.png."""
    with house_style():
        return [path for picture in drawn if picture.figure for path in save(picture.figure, folder / picture.name)]


def draw(results: Results, recorded: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes all pictures of the results into the folder; returns the files."""
    table = comparison(results.frame, results.findings)
    return write(pictures(results.frame, table, recorded), folder)
