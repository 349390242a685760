"""What all figures share: colours, markers, captions, and how a figure becomes files."""

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
"""Okabe and Ito's (2008), but for their yellow, which a white page swallows. In ROW_ORDER: BNN++ is blue."""
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
"""Marker and line tell quantizers apart without colour: 66 pairs before one comes again."""

WIDTH = 7.2
"""Inches: two columns of a paper."""
SMALL, NORMAL = 7.0, 8.0
_CHARACTERS_PER_INCH = 19  # of a caption; at 7 points


@dataclass(frozen=True)
class Style:
    """How one quantizer looks, in every figure."""

    color: str
    marker: str
    linestyle: Line


@dataclass(frozen=True)
class Picture:
    """A figure under the name that its files get; without one, `caption` says why it is not drawn."""

    name: str
    figure: Figure | None
    caption: str


def styles(quantizers: Iterable[str]) -> dict[str, Style]:
    """Quantizers of ROW_ORDER always look the same, others by their place in the alphabet."""
    others = sorted(set(quantizers) - set(ROW_ORDER))
    return {
        quantizer: Style(PALETTE[k % len(PALETTE)], MARKERS[k % len(MARKERS)], LINES[k % len(LINES)])
        for k, quantizer in enumerate((*ROW_ORDER, *others))
    }


def house_style() -> AbstractContextManager[None]:
    """Figures are made and saved in it: the reader's own matplotlibrc must not change them."""
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
                "text.parse_math": False,  # names of models are no formulas
                "pdf.fonttype": 42,  # TrueType: publishers refuse matplotlib's default, Type 3
            },
        ]
    )


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches, that pyplot knows nothing of."""
    return Figure(figsize=(width, height), layout="constrained")


def panels(
    figure: Figure, titles: Sequence[str], xlabel: str, ylabel: str, num_columns: int = 2, *, sharey: bool = True
) -> list[Axes]:
    """One panel per title, row by row; what is left of the last row stays empty. Shared y are labelled on the left."""
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
    """The quantizers' marks, and lines, above the figure in as many rows as it takes."""
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
    """Writes the sentences below the figure, each on lines of its own; returns them as one text."""
    said = [sentence for sentence in sentences if sentence]
    width = int(figure.get_figwidth() * _CHARACTERS_PER_INCH)
    lines = "\n".join(textwrap.fill(sentence, width) for sentence in said)
    # A label of the figure, so that the layout keeps its place.
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=SMALL, linespacing=1.3)
    return " ".join(said)


def warnings(findings: Sequence[str], limit: int = 3) -> str:
    """The first findings as one sentence, and how many more there are."""
    if not findings:
        return ""
    more = f"; and {len(findings) - limit} more, which the tables list" if len(findings) > limit else ""
    return f"Findings: {'; '.join(findings[:limit])}{more}."


def file_name(kind: str, *names: str) -> str:
    """`curves-digits-bw-scratch`: the names once each, whatever no file system likes as `_`."""
    parts = (re.sub(r"[^A-Za-z0-9.+_]+", "_", name) for name in dict.fromkeys(names))
    return "-".join((kind, *parts))


def name_of(kind: str, block: Block) -> str:
    """The name of a block's picture."""
    return file_name(kind, block.grid, block.dataset, block.task, block.init)


def save(figure: Figure, stem: Path) -> list[Path]:
    """STEM.pdf and STEM.png (200 dpi), the same bytes for the same figure: neither says when it was made."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    pdf, png = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("pdf", "png"))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, for both
    figure.savefig(pdf, metadata={"CreationDate": None})
    figure.savefig(png, dpi=200)
    return [pdf, png]
