"""All that is known about a set of runs, as one self-contained HTML file: `python -m analysis report`.

The same runs give the same bytes: nothing here reads the clock.
"""

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from analysis.compare import plans
from analysis.compare.comparison import Verdict
from analysis.compare.table import Block, Table
from analysis.render import figures, methods, tuning, words
from analysis.render.style import Picture, house_style, name_of
from analysis.render.tables import html_tables
from analysis.runs import frame as cells
from analysis.runs import provenance
from analysis.runs.frame import Results
from analysis.runs.provenance import Backgrounds, Source
from suite.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
HEADINGS = {
    "differences": "Differences paired by seed",
    "profiles": "Share of the gap to full precision",
    "curves": "Validation accuracy over training",
    "flips": "Share of signs that flip, over training",
    "masked": "Share of weights whose gradient is masked, over training",
    "distance": "Distance of latent weights from their signs, over training",
    "gap": "Soft minus hard accuracy against mu",
    "size": "Accuracy against size",
    "ranks": "Ranks over models",
    "tuning": "Trials of tuning",
    "budget": "What a smaller budget would have found",
}
"""Section headings, by the first word of a picture's name."""
_OF_TUNING = (HEADINGS["tuning"], HEADINGS["budget"])
WANTED_POINTS = (0.5, 1.0, 2.0)
"""Differences, in points, for which the report plans seeds."""
MAX_SVG_BYTES = 600_000
"""Larger drawings are embedded as PNG: browsers are slow with thousands of paths."""
_PIXELS_PER_INCH, _DOTS_PER_INCH = 96, 200


@dataclass(frozen=True)
class Image:
    """A picture as embedded in the page; sizes in CSS pixels."""

    name: str
    uri: str
    alt: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Sentence:
    """An answer as shown on the page."""

    verdict: Verdict
    text: str
    caveats: tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """A heading's results: sentences of the primary comparisons, their forest plot, and lists of further sentences."""

    title: str
    sentences: tuple[Sentence, ...]
    forest: tuple[Image, ...]
    further: tuple[tuple[str, tuple[str, ...]], ...]


def report(
    results: Results,
    table: Table,
    recorded: pd.DataFrame,
    backgrounds: Backgrounds,
    source: Source,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Renders the page. `table` and `recorded` (curves) are made from `results`; `say` receives progress messages."""
    frame = results.frame
    say("drawing the figures")
    # The page shows the findings only once, at its top.
    pictures = figures.pictures(replace(table, findings=()), recorded)
    images: dict[str, list[Image]] = {}
    for picture in pictures:
        if picture.figure is not None:
            say(f"drawing {picture.name}")
            images.setdefault(_heading(picture), []).append(_image(picture, picture.figure))
    about_tuning = [(heading, images.pop(heading)) for heading in _OF_TUNING if heading in images]
    forests = {image.name: image for image in images.pop(HEADINGS["differences"], [])}
    say("planning")
    found = _plans(table)
    say("writing")
    return (
        _environment()
        .get_template("report.html")
        .render(
            title=f"proxbench: {cells.shortened(frame['grid'].unique())}",
            label=table.label,
            signs=words.SYMBOLS,
            design=methods.design(frame),
            doubts=[line for line in table.findings if line not in results.remarks],
            remarks=results.remarks,
            answers=[_answers(block, forests) for block in table.blocks],
            meanings=_meanings(table),
            wanted_points=WANTED_POINTS,
            plans=[_plan_row(plan) for plan in found],
            plan_notes=list(plans.notes(found, plans.Wish(0.01, ()))) if found else [],
            published=[
                words.published_sentence(block, entry)
                for block in table.blocks
                for entry in block.entries
                if entry.published
            ],
            publication=table.publication,
            tables=[(block.title, [Markup(text) for text in html_tables(table, block)]) for block in table.blocks],  # noqa: S704 - html_tables escapes
            notes=words.notes(table, details=True),
            images=images,
            about_tuning=about_tuning,
            tuning=[
                (f"{tuning.title_of(heading)}: {model}", [tuning.row(own) for own in methods])
                for heading, models in tuning.by_heading(table.tuning).items()
                for model, methods in models.items()
            ],
            tuning_columns=tuning.COLUMNS,
            tuning_notes=[*tuning.summary(table.tuning), *tuning.notes(table.tuning)] if table.tuning else [],
            not_drawn=[picture for picture in pictures if picture.figure is None],
            methods=methods.methods(table, frame),
            not_tested=methods.not_tested(table, frame),
            quantizers=methods.quantizers(frame),
            recipes=methods.recipes(frame, backgrounds),
            settings=methods.settings(frame, backgrounds),
            run_facts=provenance.facts(results, backgrounds),
            source=source,
            made_with=provenance.made_with(),
            unfinished=provenance.unfinished(frame, backgrounds),
            cells=_cells(frame),
        )
    )


def _answers(block: Block, forests: Mapping[str, Image]) -> Answers:
    order = list(Verdict)
    clear_first = sorted(block.primary, key=lambda answer: order.index(answer.verdict))
    tested = [words.sentence(one) for one in block.by_model if one.verdict is not Verdict.estimate and one.n]
    further = {
        "For new test images, too": [text for one in block.primary if (text := words.images_sentence(one))],
        "Model by model, where the first answer is a difference": tested,
        "On other architectures": [words.sentence(one) for one in block.architectures],
        "Beside full precision": [words.sentence(one) for one in block.reference],
    }
    name = name_of("differences", block)
    return Answers(
        block.title,
        tuple(Sentence(one.verdict, words.sentence(one), one.caveats) for one in clear_first),
        (forests[name],) if name in forests else (),
        tuple((heading, tuple(lines)) for heading, lines in further.items() if lines),
    )


def _meanings(table: Table) -> list[tuple[str, str]]:
    sizes: dict[Verdict, int] = {}
    for answer in table.comparisons:
        sizes[answer.verdict] = max(sizes.get(answer.verdict, 0), answer.family_size)
    return [(verdict.value, words.explanation(verdict, sizes[verdict])) for verdict in Verdict if verdict in sizes]


def _plans(table: Table) -> list[plans.Plan]:
    try:
        return plans.plans(table)
    except UserError:  # no two pairs differ, so there is no spread to plan with
        return []


def _plan_row(plan: plans.Plan) -> list[str]:
    now = plans.found(plan, plan.num_seeds)
    needed = [plans.needed(plan, points / 100) for points in WANTED_POINTS]
    return [plan.title, str(plan.num_models), str(plan.num_seeds), plans.sd(plan), now, *needed]


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _heading(picture: Picture) -> str:
    kind = picture.name.partition("-")[0]
    return HEADINGS.get(kind, kind)


def _image(picture: Picture, figure: Figure) -> Image:
    """The figure as an image without its caption, which the page shows as text."""
    figure.supxlabel("")
    with house_style(), mpl.rc_context({"svg.hashsalt": picture.name, "svg.fonttype": "path"}):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # lay out only once: with 80 panels it takes many seconds
        kind, content = "svg+xml", _saved(figure, "svg", {"Date": None})
        if len(content) > MAX_SVG_BYTES:
            kind, content = "png", _saved(figure, "png")
    width, height = (round(_PIXELS_PER_INCH * inches) for inches in figure.get_size_inches())
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    # Only the first sentence: the page shows the whole caption below the picture.
    alt = re.split(r"(?<=[.]) ", picture.caption, maxsplit=1)[0]
    return Image(picture.name, uri, f"{_heading(picture)}. {alt}", picture.caption, width, height)


def _saved(figure: Figure, kind: str, metadata: dict[str, None] | None = None) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata, dpi=_DOTS_PER_INCH)
    return buffer.getvalue()


def _cells(frame: pd.DataFrame) -> list[Mapping[str, object]]:
    """Rows for the list of all cells."""
    rows: Sequence[Mapping[str, object]] = cells.records(frame)
    return [{**row, "name": name} for row, name in zip(rows, cells.names(frame), strict=True)]
