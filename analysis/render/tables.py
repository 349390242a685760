"""Table -> markdown, LaTeX, HTML for people (percent), CSV and JSON for programs (fractions). Rendering only.

In the three for people a column holds, per model: accuracy with spread and n, reference minus row with its interval, p;
with a publication its number and the verdict; with details the soft-hard gap and the size. Findings stand above the
table, what the numbers mean below it.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from html import escape

import pandas as pd

from analysis.compare.comparison import Block, Entry, Table
from analysis.compare.published import Reproduction
from analysis.compare.verdicts import Place
from analysis.render.notes import TIED, notes
from analysis.stats.paired import Difference, is_underpowered

ACCURACY, DIFFERENCE, P_VALUE = "hard test accuracy, % (n)", "{against} − row, points (n)", "adjusted p"
PUBLISHED, VERDICT = "published, %", "ours − published, points (n)"
GAP, SIZE = "soft − hard, points", "size, kB"
NONE = "—"
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
        TIED: r"\textsuperscript{\textdagger}",
    }
)
"""What LaTeX would misread, and the symbols that this package writes."""
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{"
"""A wide table shrinks to the line, a narrow one stays as it is."""


@dataclass(frozen=True)
class _Markup:
    """How a format escapes text and sets off the best and the second."""

    escape: Callable[[str], str]
    best: str
    second: str


def render(table: Table, layout: str, *, details: bool = False) -> str:
    """The table in the format of that name; html, csv and json have the details always."""
    if layout in {"markdown", "latex"}:
        return {"markdown": to_markdown, "latex": to_latex}[layout](table, details=details)
    return {"html": to_html, "csv": to_csv, "json": to_json}[layout](table)


def to_markdown(table: Table, *, details: bool = False) -> str:
    """Pipe tables, a heading per block; details adds the columns of gap and size."""
    parts = [_markdown_list("Findings", table.findings)] if table.findings else []
    parts += [f"## {block.title}\n\n{_markdown_body(table, block, details=details)}" for block in table.blocks]
    return "\n\n".join([*parts, _markdown_list("Notes", notes(table, details=details))]) + "\n"


def to_latex(table: Table, *, details: bool = False) -> str:
    r"""One `table` environment per block, for \usepackage{booktabs,graphicx}; all text is escaped."""
    footnotes = "\n".join(rf"{{\footnotesize {_latex(note)}\par}}" for note in notes(table, details=details))
    warnings = "\n".join(rf"{{\footnotesize\textbf{{Finding:}} {_latex(finding)}\par}}" for finding in table.findings)
    markup = _Markup(_latex, r"\textbf{{{}}}", r"\underline{{{}}}")
    environments = []
    for block in table.blocks:
        body = _body(table, block, markup, details=details)
        tabular = body.style.to_latex(hrules=True, column_format="l" * (1 + body.shape[1]), multicol_align="c")
        # The empty line ends TeX's: the notes stand under the table, not beside it.
        parts = [rf"\caption{{{_latex(block.title)}}}", warnings, FIT + tabular.rstrip() + "}\n", footnotes]
        content = "\n".join(part for part in parts if part)
        environments.append(f"\\begin{{table}}\n\\centering\n{content}\n\\end{{table}}")
    return "\n\n".join(environments) + "\n"


def to_html(table: Table) -> str:
    """A page of its own that needs no other file, details included; all text is escaped."""
    findings = [_html_list("Findings", table.findings)] if table.findings else []
    blocks = [html_table(table, block, 'border="1"') for block in table.blocks]
    body = "\n".join([*findings, *blocks, _html_list("Notes", notes(table, details=True))])
    head = '<meta charset="utf-8"><title>proxbench: hard test accuracy</title>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def html_table(table: Table, block: Block, attributes: str = "", *, models: bool = True) -> str:
    """The block as a <table> with details, for a page of others' making; all text is escaped.

    models: a line above the columns with each one's model, which a block of one model may do without.
    """
    body = _body(table, block, _Markup(escape, "<strong>{}</strong>", "<u>{}</u>"), details=True)
    if not models:
        body.columns = pd.Index(body.columns.get_level_values(1))
    groups = "colgroup" if models else "col"
    style = body.style.set_caption(escape(block.title))
    # Without ids, two renderings of one table are the same text.
    text = style.to_html(table_uuid="comparison", cell_ids=False, table_attributes=attributes)
    for kind, scope in (("row_heading", "row"), ("col_heading level0", groups), ("col_heading level1", "col")):
        text = text.replace(f'class="{kind}', f'scope="{scope}" class="{kind}')
    # Styler's numbering and its empty style sheet would stand on a page as often as it has tables.
    return re.sub(r' id="T_comparison\w*"|<style.*?</style>\s*', "", text, flags=re.DOTALL)


def to_csv(table: Table) -> str:
    """One line per entry, findings above it as `# finding: ...`: `pandas.read_csv(file, comment="#")`."""
    comments = "".join(f"# finding: {finding}\n" for finding in table.findings)
    return comments + pd.DataFrame(records(table)).to_csv(index=False, lineterminator="\n")


def to_json(table: Table) -> str:
    """{"findings": [...], "entries": [...], "ranks": [...]}, entries as the CSV's lines; what is undefined is null."""
    document = {"findings": table.findings, "entries": records(table), "ranks": [asdict(one) for one in table.ranks]}
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def records(table: Table) -> list[dict[str, object]]:
    """Each entry as one flat dictionary; accuracies are fractions, sizes bytes.

    The fields of its difference are prefixed `difference_`, those of its published number `published_`.
    """
    rows: list[dict[str, object]] = []
    for block in table.blocks:
        for entry in block.entries:
            flat = asdict(entry)
            for nested in ("difference", "adjusted", "standing", "published"):
                del flat[nested]
            flat["missing"] = "; ".join(f"{count} {reason}" for reason, count in entry.missing)
            rows.append(
                {
                    "grid": block.grid,
                    "dataset": block.dataset,
                    "task": block.task,
                    "init": block.init,
                    **flat,
                    "place": entry.standing and entry.standing.place.value,
                    "tied": entry.standing and entry.standing.tied,
                    "adjusted_p": entry.adjusted and entry.adjusted.p,
                    "family_size": block.family_size,
                    "underpowered": entry.adjusted and entry.adjusted.underpowered,
                    **_prefixed("difference_", entry.difference),
                    **(_published_record(entry.published) if table.publication else {}),
                }
            )
    return rows


def _prefixed(prefix: str, difference: Difference | None) -> dict[str, object]:
    values = asdict(difference) if difference else dict.fromkeys(Difference.__dataclass_fields__)
    return {prefix + name: value for name, value in values.items()}


def _published_record(published: Reproduction | None) -> dict[str, object]:
    test = published and published.test
    verdict = published and (test.verdict.value if test else "untestable")
    return {
        "published_accuracy": published and published.accuracy,
        "published_row": published and published.row,
        "published_verified": published and published.verified,
        "published_margin": published and published.margin,
        "published_verdict": verdict,
        **{
            f"published_{name}": test and getattr(test, name)
            for name in ("n", "difference", "low", "high", "p_equivalent", "p_different")
        },
    }


def _body(table: Table, block: Block, markup: _Markup, *, details: bool) -> pd.DataFrame:
    """The block as escaped text: quantizers by (model, column)."""
    columns: dict[str, Callable[[Entry], str]] = {
        ACCURACY: lambda entry: _accuracy(entry, markup),
        DIFFERENCE.format(against=table.against): lambda entry: markup.escape(_difference(entry)),
        P_VALUE: lambda entry: markup.escape(_p(entry, block.family_size)),
    }
    if table.publication and any(entry.published for entry in block.entries):
        columns[PUBLISHED] = lambda entry: markup.escape(_published(entry.published))
        columns[VERDICT] = lambda entry: markup.escape(_verdict(entry.published))
    if details:
        columns[GAP] = lambda entry: NONE if entry.gap_mean is None else markup.escape(in_points(entry.gap_mean))
        columns[SIZE] = lambda entry: NONE if entry.num_bytes is None else f"{entry.num_bytes / 1000:.1f}"
    entries = {(entry.quantizer, entry.model): entry for entry in block.entries}
    rows = [
        [text(entries[quantizer, model]) for model in block.models for text in columns.values()]
        for quantizer in block.quantizers
    ]
    header = pd.MultiIndex.from_product([map(markup.escape, block.models), map(markup.escape, columns)])
    return pd.DataFrame(rows, index=pd.Index([markup.escape(name) for name in block.quantizers]), columns=header)


def _accuracy(entry: Entry, markup: _Markup) -> str:
    """`97.10 ± 0.30 (3)`; some missing: `97.10 ± 0.30 (2 of 3; 1 failed: oom)`; all: `missing (3 queued)`."""
    missing = ", ".join(f"{count} {reason}" for reason, count in entry.missing)
    if entry.conflict:
        return markup.escape(f"{entry.conflict}, no mean")
    if entry.top1_hard_mean is None:
        return markup.escape(f"missing ({missing})" if missing else NONE)
    mean = markup.escape(f"{100 * entry.top1_hard_mean:.2f}")
    if entry.standing:
        mean = (markup.best if entry.standing.place is Place.best else markup.second).format(mean)
        mean += markup.escape(TIED) * entry.standing.tied
    spread = "" if entry.top1_hard_sd is None else f" ± {100 * entry.top1_hard_sd:.2f}"
    n = f"{entry.num_done} of {entry.num_seeds}; {missing}" if missing else f"{entry.num_done}"
    return mean + markup.escape(f"{spread} ({n})")


def _difference(entry: Entry) -> str:
    """`+0.53 [−0.20, +1.27] (3)`, or `+0.53, no interval (1)`."""
    difference = entry.difference
    if difference is None:
        return NONE
    return f"{_with_interval(difference.mean, difference.low, difference.high)} ({difference.n})"


def _with_interval(mean: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{in_points(mean)}, no interval"
    return f"{in_points(mean)} [{in_points(low)}, {in_points(high)}]"


def _p(entry: Entry, family_size: int) -> str:
    """`0.031`; `underpowered (n=3)`; where only the family is too large for so many pairs, it says so."""
    if entry.difference is None or entry.adjusted is None:
        return NONE
    n = entry.difference.n
    if entry.adjusted.p is None:
        return f"underpowered (n={n})" if is_underpowered(n) else f"underpowered (n={n}, family of {family_size})"
    return f"{entry.adjusted.p:.2g}"


def _published(published: Reproduction | None) -> str:
    if published is None:
        return NONE
    return f"{100 * published.accuracy:.2f}" + " (unverified)" * (not published.verified)


def _verdict(published: Reproduction | None) -> str:
    """`inconclusive: −0.12 [−0.60, +0.36] (3), margin 0.50`."""
    if published is None:
        return NONE
    margin = f"margin {100 * published.margin:.2f}"
    test = published.test
    if test is None:
        return f"untestable: no run, {margin}"
    return f"{test.verdict.value}: {_with_interval(test.difference, test.low, test.high)} ({test.n}), {margin}"


def in_points(fraction: float) -> str:
    """`+0.53`, `−0.20`, `0.00`: percentage points."""
    text = f"{100 * fraction:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def _markdown_body(table: Table, block: Block, *, details: bool) -> str:
    body = _body(table, block, _Markup(_markdown, "**{}**", "<ins>{}</ins>"), details=details)
    header = ["quantizer", *(": ".join(column) for column in body.columns)]
    lines = [header, ["---"] * len(header), *body.reset_index().to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown(text: str) -> str:
    return text.replace("|", r"\|")


def _markdown_list(title: str, items: tuple[str, ...]) -> str:
    return f"**{title}**\n\n" + "\n".join(f"- {item}" for item in items)


def _html_list(title: str, items: tuple[str, ...]) -> str:
    return f"<p>{title}</p>\n<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"


def _latex(text: str) -> str:
    return text.translate(LATEX)
