"""Tuning in tables and pictures: trials, choices, and the expected result of smaller budgets."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from analysis.compare.family import FULL_PRECISION
from analysis.compare.table import row_position
from analysis.render.style import (
    BLUE,
    GREY,
    PALE,
    RED,
    SMALL,
    Picture,
    Style,
    add_caption,
    add_legend,
    file_name,
    new_figure,
    panels,
    styles,
)
from analysis.render.words import NONE, lengths
from analysis.runs.frame import natural_key, shortened
from analysis.runs.tuning import Outcome, Tuned, shown
from analysis.stats.tuning import expected_best
from suite.recipe.tune import SHARPNESS, Knob, Scalar

COLUMNS = ("quantizer", "trials × seeds", "chosen", "validation, %", "range of trials, %", "failed", "device-hours")
Heading = tuple[str, str, str, str]
"""Grid, data set, task, init."""
ROW_INCHES, MARGIN_INCHES = 1.15, 1.3


def by_heading(tuned: Sequence[Tuned]) -> dict[Heading, dict[str, list[Tuned]]]:
    """(grid, data set, task, init) -> model -> its methods in table order."""
    found: dict[Heading, dict[str, list[Tuned]]] = {}
    tasks = {(own.grid, own.setting.task) for own in tuned if own.setting.quantizer != FULL_PRECISION}
    for own in sorted(tuned, key=lambda each: (natural_key(each.setting.model), row_position(each.setting.quantizer))):
        setting = own.setting
        # Full precision has task bw, but belongs beside the methods that it is compared with.
        others = sorted(task for grid, task in tasks if grid == own.grid)
        task = others[0] if setting.quantizer == FULL_PRECISION and others else setting.task
        heading = (own.grid, setting.dataset, task, setting.init)
        found.setdefault(heading, {}).setdefault(setting.model, []).append(own)
    return found


def title_of(heading: Heading) -> str:
    """`digits`, followed by the task unless it is bw and the init unless it is scratch."""
    _, dataset, task, init = heading
    return dataset + f", task {task}" * (task != "bw") + f", init {init}" * (init != "scratch")


def to_markdown(tuned: Sequence[Tuned], findings: Sequence[str]) -> str:
    """One table of methods per model, with notes on the columns at the end."""
    parts = ["**Findings**\n\n" + "\n".join(f"- {finding}" for finding in findings)] if findings else []
    for heading, models in by_heading(tuned).items():
        for model, methods in models.items():
            lines = [list(COLUMNS), ["---"] * len(COLUMNS), *map(row, methods)]
            table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
            parts.append(f"## {title_of(heading)}: {model}\n\n{table}\n\n{_spaces(methods)}")
    return "\n\n".join([*parts, "**Notes**\n\n" + "\n".join(f"- {note}" for note in notes(tuned))]) + "\n"


def row(own: Tuned) -> list[str]:
    """A method's row of texts, in the order of COLUMNS."""
    means = [outcome.mean for outcome in own.outcomes if outcome.mean is not None]
    num_failed = sum(bool(outcome.failures) for outcome in own.outcomes)
    num_seeds = max((len(outcome.scores) for outcome in own.outcomes), default=0)
    best = next((each.mean for each in own.outcomes if own.choice and dict(each.values) == own.choice.values), None)
    is_given = own.choice is not None and own.choice.is_given
    return [
        own.setting.quantizer,
        "given" if is_given else f"{len(own.outcomes)} × {num_seeds}",
        chosen(own),
        NONE if best is None else f"{100 * best:.2f}",
        f"{100 * min(means):.2f} to {100 * max(means):.2f}" if means else NONE,
        NONE if is_given else str(num_failed),
        f"{own.device_hours:.2g}" if own.device_hours else NONE,
    ]


def chosen(own: Tuned) -> str:
    """`learning_rate 0.004; mu end 990 (edge: widen it)`; without a choice, the reason why there is none."""
    if own.choice is None:
        num_open = sum(not outcome.has_ended for outcome in own.outcomes)
        is_open = num_open or not own.outcomes
        return f"not yet: {num_open} trials have not ended" if is_open else "none: all trials failed"
    marks = dict.fromkeys(own.edges, " (edge: widen it)")
    texts = [f"{_short(key)} {shown(value)}{marks.get(key, '')}" for key, value in own.choice.values.items()]
    return "; ".join(texts) or "the grid file's values"


def _short(key: str) -> str:
    """`learning_rate`; for a sharpness `mu end`."""
    name = key.rpartition(".")[2]
    return f"mu {name}" if key.startswith(SHARPNESS) else name


def _spaces(methods: Sequence[Tuned]) -> str:
    knobs: dict[str, Knob] = {}
    for own in methods:
        knobs |= own.space
    return "Tried: " + "; ".join(f"`{key}` {knob.written()}" for key, knob in knobs.items()) + "."


def notes(tuned: Sequence[Tuned]) -> list[str]:
    """Explanations of the columns."""
    epochs = lengths(own.epochs for own in tuned)
    budget = (
        "Every method of a model has the same number of trials; knobs that methods share took the same values in the "
        "same trials, and a method's own knobs are part of that budget."
    )
    score = (
        f"A trial's score: accuracy of the hardened network on the validation part after {epochs}, mean over "
        "the seeds. The best is chosen, of equal ones the nearest to the middle of the space; a trial with a failed "
        "run counts as the worst. No trial reads the test set."
    )
    validation = (
        "validation: the chosen trial's score. As the best of several it is too high: what the values are worth is the "
        "test accuracy of the grid's own cells, with other seeds."
    )
    return [
        budget,
        score,
        validation,
        "device-hours: of all trials, each attempt from its start to its end times its processes.",
    ]


def pictures(tuned: Sequence[Tuned]) -> list[Picture]:
    """Scores against knobs, one picture per model; then the expected best of smaller budgets, one panel per model.

    Settings whose values were given, without trials, get no picture.
    """
    drawn = []
    for heading, models in by_heading([own for own in tuned if own.outcomes]).items():
        drawn += [_knobs(heading, model, methods) for model, methods in models.items()]
        drawn.append(_budgets(heading, models))
    return drawn


def _knobs(heading: Heading, model: str, methods: Sequence[Tuned]) -> Picture:
    """One row per method with a small panel for each of its knobs."""
    name = file_name("tuning", *heading, model)
    own = [method for method in methods if any(outcome.mean is not None for outcome in method.outcomes)]
    if not own:
        return Picture(name, None, f"{title_of(heading)}: no trial of {model} has a score")
    num_columns = max(len(method.space) for method in own)
    figure = new_figure(ROW_INCHES * len(own) + MARGIN_INCHES)
    axes = figure.subplots(len(own), num_columns, squeeze=False)
    means = [100 * mean for method in own for outcome in method.outcomes if (mean := outcome.mean) is not None]
    low, high = min(means), max(means)
    margin = 0.08 * (high - low) or 1.0
    for line, method in zip(axes, own, strict=True):
        for panel, (key, knob) in zip(line, method.space.items(), strict=False):
            _draw_knob(panel, method, key, knob, low - margin)
            panel.set_ylim(low - 2 * margin, high + margin)
        line[0].set_ylabel(f"{method.setting.quantizer}\nval, %")
        for unused in line[len(method.space) :]:
            unused.remove()
    caption = add_caption(
        figure,
        f"{title_of(heading)}, {model}: validation accuracy of each trial against each knob; a dot is the mean over "
        "the seeds, the line behind it reaches from seed to seed. Diamond: chosen. Cross at the bottom: failed. "
        "Shaded: the edge of a range, where a choice says that a better value may lie beyond.",
    )
    return Picture(name, figure, caption)


def _draw_knob(axes: Axes, method: Tuned, key: str, knob: Knob, bottom: float) -> None:
    for outcome in method.outcomes:
        x = _place(knob, outcome.values[key])
        scores = [100 * score for score in outcome.scores if isinstance(score, float)]
        if outcome.failures:
            axes.plot([x], [bottom], "x", color=RED, markersize=4)
        elif scores and outcome.mean is not None:
            is_chosen = method.choice is not None and dict(outcome.values) == method.choice.values
            axes.plot([x, x], [min(scores), max(scores)], color=PALE, linewidth=1, zorder=1)
            marker, colour, size = ("D", BLUE, 5) if is_chosen else ("o", GREY, 3)
            axes.plot([x], [100 * outcome.mean], marker, color=colour, markersize=size, zorder=3 if is_chosen else 2)
    if knob.scale == "list":
        axes.set_xticks(range(len(knob.values)), [shown(value) for value in knob.values])
        axes.set_xlim(-0.5, len(knob.values) - 0.5)
    else:
        low, high = (float(end) for end in knob.values)
        if knob.scale == "log":
            axes.set_xscale("log")
            decades = [10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
            axes.set_xticks(decades, [f"{decade:g}" for decade in decades])
            axes.xaxis.set_minor_formatter(NullFormatter())
        for first, second in ((0.0, 0.1), (0.9, 1.0)):
            axes.axvspan(float(knob.at(first)), float(knob.at(second)), color="#f0f0f0", zorder=0, linewidth=0)
        axes.set_xlim(low, high)
    axes.set_xlabel(_short(key), fontsize=SMALL, labelpad=1)


def _place(knob: Knob, value: Scalar) -> float:
    return float(knob.values.index(value)) if knob.scale == "list" else float(value)


def _budgets(heading: Heading, models: Mapping[str, Sequence[Tuned]]) -> Picture:
    name = file_name("budget", *heading)
    curves = {
        model: {method.setting.quantizer: _scores(method.outcomes) for method in methods if method.outcomes}
        for model, methods in models.items()
    }
    curves = {model: {q: s for q, s in own.items() if len(s) > 1} for model, own in curves.items()}
    curves = {model: own for model, own in curves.items() if own}
    if not curves:
        return Picture(name, None, f"{title_of(heading)}: no method has the scores of two trials")
    figure = new_figure(2.6 * math.ceil(len(curves) / 2) + 0.9)
    look = styles({quantizer for own in curves.values() for quantizer in own})
    drawn = panels(figure, list(curves), "trials", "expected best validation accuracy, %", sharey=False)
    for panel, own in zip(drawn, curves.values(), strict=True):
        for quantizer, scores in own.items():
            _draw_budget(panel, scores, look[quantizer])
    order = sorted({quantizer for own in curves.values() for quantizer in own}, key=row_position)
    add_legend(figure, order, look)
    caption = add_caption(
        figure,
        f"{title_of(heading)}: expected best validation accuracy of n trials drawn from these (Dodge et al. 2019); "
        "band: one standard deviation of that best. A line that still rises says that more trials would "
        "help this method; failed trials count as accuracy 0.",
    )
    return Picture(name, figure, caption)


def _scores(outcomes: Sequence[Outcome]) -> list[float]:
    """Scores of the trials that have ended."""
    return [0.0 if outcome.mean is None else outcome.mean for outcome in outcomes if outcome.has_ended]


def _draw_budget(axes: Axes, scores: Sequence[float], style: Style) -> None:
    found = expected_best(scores)
    budgets = np.arange(1, len(scores) + 1)
    axes.plot(
        budgets,
        100 * found.mean,
        color=style.color,
        linestyle=style.linestyle,
        marker=style.marker,
        markersize=3,
        markevery=max(1, len(scores) // 4),
    )
    low, high = 100 * (found.mean - found.sd), 100 * np.minimum(found.mean + found.sd, 1.0)
    axes.fill_between(budgets, low, high, color=style.color, alpha=0.08, linewidth=0)


def summary(tuned: Sequence[Tuned]) -> list[str]:
    """One line per grid: number of trials and hours spent."""
    lines = []
    for grid, own in groupby(sorted(tuned, key=lambda each: each.grid), key=lambda each: each.grid):
        methods = list(own)
        trials = [outcome for method in methods for outcome in method.outcomes]
        hours = sum(method.device_hours for method in methods)
        lines.append(
            f"{grid}: {len(trials)} trials of {len(methods)} methods and models "
            f"({shortened(dict.fromkeys(method.setting.model for method in methods))}), {hours:.2g} device-hours."
        )
    return lines
