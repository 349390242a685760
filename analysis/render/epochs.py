"""A metric over the training epochs: a line for the mean over seeds, and a band from the lowest to the highest seed.

A mean covers only cells that are done, share one recipe and have distinct seeds, and at each epoch it covers all of
them: if a seed dropped out half-way, the mean would jump. Every other cell gets a thin line that ends in a cross.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from analysis.compare.groups import Group
from analysis.compare.table import Block
from analysis.render.style import (
    BLACK,
    BLUE,
    NORMAL,
    PALE,
    Picture,
    Style,
    add_caption,
    add_legend,
    file_name,
    name_of,
    new_figure,
    panels,
    styles,
    warnings,
)
from analysis.runs import curves

MAX_LINES = 8
"""With more quantizers than this, each gets its own panel: their lines and bands would be indistinguishable in one."""
REFERENCE = "bnn++"


@dataclass(frozen=True)
class Quantity:
    """A plotted metric, multiplied by `unit`; the axis is logarithmic if small values matter most.

    `has_close_up`: each model gets a second panel that shows the last third of training.
    """

    kind: str
    metric: str
    label: str
    explanation: str
    is_log: bool = False
    has_close_up: bool = False
    unit: float = 100.0


ACCURACY = Quantity(
    "curves",
    curves.ACCURACY,
    "validation accuracy, %",
    "accuracy on the validation part after each epoch, with hardened weights as in the test",
    has_close_up=True,
)
FLIP_RATE = Quantity(
    "flips",
    curves.FLIP_RATE,
    "signs flipped in the epoch, %",
    "share of the binary weights whose sign is not that of an epoch before",
    is_log=True,
)
MASKED_SHARE = Quantity(
    "masked",
    curves.MASKED_SHARE,
    "masked weights, %",
    "share of the binary weights whose B(w*) is below a thousandth of B(0), so that gradients hardly reach them",
)
LATENT_GAP = Quantity(
    "distance",
    curves.LATENT_GAP,
    "mean |w* − sign(w*)|",
    "mean distance of the latent weights w* from the weights that are tested",
    unit=1.0,
)


@dataclass(frozen=True)
class Bundle:
    """One quantizer's curves on one model, both frames epochs by cells: the cells to average, and the others."""

    averaged: pd.DataFrame
    single: pd.DataFrame

    @property
    def is_empty(self) -> bool:
        """Whether no curve was recorded."""
        return self.averaged.empty and self.single.empty


def over_epochs(
    block: Block,
    recorded: curves.Curves,
    quantity: Quantity,
    findings: tuple[str, ...] = (),
) -> list[Picture]:
    """The metric over the epochs of each model: one picture, or one per model above MAX_LINES quantizers."""
    bundles = {
        (entry.model, entry.quantizer): _bundle(
            block.groups[entry.quantizer, entry.model], block.grid, recorded, quantity
        )
        for entry in block.entries
    }
    bundles = {key: bundle for key, bundle in bundles.items() if not bundle.is_empty}
    if not bundles:
        return [Picture(name_of(quantity.kind, block), None, f"{block.title}: no run recorded {quantity.metric}")]
    models = [model for model in block.models if any(model == key[0] for key in bundles)]
    look = styles(block.quantizers)
    if len({quantizer for _, quantizer in bundles}) <= MAX_LINES:
        return [_together(bundles, models, block, quantity, look, findings)]
    return [
        _apart({q: b for (m, q), b in bundles.items() if m == model}, model, block, quantity, findings)
        for model in models
    ]


def _bundle(group: Group, grid: str, recorded: curves.Curves, quantity: Quantity) -> Bundle:
    ids = (group.averaged, group.single)
    return Bundle(*(quantity.unit * curves.by_epoch(recorded, grid, own, quantity.metric) for own in ids))


def _together(
    bundles: dict[tuple[str, str], Bundle],
    models: list[str],
    block: Block,
    quantity: Quantity,
    look: dict[str, Style],
    findings: tuple[str, ...],
) -> Picture:
    """One panel per model with all quantizers; for accuracy, a second panel enlarges the last third of training."""
    titles = [t for m in models for t in (m, f"{m}, last third")] if quantity.has_close_up else models
    num_rows = -(-len(titles) // 2)
    figure = new_figure((2.3 if num_rows < 3 else 1.65) * num_rows + 0.9)  # noqa: PLR2004 - fits on a page
    drawn = panels(figure, titles, "epoch", "", sharey=not quantity.has_close_up)
    figure.supylabel(quantity.label, fontsize=NORMAL)
    names = [name for name in block.quantizers if any(name == key[1] for key in bundles)]
    for position, title in enumerate(titles):
        axes, model = drawn[position], models[position // 2 if quantity.has_close_up else position]
        for k, name in enumerate(names):
            if (model, name) in bundles:
                draw_bundle(axes, bundles[model, name], look[name], first_mark=k, often=title != model)
        if title != model:
            _enlarge_the_end(axes)
    _furnish(drawn, quantity)
    add_legend(figure, names, look)
    caption = add_caption(figure, f"{block.title}: {_explained(quantity, bundles.values())}", warnings(findings))
    return Picture(name_of(quantity.kind, block), figure, caption)


def _apart(
    bundles: dict[str, Bundle], model: str, block: Block, quantity: Quantity, findings: tuple[str, ...]
) -> Picture:
    """One panel per quantizer of one model, with all other means in grey behind it and the reference's mean dashed."""
    names = [name for name in block.quantizers if name in bundles]
    num_columns = 4
    figure = new_figure(1.45 * -(-len(names) // num_columns) + 0.9)
    means = {name: _mean(bundle.averaged) for name, bundle in bundles.items()}
    own = Style(BLUE, "", "-")
    drawn = panels(figure, names, "epoch", "", num_columns)
    figure.supylabel(quantity.label, fontsize=NORMAL)
    for axes, name in zip(drawn, names, strict=True):
        for other, mean in means.items():
            if other not in {name, REFERENCE}:
                axes.plot(mean.index, mean, color=PALE, linewidth=0.6, zorder=1)
        if REFERENCE in means and name != REFERENCE:
            mean = means[REFERENCE]
            axes.plot(mean.index, mean, color=BLACK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=3)
        draw_bundle(axes, bundles[name], own)
    _furnish(drawn, quantity)
    behind = (
        f"dashed: {REFERENCE}; pale: the other quantizers." if REFERENCE in means else "Pale: the other quantizers."
    )
    caption = add_caption(
        figure,
        f"{block.title}, {model}: {_explained(quantity, bundles.values())} Blue: the panel's own; {behind}",
        warnings(findings),
    )
    name = file_name(quantity.kind, block.grid, block.dataset, block.task, block.init, model)
    return Picture(name, figure, caption)


def draw_bundle(axes: Axes, bundle: Bundle, style: Style, first_mark: int = 0, *, often: bool = False) -> None:
    """Mean and band of the averaged cells, a thin line with a cross for each other. Markers start at first_mark."""
    epochs = bundle.averaged.index
    if not bundle.averaged.empty:
        if bundle.averaged.shape[1] > 1:
            low, high = (extreme(axis=1, skipna=False) for extreme in (bundle.averaged.min, bundle.averaged.max))
            axes.fill_between(epochs, low, high, color=style.color, alpha=0.13, linewidth=0, zorder=2)
        step = max(1, len(epochs) // (14 if often else 6))
        axes.plot(
            epochs,
            _mean(bundle.averaged),
            color=style.color,
            linestyle=style.linestyle,
            marker=style.marker,
            markevery=(first_mark % step, step),
            markersize=3.5,
            linewidth=1.2,
            zorder=4,
        )
    for recorded in (bundle.single[cell_id].dropna() for cell_id in bundle.single):
        axes.plot(recorded.index, recorded, color=style.color, linestyle=style.linestyle, linewidth=0.5, zorder=4)
        axes.plot(recorded.index[-1:], recorded[-1:], "x", color=style.color, markersize=5, zorder=5)


def _mean(averaged: pd.DataFrame) -> "pd.Series[float]":
    """Mean over all cells; NaN where a cell has no value."""
    return averaged.mean(axis=1, skipna=False)


def _furnish(drawn: Sequence[Axes], quantity: Quantity) -> None:
    """Grid, integer epochs, and one logarithmic axis for all panels, linear near 0 because a share can be 0."""
    for axes in drawn:
        axes.grid(visible=True, color="#e5e5e5", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if not quantity.is_log:
        return
    all_points = np.concatenate([_drawn_points(axes) for axes in drawn])
    lines = np.concatenate([_drawn_points(axes, with_bands=False) for axes in drawn])[:, 1]
    positive = lines[lines > 0]
    if not len(positive):
        return
    for axes in drawn:
        if (all_points[:, 1] == 0).any():
            least = 10.0 ** np.floor(np.log10(positive.min()))
            axes.set_yscale("symlog", linthresh=least, linscale=0.7)
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def _drawn_points(axes: Axes, *, with_bands: bool = True) -> npt.NDArray[np.float64]:
    """Epoch and height of every finite point of a line, and of a band's outline if `with_bands`: [points, 2]."""
    bands = chain.from_iterable(collection.get_paths() for collection in axes.collections)
    paths = [*(line.get_path() for line in axes.lines), *(bands if with_bands else ())]
    points: npt.NDArray[np.float64] = np.concatenate([np.asarray(path.vertices, dtype=np.float64) for path in paths])
    return points[np.isfinite(points[:, 1])]


def _enlarge_the_end(axes: Axes) -> None:
    """Shows the last third of the epochs, at most 20 points below the best: one collapsed run would flatten all."""
    points = _drawn_points(axes)
    if not len(points):
        return
    last = float(points[:, 0].max())
    first = float(np.floor(2 * last / 3))
    heights = points[points[:, 0] >= first, 1]
    high = float(heights.max())
    low = max(float(heights.min()), high - 20)
    margin = 0.06 * (high - low) or 1.0
    axes.set_xlim(first, last + 0.02 * (last - first))
    axes.set_ylim(low - margin, high + margin)


def _explained(quantity: Quantity, bundles: Iterable[Bundle]) -> str:
    """Explains line, band and thin lines, with the numbers of seeds."""
    found = list(bundles)
    counts = sorted({bundle.averaged.shape[1] for bundle in found} - {0})
    said = f"{quantity.explanation}."
    if counts:
        n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        said += f" Line: mean over the finished seeds (n={n}); band: from the lowest to the highest seed."
    if any(not bundle.single.empty for bundle in found):
        said += " Thin, ending in a cross: a run that is not finished or may not be averaged."
    return said
