"""Table -> markdown, LaTeX, HTML for readers (percent), CSV and JSON for programs (fractions). Renders only.

For readers, a row is a method. Columns: accuracy on each model; then the comparison over all models of the heading
(difference with interval, adjusted p, verdict); how the method was tuned, if any was; for each model the published
number and verdict, if a publication is given; with details the soft-hard gap and the size. With details, a second table
has the comparisons model by model. Findings are above the table, explanations below it. A CSV has rows only, because
CSV has no comments.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from html import escape

import pandas as pd

from analysis.compare.comparison import Comparison, Verdict
from analysis.compare.published import Reproduction
from analysis.compare.table import Block, Entry, Table
from analysis.render.words import (
    NONE,
    difference_cell,
    in_points,
    notes,
    p_cell,
    published_cell,
    tuned_cell,
    verdict_cell,
)
from analysis.runs.frame import Budget
from analysis.stats.stratified import Interval

ACCURACY = "{model}: accuracy, % (n)"
DIFFERENCE, P_VALUE, VERDICT = "{label} − row, points (pairs)", "adjusted p", "verdict"
PUBLISHED, REPRODUCTION = "{model}: published, %", "{model}: ours − published, points (n)"
TUNED = "tuned (trials)"
GAP, SIZE = "{model}: soft − hard, points", "{model}: size, kB"
LATEX = str.maketrans(
    {
        **{character: "\\" + character for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "−": "$-$",
        "—": "---",
        "≤": r"$\leq$",
        "∞": r"$\infty$",
    }
)
"""Characters special to LaTeX, and the symbols that this package writes."""
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{"
"""Shrinks a wide table to the line width and keeps a narrow one unchanged."""
Column = Callable[[str], str]
"""Maps a row's quantizer to the text of its cell."""


@dataclass(frozen=True)
class _Markup:
    """How a format escapes text and highlights the best mean."""

    escape: Callable[[str], str]
    best: str


def render(table: Table, layout: str, *, details: bool = False) -> str:
    """The table in the named format; html, csv and json always include the details."""
    if layout in {"markdown", "latex"}:
        return {"markdown": to_markdown, "latex": to_latex}[layout](table, details=details)
    return {"html": to_html, "csv": to_csv, "json": to_json}[layout](table)


def to_markdown(table: Table, *, details: bool = False) -> str:
    """Pipe tables, one heading per block; `details` adds gap, size and a table of the comparisons by model."""
    parts = [_markdown_list("Findings", table.findings)] if table.findings else []
    markup = _Markup(lambda text: text.replace("|", r"\|"), "**{}**")
    for block in table.blocks:
        parts.append(f"## {block.title}\n\n{_pipes(_body(table, block, markup, details=details))}")
        if details and block.by_model:
            parts.append(f"### {block.title}: model by model\n\n{_pipes(_by_model(table, block, markup))}")
    return "\n\n".join([*parts, _markdown_list("Notes", notes(table, details=details))]) + "\n"


def to_latex(table: Table, *, details: bool = False) -> str:
    r"""One `table` environment per block, for \usepackage{booktabs,graphicx}; all text is escaped."""
    footnotes = "\n".join(rf"{{\footnotesize {_latex(note)}\par}}" for note in notes(table, details=details))
    warnings = "\n".join(rf"{{\footnotesize\textbf{{Finding:}} {_latex(finding)}\par}}" for finding in table.findings)
    markup = _Markup(_latex, r"\textbf{{{}}}")
    environments = []
    for block in table.blocks:
        bodies = [_body(table, block, markup, details=details)]
        if details and block.by_model:
            bodies.append(_by_model(table, block, markup))
        tabulars = [
            FIT + body.style.to_latex(hrules=True, column_format="l" * (1 + body.shape[1])).rstrip() + "}\n"
            for body in bodies
        ]
        # The empty line ends TeX's paragraph, so that the notes go below the table, not beside it.
        parts = [rf"\caption{{{_latex(block.title)}}}", warnings, *tabulars, footnotes]
        content = "\n".join(part for part in parts if part)
        environments.append(f"\\begin{{table}}\n\\centering\n{content}\n\\end{{table}}")
    return "\n\n".join(environments) + "\n"


def to_html(table: Table) -> str:
    """A self-contained page with details; all text is escaped."""
    findings = [_html_list("Findings", table.findings)] if table.findings else []
    blocks = [text for block in table.blocks for text in html_tables(table, block, 'border="1"')]
    body = "\n".join([*findings, *blocks, _html_list("Notes", notes(table, details=True))])
    head = '<meta charset="utf-8"><title>proxbench: hard test accuracy</title>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def html_tables(table: Table, block: Block, attributes: str = "") -> Iterator[str]:
    """The block as <table>s to embed in another page: the comparisons, then one table per model with details.

    All models side by side fit neither on paper nor on a phone. All text is escaped.
    """
    markup = _Markup(escape, "<strong>{}</strong>")
    answers = _frame(block.quantizers, _answer_columns(table, block, markup), escape)
    yield _html(answers, f"{block.title}: all models together", attributes)
    for model in block.models:
        alone = replace(block, models=(model,))
        columns = {
            **_accuracy_columns(alone, markup),
            **_by_model_columns(table, alone, markup),
            **_more_columns(table, alone, markup, details=True),
        }
        body = _frame(
            block.quantizers, {name.removeprefix(f"{model}: "): text for name, text in columns.items()}, escape
        )
        yield _html(body, f"{block.title}: {model}", attributes)


def _html(body: pd.DataFrame, caption: str, attributes: str) -> str:
    style = body.style.set_caption(escape(caption))
    # Random ids would make two renderings of one table differ.
    text = style.to_html(table_uuid="comparison", cell_ids=False, table_attributes=attributes)
    for kind, scope in (("row_heading", "row"), ("col_heading", "col")):
        text = text.replace(f'class="{kind}', f'scope="{scope}" class="{kind}')
    # Otherwise Styler's id and empty style sheet would repeat for every table of a page.
    return re.sub(r' id="T_comparison\w*"|<style.*?</style>\s*', "", text, flags=re.DOTALL)


def to_csv(table: Table) -> str:
    """One line per quantizer and model and nothing else, so that any CSV reader can parse it. Fractions and bytes."""
    return pd.DataFrame(records(table)).to_csv(index=False, lineterminator="\n")


def to_json(table: Table) -> str:
    """{"findings", "entries", "comparisons", "ranks"}, with entries as in the CSV; undefined values are null.

    An infinite end of an interval is null, too: JSON has no infinity.
    """
    document = {
        "findings": table.findings,
        "entries": records(table),
        "comparisons": [comparison_record(answer) for answer in table.comparisons],
        "ranks": [asdict(one) for one in table.ranks],
    }
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def records(table: Table) -> list[dict[str, object]]:
    """One flat dictionary per quantizer and model; accuracies are fractions, sizes bytes.

    Prefixes: `primary_` for the comparison over all models of the heading, `model_` for the comparison on this model,
    `published_` for the published number.
    """
    rows: list[dict[str, object]] = []
    for block in table.blocks:
        alone = {(name, one.strata[0].model): one for one in block.by_model for name in (one.baseline, *one.identical)}
        for entry in block.entries:
            flat = {**asdict(entry), **(_tuned_record(entry.tuned) if table.is_tuned else {})}
            del flat["published"], flat["tuned"]
            flat["missing"] = "; ".join(f"{count} {reason}" for reason, count in entry.missing)
            rows.append(
                {
                    "grid": block.grid,
                    "dataset": block.dataset,
                    "task": block.task,
                    "init": block.init,
                    **flat,
                    **_flat("primary_", block.answer(entry.quantizer)),
                    **_flat("model_", alone.get((entry.quantizer, entry.model))),
                    **(_published_record(entry.published) if table.publication else {}),
                }
            )
    return rows


def comparison_record(answer: Comparison) -> dict[str, object]:
    """One Comparison with its pairs, as a JSON record."""
    equivalence = answer.equivalence
    return {
        "scope": answer.scope.value,
        "title": answer.title,
        "question": answer.question,
        "candidate": answer.candidate,
        "baseline": answer.baseline,
        "identical": list(answer.identical),
        **_flat("", answer),
        "images": _ends(answer.images),
        "equivalence": equivalence
        and {"margin": equivalence.margin, "adjusted_p": equivalence.adjusted_p, **_ends(equivalence.interval)},
        "caveats": list(answer.caveats),
        "pairs": {
            stratum.model: {str(seed): value for seed, value in stratum.pairs.items()} for stratum in answer.strata
        },
    }


def _flat(prefix: str, answer: Comparison | None) -> dict[str, object]:
    names = ("estimate", "p", "adjusted_p", "smallest_p", "family_size", "num_needed")
    return {
        f"{prefix}n": answer and answer.n,
        **{prefix + name: answer and getattr(answer, name) for name in names},
        **{prefix + name: value for name, value in _ends(answer.interval if answer else None).items()},
        f"{prefix}verdict": answer and answer.verdict.value,
    }


def _tuned_record(budget: Budget | None) -> dict[str, object]:
    """The budget's fields, prefixed `tuned_`; `tuned_trials` is 0 if the method was not tuned."""
    own = budget or Budget(0, 0, None)
    return {f"tuned_{name}": value for name, value in own._asdict().items()}


def _ends(interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return {"low": None, "high": None, "confidence": None}
    low, high = (end if math.isfinite(end) else None for end in (interval.low, interval.high))
    return {"low": low, "high": high, "confidence": interval.confidence}


def _published_record(published: Reproduction | None) -> dict[str, object]:
    test = published and published.test
    return {
        "published_accuracy": published and published.accuracy,
        "published_row": published and published.row,
        "published_verified": published and published.verified,
        "published_margin": published and published.margin,
        "published_verdict": published and published.verdict.value,
        "published_differences": "; ".join(published.differences) if published else None,
        **{
            f"published_{name}": test and getattr(test, name)
            for name in ("n", "difference", "low", "high", "p_equivalent", "p_different")
        },
    }


def _body(table: Table, block: Block, markup: _Markup, *, details: bool) -> pd.DataFrame:
    """The block as escaped text: rows are quantizers."""
    columns = {
        **_accuracy_columns(block, markup),
        **_answer_columns(table, block, markup),
        **_more_columns(table, block, markup, details=details),
    }
    return _frame(block.quantizers, columns, markup.escape)


def _by_model(table: Table, block: Block, markup: _Markup) -> pd.DataFrame:
    """The comparisons model by model, as escaped text."""
    baselines = {name for answer in block.by_model for name in (answer.baseline, *answer.identical)}
    rows = [name for name in block.quantizers if name in baselines]
    return _frame(rows, _by_model_columns(table, block, markup), markup.escape)


def _accuracy_columns(block: Block, markup: _Markup) -> dict[str, Column]:
    return {ACCURACY.format(model=model): _of_entry(block, model, partial(_accuracy, markup)) for model in block.models}


def _answer_columns(table: Table, block: Block, markup: _Markup) -> dict[str, Column]:
    return {
        DIFFERENCE.format(label=table.label): lambda name: markup.escape(difference_cell(block.answer(name))),
        P_VALUE: lambda name: markup.escape(p_cell(block.answer(name))),
        VERDICT: lambda name: markup.escape(verdict_cell(block.answer(name), name)),
        **({TUNED: lambda name: markup.escape(tuned_cell(block, name))} if table.is_tuned else {}),
    }


def _by_model_columns(table: Table, block: Block, markup: _Markup) -> dict[str, Column]:
    answers = {(name, one.strata[0].model): one for one in block.by_model for name in (one.baseline, *one.identical)}

    def of_answer(model: str, text: Callable[[Comparison | None], str]) -> Column:
        return lambda name: markup.escape(text(answers.get((name, model))))

    columns: dict[str, Column] = {}
    for model in block.models:
        columns[f"{model}: {DIFFERENCE.format(label=table.label)}"] = of_answer(model, difference_cell)
        columns[f"{model}: {VERDICT}"] = of_answer(model, _verdict_and_p)
    return columns


def _more_columns(table: Table, block: Block, markup: _Markup, *, details: bool) -> dict[str, Column]:
    """Columns of published numbers and, with details, of soft-hard gap and size."""
    columns: dict[str, Column] = {}
    for model in block.models:
        texts: dict[str, Callable[[Entry], str]] = {}
        if table.publication and any(entry.published for entry in block.entries if entry.model == model):
            texts |= {PUBLISHED: lambda entry: _published(entry.published)}
            texts |= {REPRODUCTION: lambda entry: published_cell(entry.published)}
        if details:
            texts |= {GAP: _gap, SIZE: _size}
        for name, text in texts.items():
            columns[name.format(model=model)] = _of_entry(block, model, partial(_escaped, markup, text))
    return columns


def _of_entry(block: Block, model: str, text: Callable[[Entry], str]) -> Column:
    entries = {entry.quantizer: entry for entry in block.entries if entry.model == model}
    return lambda name: text(entries[name])


def _escaped(markup: _Markup, text: Callable[[Entry], str], entry: Entry) -> str:
    return markup.escape(text(entry))


def _verdict_and_p(answer: Comparison | None) -> str:
    shown = p_cell(answer)
    tested = answer is not None and answer.verdict is not Verdict.estimate and shown != NONE
    return verdict_cell(answer) + (f", p {shown}" if tested else "")


def _frame(
    rows: "tuple[str, ...] | list[str]", columns: Mapping[str, Column], plain: Callable[[str], str]
) -> pd.DataFrame:
    content = [[text(name) for text in columns.values()] for name in rows]
    return pd.DataFrame(
        content, index=pd.Index([plain(name) for name in rows]), columns=[plain(name) for name in columns]
    )


def _accuracy(markup: _Markup, entry: Entry) -> str:
    """`97.10 ± 0.30 (3)`; seeds missing: `97.10 ± 0.30 (2 of 3; 1 failed: oom)`; none: `missing (3 queued)`."""
    missing = ", ".join(f"{count} {reason}" for reason, count in entry.missing)
    if entry.conflict:
        return markup.escape(f"{entry.conflict}, no mean")
    if entry.top1_hard_mean is None:
        return markup.escape(f"missing ({missing})" if missing else NONE)
    mean = markup.escape(f"{100 * entry.top1_hard_mean:.2f}")
    if entry.is_best:
        mean = markup.best.format(mean)
    spread = "" if entry.top1_hard_sd is None else f" ± {100 * entry.top1_hard_sd:.2f}"
    n = f"{entry.num_done} of {entry.num_seeds}; {missing}" if missing else f"{entry.num_done}"
    return mean + markup.escape(f"{spread} ({n})")


def _published(published: Reproduction | None) -> str:
    if published is None:
        return NONE
    return f"{100 * published.accuracy:.2f}" + " (unverified)" * (not published.verified)


def _gap(entry: Entry) -> str:
    return NONE if entry.gap_mean is None else in_points(entry.gap_mean)


def _size(entry: Entry) -> str:
    return NONE if entry.num_bytes is None else f"{entry.num_bytes / 1000:.1f}"


def _pipes(body: pd.DataFrame) -> str:
    header = ["quantizer", *body.columns]
    lines = [header, ["---"] * len(header), *body.reset_index().to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown_list(title: str, items: tuple[str, ...]) -> str:
    return f"**{title}**\n\n" + "\n".join(f"- {item}" for item in items)


def _html_list(title: str, items: tuple[str, ...]) -> str:
    return f"<p>{title}</p>\n<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"


def _latex(text: str) -> str:
    return text.translate(LATEX)
