"""Forest plot: BNN++ minus each other quantizer over all models of a heading, with faint rows per model below."""

import math

from matplotlib.axes import Axes

from analysis.compare.comparison import Comparison, Stratum, Verdict
from analysis.compare.table import Block, Table
from analysis.render.style import BLUE, GREY, SMALL, Picture, add_caption, name_of, new_figure, warnings
from analysis.render.words import baseline_of, p_cell, percent, verdict_cell

ROW_INCHES, MODEL_INCHES, MARGIN_INCHES = 0.42, 0.17, 1.25
MAX_MODELS = 12
"""Up to this many models get a row each; the means of more models share one row."""


def forest(table: Table, block: Block) -> Picture:
    """Paired differences in points: mean over models, interval and verdict, then the mean and pairs of each model."""
    name = name_of("differences", block)
    answers = [answer for answer in (*block.reference, *block.primary) if answer.estimate is not None]
    if not answers:
        return Picture(name, None, f"{block.title}: no seed is measured on both sides of any comparison")
    rows = [len(_strata(answer)) for answer in answers]
    height = ROW_INCHES * len(answers) + MODEL_INCHES * sum(rows)
    figure = new_figure(height + MARGIN_INCHES)
    axes = figure.subplots()
    ticks: list[tuple[float, str]] = []
    y = 0.0
    for answer in answers:
        y = _draw(axes, answer, y, ticks)
    if table.margin is not None:
        axes.axvspan(-100 * table.margin, 100 * table.margin, color="#eeeeee", zorder=0, label="margin")
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
    axes.set_ylim(y - 0.3, -0.6)
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
    for label, (_, text) in zip(axes.get_yticklabels(), ticks, strict=True):
        label.set_color(GREY if text.startswith(" ") else "black")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"{table.label} − quantizer, points of hard test accuracy")
    caption = add_caption(
        figure,
        f"{block.title}: hard test accuracy of {table.label} minus the quantizer's, paired by seed. Right of 0, "
        f"{table.label} is better. Diamond and bar: mean over the models and the interval that the verdict stands on "
        f"({_confidences(answers)}), an arrow where it has no bound; hollow: not tested. Grey: each model's mean, and "
        "its pairs as circles.",
        _about_p(block),
        f"Shaded: the declared margin of {100 * table.margin:g} points." if table.margin is not None else "",
        warnings(table.findings),
    )
    return Picture(name, figure, caption)


def _strata(answer: Comparison) -> list[Stratum]:
    return [stratum for stratum in answer.strata if stratum.pairs] if len(answer.models) <= MAX_MODELS else []


def _draw(axes: Axes, answer: Comparison, y: float, ticks: list[tuple[float, str]]) -> float:
    """Draws one answer from height y downwards; returns the height of the next one."""
    mean = 100 * (answer.estimate or 0.0)
    ticks.append((y, baseline_of(answer).replace(" (identical networks)", "")))
    if answer.interval is None:
        axes.plot([mean], [y], "D", color=BLUE, markerfacecolor="white", markersize=5, zorder=4)
    else:
        low, high = (100 * end for end in (answer.interval.low, answer.interval.high))
        if math.isfinite(low) and math.isfinite(high):
            axes.errorbar(
                [mean],
                [y],
                xerr=[[mean - low], [high - mean]],
                fmt="D",
                color=BLUE,
                markersize=5,
                capsize=2.5,
                zorder=4,
            )
        else:
            axes.plot([mean], [y], "D", color=BLUE, markersize=5, zorder=4)
            for side, end in ((-1, low), (1, high)):
                if not math.isfinite(end):
                    axes.annotate(
                        "",
                        (mean, y),
                        (18 * side, 0),
                        textcoords="offset points",
                        arrowprops={"arrowstyle": "<-", "color": BLUE},
                    )
    shown = p_cell(answer)
    p = f", p={shown}" if shown != "—" and answer.verdict is not Verdict.equivalent else ""
    words = f"n={answer.n}{p}: {verdict_cell(answer)}"
    axes.text(1.02, y, words, transform=axes.get_yaxis_transform(), va="center", fontsize=SMALL)
    step = MODEL_INCHES / ROW_INCHES
    strata = _strata(answer)
    for row, stratum in enumerate(strata):
        place = y + 0.55 + row * step
        ticks.append((place, f" {stratum.model}"))
        values = [100 * value for value in stratum.pairs.values()]
        axes.plot(values, [place] * len(values), "o", color=GREY, markerfacecolor="none", markersize=3, alpha=0.7)
        axes.plot([sum(values) / len(values)], [place], "|", color=GREY, markersize=7)
    if not strata:
        means = [100 * stratum.mean for stratum in answer.strata if stratum.mean is not None]
        axes.plot(means, [y + 0.3] * len(means), "|", color=GREY, markersize=5, alpha=0.6)
    return y + 1.0 + step * len(strata)


def _confidences(answers: list[Comparison]) -> str:
    found = sorted({answer.interval.confidence for answer in answers if answer.interval})
    return " to ".join(dict.fromkeys(map(percent, (found[0], found[-1])))) if found else "none"


def _about_p(block: Block) -> str:
    if not block.primary:
        return ""
    return (
        "p: exact sign-flip test stratified by model, two-sided, adjusted by Holm's method for all "
        f"{block.family_size} comparisons of the grid."
    )
