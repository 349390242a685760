"""One point per quantizer and model: accuracy against network size, and soft-hard gap against the final sharpness mu.

A marker shows the mean over seeds, dots above and below it the single seeds. Points with the same x, such as all binary
quantizers of one model in the size plot, are spread side by side around a pale line at x.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from analysis.compare.family import FULL_PRECISION
from analysis.compare.table import Block
from analysis.render.style import (
    GREY,
    PALE,
    Picture,
    Style,
    add_caption,
    add_legend,
    name_of,
    new_figure,
    panels,
    styles,
    warnings,
)
from analysis.runs import curves
from analysis.runs.frame import natural_key, shortened

NAN = float("nan")
_APART = 0.024
"""Distance between neighbours at the same x, as a share of the axis; smaller if there is no room."""


@dataclass(frozen=True)
class Point:
    """One quantizer on one model: its seeds' values at x, in the displayed unit."""

    model: str
    quantizer: str
    x: float
    values: tuple[float, ...]


def accuracy_against_size(block: Block, findings: tuple[str, ...] = ()) -> Picture:
    """Hard test accuracy in percent over the size in bytes (log): seeds and their mean, per quantizer and model."""
    name = name_of("size", block)
    points = list(_sized(block))
    if not points:
        return Picture(name, None, f"{block.title}: no measured run has its size recorded")
    figure = new_figure(3.9)
    (axes,) = panels(figure, [""], "size of the parameters", "hard test accuracy, %")
    models = {x: {point.model for point in points if point.x == x} for x in sorted({point.x for point in points})}
    sizes = {x: shortened(sorted(own, key=natural_key), limit=3) for x, own in models.items()}
    margin = (max(sizes) / min(sizes)) ** 0.06 * 1.1
    look = styles(block.quantizers)
    _draw(axes, points, look, (min(sizes) / margin, max(sizes) * margin))
    ticks = _byte_ticks(*axes.get_xlim())
    axes.set_xticks(list(ticks), list(ticks.values()))
    top = axes.secondary_xaxis("top")
    top.set_xticks(list(sizes), list(sizes.values()), rotation=30, ha="left", rotation_mode="anchor")
    top.xaxis.set_minor_locator(NullLocator())
    top.spines["top"].set_visible(False)
    _legend(figure, points, block, look)
    caption = add_caption(
        figure,
        f"{block.title}: a binary parameter takes one bit, each other one 32. {_explained(points)}",
        warnings(findings),
    )
    return Picture(name, figure, caption)


def _byte_ticks(low: float, high: float) -> dict[float, str]:
    """Round sizes between low and high: 10 kB, 20 kB, 50 kB, ...; only powers of ten if that gives too many."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    sizes = [step * 10.0**k for k in decades for step in ((1,) if len(decades) > 5 else (1, 2, 5))]  # noqa: PLR2004
    units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")]
    words = {}
    for size in sizes:
        unit, name = next(((unit, name) for unit, name in units if size >= unit), units[-1])
        if low <= size <= high:
            words[size] = f"{size / unit:g} {name}"
    return words


def _sized(block: Block) -> Iterator[Point]:
    for entry in block.entries:
        group = block.groups[entry.quantizer, entry.model]
        if group.usable and group.num_bytes:
            yield Point(
                entry.model, entry.quantizer, group.num_bytes, tuple(100 * top1 for top1 in group.usable.values())
            )


def gap_against_sharpness(block: Block, recorded: curves.Curves, findings: tuple[str, ...] = ()) -> Picture:
    """Soft minus hard test accuracy in points over the final mu (log scale), one panel per model.

    Quantizers without mu are drawn at the left end, labelled "none". If mu ends at 0 or below, the caption names the
    quantizer instead.
    """
    name = name_of("gap", block)
    found = list(_gaps(block, recorded))
    points = [point for point in found if not point.x <= 0]
    if not points:
        return Picture(name, None, f"{block.title}: no measured run has both its soft and its hard accuracy")
    scale = _Sharpness.of([point.x for point in points])
    models = [model for model in block.models if any(model == point.model for point in points)]
    figure = new_figure(2.4 * -(-len(models) // 2) + 1.1)
    look = styles(block.quantizers)
    drawn = panels(figure, models, "mu at the end of training", "soft − hard test accuracy, points")
    for axes, model in zip(drawn, models, strict=True):
        _draw(axes, [replace(p, x=scale.place(p.x)) for p in points if p.model == model], look, scale.ends)
        axes.set_xticks(list(scale.ticks), list(scale.ticks.values()))
        axes.axhline(0, color=GREY, linewidth=0.6, zorder=0)
    _legend(figure, points, block, look)
    caption = add_caption(
        figure,
        f"{block.title}: test accuracy with the trained weights F(w*) minus that with sign(w*), after the last epoch: "
        f"runs measure both only then, so there is no gap by epoch. {_explained(points)}",
        "".join(f"Not drawn: {p.quantizer} on {p.model}, mu {p.x:g}. " for p in found if p.x <= 0).rstrip(),
        warnings(findings),
    )
    return Picture(name, figure, caption)


def _gaps(block: Block, recorded: curves.Curves) -> Iterator[Point]:
    """Points of the gap plot; x is NaN if no mu was recorded."""
    for entry in block.entries:
        group = block.groups[entry.quantizer, entry.model]
        hard, soft = group.usable, group.soft
        gaps = tuple(100 * (soft[seed] - hard[seed]) for seed in hard if seed in soft)
        if gaps and entry.quantizer != FULL_PRECISION:
            mu = curves.by_epoch(recorded, block.grid, group.averaged, curves.MU)
            yield Point(entry.model, entry.quantizer, NAN if mu.empty else float(mu.iloc[-1].mean()), gaps)


@dataclass(frozen=True)
class _Sharpness:
    """Positions of mu on a logarithmic axis whose left end is reserved for quantizers without mu."""

    ends: tuple[float, float]
    none: float
    ticks: Mapping[float, str]

    @classmethod
    def of(cls, mu: Sequence[float]) -> "_Sharpness":
        present = [value for value in mu if not np.isnan(value)] or [1.0]
        low, high = np.floor(np.log10(min(present))), np.ceil(np.log10(max(present)))
        high = max(high, low + 1)
        none = 10.0 ** (low - 0.2 * (high - low))
        left = {none: "none"} if np.isnan(mu).any() else {}
        decades = {10.0**k: f"{10.0**k:g}" for k in range(int(low), int(high) + 1)}
        first, last = (none if left else 10.0**low), 10.0**high
        margin = (last / first) ** 0.08
        return cls((first / margin, last * margin), none, {**left, **decades})

    def place(self, mu: float) -> float:
        return self.none if np.isnan(mu) else mu


def _draw(axes: Axes, points: Sequence[Point], look: Mapping[str, Style], ends: tuple[float, float]) -> None:
    """Markers and dots on a logarithmic x axis from ends[0] to ends[1]; points with the same x side by side."""
    axes.set_xscale("log")
    axes.set_xlim(ends)
    axes.xaxis.set_minor_locator(NullLocator())
    length = np.log(ends[1] / ends[0])
    places = np.unique([point.x for point in points])
    for x, group in groupby(sorted(points, key=lambda point: point.x), key=lambda point: point.x):
        same = list(group)
        # Keep neighbouring groups from overlapping.
        closest = min((abs(np.log(other / x)) / length for other in places if other != x), default=1.0)
        apart = min(_APART, 0.7 * closest / len(same))
        axes.axvline(x, color=PALE, linewidth=0.8, zorder=0)
        for k, point in enumerate(same):
            place = x * np.exp(length * apart * (k - (len(same) - 1) / 2))
            style = look[point.quantizer]
            axes.plot([place] * len(point.values), point.values, "o", color=style.color, markersize=1.6, zorder=3)
            axes.plot(
                [place],
                [np.mean(point.values)],
                style.marker,
                color=style.color,
                markersize=5.5,
                markeredgecolor="white",
                markeredgewidth=0.5,
                zorder=2,
            )


def _legend(figure: Figure, points: Sequence[Point], block: Block, look: Mapping[str, Style]) -> None:
    drawn = {point.quantizer for point in points}
    add_legend(figure, [name for name in block.quantizers if name in drawn], look, with_lines=False)


def _explained(points: Sequence[Point]) -> str:
    counts = sorted({len(point.values) for point in points})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Mark: mean over the seeds (n={n}); dots: the seeds. Marks on both sides of a line share the line's x."
