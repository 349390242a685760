"""Forest plot: BNN++ minus each other quantizer, paired by seed, a panel per model."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from analysis.compare.cells import Cells, pairs_of
from analysis.compare.comparison import Block, Entry
from analysis.compare.verdicts import Member
from analysis.render.style import BLUE, GREY, SMALL, Picture, add_caption, name_of, new_figure, panels, warnings
from analysis.stats.paired import ALPHA, CONFIDENCE

ROW_INCHES, PANEL_INCHES, MARGIN_INCHES = 0.27, 0.6, 1.0
_PAIRS_BELOW = 0.24
"""Of a row: single pairs lie below their mean, where the interval does not hide them."""


def forest(block: Block, members: Mapping[Member, Cells], against: str, findings: tuple[str, ...] = ()) -> Picture:
    """Paired differences in percentage points: mean, interval at level CONFIDENCE, each pair as a circle, n and p.

    Panels are models, rows the quantizers that are compared with something. A row without a difference says so.
    """
    rows = list(dict.fromkeys(entry.quantizer for entry in block.entries if entry.reference))
    name = name_of("differences", block)
    if not any(entry.difference for entry in block.entries):
        return Picture(name, None, f"{block.title}: no seed is measured on both sides of any comparison")
    height = PANEL_INCHES + ROW_INCHES * len(rows)
    figure = new_figure(-(-len(block.models) // 2) * height + MARGIN_INCHES)
    drawn = dict(zip(block.models, panels(figure, block.models, f"{against} − quantizer, points", ""), strict=True))
    for entry in block.entries:
        if entry.reference:
            _draw_row(drawn[entry.model], members, entry, entry.reference, y=rows.index(entry.quantizer))
    low = min(axes.get_xlim()[0] for axes in drawn.values())
    high = max(axes.get_xlim()[1] for axes in drawn.values())
    for axes in drawn.values():
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
        axes.set_xlim(low, high)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    caption = add_caption(
        figure,
        f"{block.title}: hard test accuracy of {against} minus the quantizer's, in percentage points, paired by seed. "
        f"Right of 0, {against} is better. Diamond and bar: mean and {CONFIDENCE:.0%} interval over n pairs, hollow "
        "without an interval; circles: the pairs.",
        _about_p(block),
        warnings(findings),
    )
    return Picture(name, figure, caption)


def _draw_row(axes: Axes, members: Mapping[Member, Cells], entry: Entry, reference: str, y: int) -> None:
    difference = entry.difference
    if difference is None:
        _write(axes, y, "no pair")
        return
    pairs = pairs_of(members, reference, (entry.quantizer, entry.model)).values()
    axes.plot(
        [100 * pair for pair in pairs],
        [y + _PAIRS_BELOW] * len(pairs),
        "o",
        color=GREY,
        markerfacecolor="none",
        markersize=3.2,
    )
    mean = 100 * difference.mean
    words = f"n={difference.n}"
    if difference.low is None or difference.high is None:
        axes.plot([mean], [y], "D", color=BLUE, markerfacecolor="white", markersize=5)
        words += ", no interval"
    else:
        ends = [[mean - 100 * difference.low], [100 * difference.high - mean]]
        axes.errorbar([mean], [y], xerr=ends, fmt="D", color=BLUE, markersize=5, capsize=2.5, linewidth=1.4)
    p = entry.adjusted.p if entry.adjusted else None
    _write(axes, y, words + (", underpowered" if p is None else f", p={p:.2g}"))


def _write(axes: Axes, y: int, words: str) -> None:
    """Right of the panel, on row y."""
    axes.text(1.02, y, words, transform=axes.get_yaxis_transform(), va="center", fontsize=SMALL)


def _about_p(block: Block) -> str:
    found = [entry.adjusted for entry in block.entries if entry.adjusted]
    said = []
    if any(not adjusted.underpowered for adjusted in found):
        said.append(f"p: two-sided sign-flip test, adjusted by Holm's method for all {block.family_size} comparisons.")
    if any(adjusted.underpowered for adjusted in found):
        said.append(
            f"Underpowered: no data from so few pairs could reach p ≤ {ALPHA} in this family of {block.family_size}; "
            "it is no evidence of equality."
        )
    return " ".join(said)
