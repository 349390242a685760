"""Turns the JSON of `gpu.py` into a page, and into a picture if matplotlib is installed."""

import statistics
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from gpu_science import METHODS
from gpu_speed import Measured

TITLE = "# What a GPU shows"
PICTURE = "gpu-curves.png"


def markdown(found: dict[str, Any], *, has_picture: bool) -> str:
    """The Markdown page; `found` has any of the sections checks, speed and science."""
    lines = [
        TITLE,
        "",
        "Written by `make gpu` (`python -m launch doctor --gpu`); do not edit. gpu.json has every number.",
        "",
    ]
    if any(part["machine"]["device"] == "rehearsal" for part in found.values()):
        lines += ["**A rehearsal on a CPU: it shows that the program runs. Its numbers mean nothing.**", ""]
    for name, write in (("checks", _checks), ("speed", _speed), ("science", _science)):
        if name not in found:
            continue
        part = found[name]
        lines += [*write(part), "", _machine(part["machine"]), ""]
        if name == "science" and has_picture:
            lines += [f"![Validation accuracy by epoch, mean over seeds]({PICTURE})", ""]
    return "\n".join(lines)


def _machine(machine: dict[str, Any]) -> str:
    return "*" + "; ".join(f"{key} {value}" for key, value in machine.items()) + "*"


def _checks(part: dict[str, Any]) -> Iterator[str]:
    outcomes: dict[str, str] = part["outcomes"]
    counts = {
        kind: sum(each.startswith(kind) for each in outcomes.values()) for kind in ("passed", "failed", "skipped")
    }
    said = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    yield from ("## Checks", "", f"`{part['command']}`: {said or 'none ran'}, {part['seconds']:.0f} s.", "")
    yield from ("| test | outcome |", "| --- | --- |")
    for test, members in groupby(outcomes, key=lambda name: name.partition("[")[0]):
        each_said = [outcomes[name] for name in members]
        counted = "; ".join(f"{each_said.count(each)} {each}" for each in dict.fromkeys(each_said))
        yield f"| {test.replace('_', ' ')} | {counted} |"


def _speed(part: dict[str, Any]) -> Iterator[str]:
    yield from ("## Speed", "", "Times are medians over turns, ratios of turns side by side; a bar is what was wanted.")
    rows = [Measured(**each) for each in part["measured"]]
    for title in dict.fromkeys(each.part for each in rows):
        members = [each for each in rows if each.part == title]
        quantities = [name for name in dict.fromkeys(each.quantity for each in members) if name]
        yield from ("", f"### {title}", "", _row("", quantities), _row("---", ["---"] * len(quantities)))
        for what in dict.fromkeys(each.what for each in members):
            cells = {each.quantity: _cell(each) for each in members if each.what == what}
            yield _row(what, [cells.get(name, "") for name in quantities]) + cells.get("", "")


def _row(first: str, others: list[str]) -> str:
    return f"| {' | '.join([first, *others])} |"


def _cell(each: Measured) -> str:
    if each.value is None:
        return f" not measured: {each.problem}"
    value = f"{each.value:,.0f}" if each.value >= 100 or each.value == int(each.value) else f"{each.value:.3g}"  # noqa: PLR2004
    if each.bar is None:
        return value
    return f"{value} (at {'least' if each.at_least else 'most'} {each.bar:g}: {'met' if each.is_met else '**missed**'})"


def _science(part: dict[str, Any]) -> Iterator[str]:
    cells = part["cells"]
    yield from (f"## CIFAR-10, {part['model']}", "")
    yield (
        f"The recipe of the grid cifar10, untuned and cut to {part['epochs']} epochs, {part['num_seeds']} seeds, "
        f"{part['at_once']} cells at a time: {len(cells)} of {len(METHODS) * part['num_seeds']} cells done in "
        f"{part['seconds'] / 60:.1f} minutes. How methods start, and no comparison of them: none was tuned, and 3 to 8 "
        "seeds of one network cannot tell them apart."
    )
    yield from (
        "",
        "| quantizer | seeds | hard test accuracy, %, mean (least to most) | soft, % |",
        "| --- | --- | --- | --- |",
    )
    for method, rows in by_method(cells).items():
        hard, soft = ([100 * row["result"][f"top1_{kind}"] for row in rows] for kind in ("hard", "soft"))
        described = f"{statistics.mean(hard):.2f} ({min(hard):.2f} to {max(hard):.2f})"
        yield f"| {method} | {len(rows)} | {described} | {statistics.mean(soft):.2f} |"


def by_method(cells: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Quantizer -> its cells, in METHODS' order; quantizers without cells are left out."""
    found = {method: [cell for cell in cells if cell["quantizer"] == method] for method in METHODS}
    return {method: rows for method, rows in found.items() if rows}


def draw(science: dict[str, Any], path: Path) -> bool:
    """Draws validation accuracy by epoch into a PNG file; returns False if matplotlib is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        return False
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for method, rows in by_method(science["cells"]).items():
        curves = list(zip(*(row["val/top1"] for row in rows), strict=False))
        axes.plot(range(1, len(curves) + 1), [100 * statistics.mean(each) for each in curves], label=method)
    axes.set(xlabel="epoch", ylabel="validation accuracy with binary weights, %")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
