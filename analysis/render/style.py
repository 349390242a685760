"""Colours, markers, captions and file output shared by all figures."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.compare.family import ROW_ORDER
from analysis.compare.table import Block

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
PALETTE = (BLACK, ORANGE, SKY, GREEN, RED, BLUE, PINK)
"""Okabe and Ito's (2008) colours without yellow, which is hard to see on white. In ROW_ORDER, BNN++ is blue."""
GREY, PALE = "#767676", "#cccccc"
Line = Literal["-", "-."] | tuple[int, tuple[int, ...]]
MARKERS = ("s", "o", "^", "v", "P", "D", "X", "<", ">", "h", "*")
LINES: tuple[Line, ...] = (
    (0, (5, 2)),
    (0, (1, 1)),
    (0, (6, 1, 1, 1)),
    (0, (3, 1)),
    "-.",
    "-",
)
"""Marker and line style distinguish quantizers without colour: 66 pairs before one repeats."""

WIDTH = 7.2
"""Width in inches: two columns of a paper."""
SMALL, NORMAL = 7.0, 8.0
_CHARACTERS_PER_INCH = 19  # in a caption, at 7 points


@dataclass(frozen=True)
class Style:
    """Appearance of one quantizer in every figure."""

    color: str
    marker: str
    linestyle: Line


@dataclass(frozen=True)
class Picture:
    """A figure with the name of its files; if there is no figure, `caption` says why."""

    name: str
    figure: Figure | None
    caption: str


def styles(quantizers: Iterable[str]) -> dict[str, Style]:
    """Quantizers of ROW_ORDER always look the same; others are styled by alphabetical position."""
    others = sorted(set(quantizers) - set(ROW_ORDER))
    return {
        quantizer: Style(PALETTE[k % len(PALETTE)], MARKERS[k % len(MARKERS)], LINES[k % len(LINES)])
        for k, quantizer in enumerate((*ROW_ORDER, *others))
    }


def house_style() -> AbstractContextManager[None]:
    """Style for making and saving figures; overrides the user's matplotlibrc."""
    return matplotlib.style.context(
        [
            "default",
            {
                "font.size": NORMAL,
                "axes.titlesize": NORMAL + 1,
                "axes.labelsize": NORMAL,
                "xtick.labelsize": SMALL,
                "ytick.labelsize": SMALL,
                "legend.fontsize": NORMAL,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.linewidth": 0.6,
                "axes.grid": False,
                "text.parse_math": False,  # model names are not formulas
                "pdf.fonttype": 42,  # TrueType: publishers refuse matplotlib's default, Type 3
            },
        ]
    )


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of this size in inches, unknown to pyplot."""
    return Figure(figsize=(width, height), layout="constrained")


def panels(
    figure: Figure, titles: Sequence[str], xlabel: str, ylabel: str, num_columns: int = 2, *, sharey: bool = True
) -> list[Axes]:
    """One panel per title, row by row; the rest of the last row stays empty. Shared y axes are labelled on the left."""
    num_columns = min(num_columns, len(titles))
    num_rows = -(-len(titles) // num_columns)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=False, sharey=sharey)
    axes = list(grid.flat)
    for unused in axes[len(titles) :]:
        unused.remove()
    for position, (panel, title) in enumerate(zip(axes, titles, strict=False)):
        panel.set_title(title, loc="left")
        panel.set_xlabel(xlabel if position + num_columns >= len(titles) or not sharey else "")
        panel.set_ylabel(ylabel if position % num_columns == 0 else "")
    return axes[: len(titles)]


def add_legend(figure: Figure, names: Sequence[str], look: Mapping[str, Style], *, with_lines: bool = True) -> None:
    """Legend of the quantizers' markers (and lines) above the figure, in as many rows as needed."""
    handles = [
        Line2D(
            [],
            [],
            color=look[name].color,
            marker=look[name].marker,
            linestyle=look[name].linestyle if with_lines else "",
            markersize=4 if with_lines else 6,
            label=name,
        )
        for name in names
    ]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(names), 6 if with_lines else 9),
        frameon=False,
        handlelength=3.5 if with_lines else 1,
        columnspacing=1.5,
        handletextpad=0.5,
    )


def add_caption(figure: Figure, *sentences: str) -> str:
    """Writes the sentences below the figure, each starting a new line; returns them as one text."""
    said = [sentence for sentence in sentences if sentence]
    width = int(figure.get_figwidth() * _CHARACTERS_PER_INCH)
    lines = "\n".join(textwrap.fill(sentence, width) for sentence in said)
    # As a figure label, so that the layout reserves space for it.
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=SMALL, linespacing=1.3)
    return " ".join(said)


def warnings(findings: Sequence[str], limit: int = 3) -> str:
    """The first `limit` findings as one sentence, and the number of further ones."""
    if not findings:
        return ""
    more = f"; and {len(findings) - limit} more, which the tables list" if len(findings) > limit else ""
    return f"Findings: {'; '.join(findings[:limit])}{more}."


def file_name(kind: str, *names: str) -> str:
    """`curves-digits-bw-scratch`: distinct names joined by `-`; characters unsafe in file names become `_`."""
    parts = (re.sub(r"[^A-Za-z0-9.+_]+", "_", name) for name in dict.fromkeys(names))
    return "-".join((kind, *parts))


def name_of(kind: str, block: Block) -> str:
    """The file name of a block's picture."""
    return file_name(kind, block.grid, block.dataset, block.task, block.init)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes STEM.pdf and STEM.png (200 dpi); the same figure gives the same bytes, since neither holds a date."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    pdf, png = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("pdf", "png"))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # lay out once for both files
    figure.savefig(pdf, metadata={"CreationDate": None})
    figure.savefig(png, dpi=200)
    return [pdf, png]
