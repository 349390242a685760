"""Performance profile: share of runs that close more than x % of the gap from BinaryConnect to full precision."""

from collections.abc import Mapping

import numpy as np

from analysis.compare.family import FULL_PRECISION
from analysis.compare.table import Block
from analysis.render.style import Picture, add_caption, add_legend, name_of, new_figure, styles, warnings
from analysis.stats.profiles import Profile, profile, share_of_gap

REFERENCE = "bc"
"""BinaryConnect, the oldest binary method, defines share 0."""
THRESHOLDS = np.linspace(-1.0, 1.5, 101)


def profiles(block: Block) -> dict[str, Profile]:
    """Binary method -> profile of its runs on all models that have a gap; methods without such models are left out."""
    found: dict[str, Profile] = {}
    for name in block.quantizers:
        if name in {FULL_PRECISION, REFERENCE}:
            continue
        scores = _scores(block, name)
        if scores:
            found[name] = profile(scores, THRESHOLDS, np.random.default_rng(0))
    return found


def _scores(block: Block, name: str) -> Mapping[str, np.ndarray]:
    scores = {}
    for model in block.models:
        groups = [block.groups.get((each, model)) for each in (name, REFERENCE, FULL_PRECISION)]
        if any(group is None or not group.usable for group in groups):
            continue
        share = share_of_gap(*(list(group.usable.values()) for group in groups if group is not None))
        if share is not None:
            scores[model] = share
    return scores


def performance_profiles(block: Block, findings: tuple[str, ...] = ()) -> Picture:
    """One line per method with its pointwise band; the caption gives the interquartile means."""
    name = name_of("profiles", block)
    found = profiles(block)
    if not found:
        return Picture(
            name, None, f"{block.title}: no model has runs of fp, {REFERENCE} and another method, with fp above"
        )
    figure = new_figure(3.0)
    axes = figure.subplots()
    look = styles(found)
    for method, own in found.items():
        style = look[method]
        axes.plot(
            100 * own.thresholds,
            100 * own.shares,
            color=style.color,
            linestyle=style.linestyle,
            marker=style.marker,
            markevery=14,
            markersize=4,
            label=method,
        )
        axes.fill_between(
            100 * own.thresholds, 100 * own.low, 100 * own.high, color=style.color, alpha=0.1, linewidth=0
        )
    axes.set(
        xlabel=f"share of the gap from {REFERENCE} to fp that a run closes, %",
        ylabel="runs above it, %",
        ylim=(-2, 102),
    )
    add_legend(figure, list(found), look)
    means = "; ".join(
        f"{method} {_percent(own.iqm)} % [{_percent(own.interval.low)}, {_percent(own.interval.high)}]"
        for method, own in found.items()
    )
    caption = add_caption(
        figure,
        f"{block.title}: performance profiles over all runs and models; 0 is the mean of {REFERENCE} on the model, "
        "100 % that of full precision. Bands: 95 % bootstrap intervals over runs, pointwise.",
        f"Interquartile means with their intervals: {means}. Described, not tested.",
        warnings(findings),
    )
    return Picture(name, figure, caption)


def _percent(share: float) -> str:
    """`61`, `−26`, `0`."""
    return str(round(100 * share)).replace("-", "−")
