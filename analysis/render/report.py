"""Everything that is known of some runs as one HTML file that needs no other: `python -m analysis report`.

The same runs give the same bytes: nothing here asks what time it is.
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

from analysis.compare.comparison import Block, Table
from analysis.compare.needs import Needs, needs
from analysis.render import figures, methods, sentences
from analysis.render.notes import notes
from analysis.render.style import Picture, house_style
from analysis.render.tables import html_table
from analysis.runs import frame as cells
from analysis.runs import provenance
from analysis.runs.frame import Results
from analysis.runs.provenance import Backgrounds, Source
from suite.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
HEADINGS = {
    "differences": "Is BNN++ better? Differences paired by seed",
    "curves": "Validation accuracy over training",
    "flips": "Share of signs that flip, over training",
    "gap": "Soft minus hard accuracy against mu",
    "size": "Accuracy against size",
    "ranks": "Ranks over models",
}
"""By the first word of a picture's name."""
MAX_SVG_BYTES = 600_000
"""Larger drawings are shown as pixels: a browser takes long for thousands of paths."""
_PIXELS_PER_INCH, _DOTS_PER_INCH = 96, 200


@dataclass(frozen=True)
class Image:
    """A picture as it stands on the page; sizes in CSS pixels."""

    name: str
    uri: str
    alt: str
    caption: str
    width: int
    height: int


def report(
    results: Results,
    table: Table,
    recorded: pd.DataFrame,
    backgrounds: Backgrounds,
    source: Source,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """The page. `table` is the comparison of the results; `recorded` their curves; `say` is told what is being done."""
    frame = results.frame
    say("drawing the figures")
    # The page shows findings once, at its top.
    pictures = figures.pictures(frame, replace(table, findings=()), recorded)
    images: dict[str, list[Image]] = {}
    for picture in pictures:
        if picture.figure is not None:
            say(f"drawing {picture.name}")
            images.setdefault(_heading(picture), []).append(_image(picture, picture.figure))
    say("planning")
    plans = _needs(results)
    say("writing")
    return (
        _environment()
        .get_template("report.html")
        .render(
            title=f"proxbench: {cells.shortened(frame['grid'].unique())}",
            against=table.against,
            design=methods.design(frame),
            doubts=[line for line in table.findings if line not in results.remarks],
            remarks=results.remarks,
            bottom_line=sentences.bottom_line(table),
            across=list(sentences.across_models(table)),
            counts=sentences.counts(table),
            kinds=list(sentences.Finding),
            blocks=[(block.title, sentences.sections(block, table.against)) for block in table.blocks],
            needs=plans,
            published=sentences.published(table),
            publication=table.publication,
            tables=[(block.title, [Markup(text) for text in _tables(table, block)]) for block in table.blocks],  # noqa: S704 - html_table escapes
            notes=notes(table, details=True),
            images=images,
            not_drawn=[picture for picture in pictures if picture.figure is None],
            methods=methods.methods(table, frame),
            not_tested=methods.not_tested(table, frame),
            quantizers=methods.quantizers(frame),
            recipes=methods.recipes(frame, backgrounds),
            settings=methods.settings(frame, backgrounds),
            run_facts=provenance.facts(frame, backgrounds),
            source=source,
            made_with=provenance.made_with(),
            unfinished=provenance.unfinished(frame, backgrounds),
            cells=_cells(frame),
        )
    )


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _needs(results: Results) -> Needs | None:
    try:
        return needs(results)
    except UserError:  # no two pairs that differ: nothing to plan with
        return None


def _tables(table: Table, block: Block) -> list[str]:
    """A table per model: all models side by side fit neither paper nor phone."""
    parts = []
    for model in block.models:
        entries = tuple(entry for entry in block.entries if entry.model == model)
        part = replace(block, title=f"{block.title}: {model}", models=(model,), entries=entries)
        parts.append(html_table(table, part, models=False))
    return parts


def _heading(picture: Picture) -> str:
    kind = picture.name.partition("-")[0]
    return HEADINGS.get(kind, kind)


def _image(picture: Picture, figure: Figure) -> Image:
    """Without the caption that figures have for papers: here it is text."""
    figure.supxlabel("")
    with house_style(), mpl.rc_context({"svg.hashsalt": picture.name, "svg.fonttype": "path"}):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once: with 80 panels that takes many seconds
        kind, content = "svg+xml", _saved(figure, "svg", {"Date": None})
        if len(content) > MAX_SVG_BYTES:
            kind, content = "png", _saved(figure, "png")
    width, height = (round(_PIXELS_PER_INCH * inches) for inches in figure.get_size_inches())
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    # The first sentence: the rest stands below the picture for all to read.
    alt = re.split(r"(?<=[.]) ", picture.caption, maxsplit=1)[0]
    return Image(picture.name, uri, f"{_heading(picture)}. {alt}", picture.caption, width, height)


def _saved(figure: Figure, kind: str, metadata: dict[str, None] | None = None) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata, dpi=_DOTS_PER_INCH)
    return buffer.getvalue()


def _cells(frame: pd.DataFrame) -> list[Mapping[str, object]]:
    """Rows of the list of all cells."""
    rows: Sequence[Mapping[str, object]] = cells.records(frame)
    return [{**row, "name": name} for row, name in zip(rows, cells.names(frame), strict=True)]
