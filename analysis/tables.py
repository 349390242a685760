"""Table -> markdown, LaTeX, HTML for people (percent), CSV and JSON for programs (fractions). Rendering only.

In the three for people a column holds, per model: accuracy with spread and n, reference minus row with its interval, p.
Findings stand above the table, what the numbers mean below it.
"""

import json
from dataclasses import asdict
from html import escape

import pandas as pd

from analysis.comparison import FULL_PRECISION, Block, Entry, Table
from analysis.statistics import ALPHA, BCA_FROM, CONFIDENCE, Difference, is_underpowered, smallest_p

ACCURACY, DIFFERENCE, P_VALUE = "hard test accuracy, % (n)", "{against} − row, points (n)", "p"
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
    }
)
"""What LaTeX would misread, and the symbols that this module writes."""


def to_markdown(table: Table) -> str:
    """Pipe tables, a heading per block."""
    parts = [_markdown_list("Findings", table.findings)] if table.findings else []
    parts += [f"## {block.title}\n\n{_markdown_body(block, table.against)}" for block in table.blocks]
    return "\n\n".join([*parts, _markdown_list("Notes", notes(table))]) + "\n"


def to_latex(table: Table) -> str:
    r"""One `table` environment per block, for a document with \usepackage{booktabs}; all text is escaped."""
    footnotes = "\n".join(rf"{{\footnotesize {_latex(note)}\par}}" for note in notes(table))
    warnings = "\n".join(rf"{{\footnotesize\textbf{{Finding:}} {_latex(finding)}\par}}" for finding in table.findings)
    environments = []
    for block in table.blocks:
        body = _body(block, table.against).map(_latex).rename(index=_latex, columns=_latex)
        tabular = body.style.to_latex(hrules=True, column_format="l" * (1 + body.shape[1]), multicol_align="c")
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(block.title)}}}",
            warnings,
            tabular.rstrip(),
            footnotes,
        ]
        environments.append("\n".join([*(line for line in lines if line), r"\end{table}"]))
    return "\n\n".join(environments) + "\n"


def to_html(table: Table) -> str:
    """A page of its own that needs no other file; all text is escaped."""
    parts = [_html_list("Findings", table.findings)] if table.findings else []
    for block in table.blocks:
        style = _body(block, table.against).style.set_caption(escape(block.title)).format(escape="html")
        styled = style.format_index(escape="html").format_index(escape="html", axis="columns")
        # Without ids, two renderings of one table are the same text.
        parts.append(styled.to_html(table_uuid="comparison", cell_ids=False, table_attributes='border="1"'))
    body = "\n".join([*parts, _html_list("Notes", notes(table))])
    head = '<meta charset="utf-8"><title>proxbench: hard test accuracy</title>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def to_csv(table: Table) -> str:
    """One line per entry, findings above it as `# finding: ...`: `pandas.read_csv(file, comment="#")`."""
    comments = "".join(f"# finding: {finding}\n" for finding in table.findings)
    return comments + pd.DataFrame(records(table)).to_csv(index=False, lineterminator="\n")


def to_json(table: Table) -> str:
    """{"findings": [...], "entries": [...]}, entries as the lines of the CSV; what is undefined is null."""
    document = {"findings": table.findings, "entries": records(table)}
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def records(table: Table) -> list[dict[str, object]]:
    """Each entry as one flat dictionary, the difference's fields prefixed `difference_`; accuracies are fractions."""
    fields = list(Difference.__dataclass_fields__)
    rows: list[dict[str, object]] = []
    for block in table.blocks:
        for entry in block.entries:
            difference = asdict(entry.difference) if entry.difference else dict.fromkeys(fields)
            where = {"grid": block.grid, "dataset": block.dataset, "task": block.task, "init": block.init}
            flat = {**asdict(entry), "missing": "; ".join(f"{count} {reason}" for reason, count in entry.missing)}
            del flat["difference"]
            flat["underpowered"] = entry.difference and is_underpowered(entry.difference.n)
            rows.append({**where, **flat, **{f"difference_{field}": difference[field] for field in fields}})
    return rows


def notes(table: Table) -> tuple[str, ...]:
    """What the numbers mean and what they cannot say, for the entries that are there."""
    entries = [entry for block in table.blocks for entry in block.entries]
    differences = [entry.difference for entry in entries if entry.difference]
    few = sorted({difference.n for difference in differences if is_underpowered(difference.n)})
    bca = f", BCa from {BCA_FROM} pairs on" if any(difference.n >= BCA_FROM for difference in differences) else ""
    candidates = {
        "Accuracy: top-1 on the test set, read once after the last epoch with every quantised weight exactly −1 or +1; "
        "mean ± sample standard deviation (ddof 1) over n seeds.": True,
        "fp is full precision: not a binary network.": any(entry.quantizer == FULL_PRECISION for entry in entries),
        f"{table.against} − row: mean of the differences paired by seed, in percentage points, with its "
        f"{CONFIDENCE:.0%} interval (Student's t{bca}) over n pairs.": bool(differences),
        "p: two-sided sign-flip test of the paired differences, not adjusted for the "
        f"{len(differences)} comparisons shown.": bool(differences),
        f"underpowered: no data from so few pairs could reach p ≤ {ALPHA} (the smallest possible p is "
        f"{', '.join(f'{smallest_p(n):g} for n={n}' for n in few)}); it is no evidence of equality.": bool(few),
        "no interval: it is undefined for one pair, and for differences that are all equal.": any(
            difference.low is None for difference in differences
        ),
    }
    return tuple(note for note, applies in candidates.items() if applies)


def _body(block: Block, against: str) -> pd.DataFrame:
    """The block as text: quantizers by (model, column)."""
    cells = {(entry.quantizer, entry.model): _texts(entry) for entry in block.entries}
    columns = pd.MultiIndex.from_product([block.models, (ACCURACY, DIFFERENCE.format(against=against), P_VALUE)])
    rows = [[text for model in block.models for text in cells[quantizer, model]] for quantizer in block.quantizers]
    return pd.DataFrame(rows, index=pd.Index(block.quantizers), columns=columns)


def _texts(entry: Entry) -> tuple[str, str, str]:
    difference = entry.difference
    if difference is None:
        return _accuracy(entry), NONE, NONE
    p = f"underpowered (n={difference.n})" if is_underpowered(difference.n) else f"{difference.p:.2g}"
    return _accuracy(entry), _difference(difference), p


def _accuracy(entry: Entry) -> str:
    """`97.10 ± 0.30 (3)`; some missing: `97.10 ± 0.30 (2 of 3; 1 failed: oom)`; all: `missing (3 queued)`."""
    missing = ", ".join(f"{count} {reason}" for reason, count in entry.missing)
    if entry.conflict:
        return f"{entry.conflict}, no mean"
    if entry.top1_hard_mean is None:
        return f"missing ({missing})" if missing else NONE
    spread = "" if entry.top1_hard_sd is None else f" ± {100 * entry.top1_hard_sd:.2f}"
    n = f"{entry.num_done} of {entry.num_seeds}; {missing}" if missing else f"{entry.num_done}"
    return f"{100 * entry.top1_hard_mean:.2f}{spread} ({n})"


def _difference(difference: Difference) -> str:
    """`+0.53 [−0.20, +1.27] (3)`, or `+0.53, no interval (1)`."""
    if difference.low is None or difference.high is None:
        return f"{_points(difference.mean)}, no interval ({difference.n})"
    return f"{_points(difference.mean)} [{_points(difference.low)}, {_points(difference.high)}] ({difference.n})"


def _points(fraction: float) -> str:
    text = f"{100 * fraction:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def _markdown_body(block: Block, against: str) -> str:
    body = _body(block, against)
    header = ["quantizer", *(": ".join(column) for column in body.columns)]
    lines = [header, ["---"] * len(header), *body.reset_index().to_numpy().tolist()]
    return "\n".join("| " + " | ".join(_markdown(text) for text in line) + " |" for line in lines)


def _markdown(text: str) -> str:
    return text.replace("|", r"\|")


def _markdown_list(title: str, items: tuple[str, ...]) -> str:
    return f"**{title}**\n\n" + "\n".join(f"- {item}" for item in items)


def _html_list(title: str, items: tuple[str, ...]) -> str:
    return f"<p>{title}</p>\n<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"


def _latex(text: str) -> str:
    return text.translate(LATEX)
