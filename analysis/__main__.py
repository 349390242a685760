"""`python -m analysis`: tables from the runs in an MLflow store."""

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from suite.errors import UserError

if TYPE_CHECKING:  # pandas comes with it, and --help must not wait for that
    from analysis.runs.frame import Results

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False, no_args_is_help=True)


class Format(str, Enum):
    """How a table is written."""

    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    html = "html"
    json = "json"


@app.callback()
def analysis() -> None:
    """Turns the runs in an MLflow store into what a paper shows. Reads only; nothing is trained or changed.

    \b
    First bring the run directories into the store:   python -m launch sync
    Then, for the grid named digits:                  python -m analysis tables digits
    """  # noqa: D301 - \b is typer's: keep these lines


Grid = Annotated[str | None, typer.Argument(help="Name of the grid; default: every grid there is.")]
Root = Annotated[
    Path, typer.Option(envvar="PROXBENCH_ROOT", help="Folder of the runs; its mlflow.db is the default store.")
]
TrackingUri = Annotated[
    str | None,
    typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow store or server.  [default: sqlite:///ROOT/mlflow.db]"),
]
FromRuns = Annotated[bool, typer.Option("--from-runs", help="Read the run directories in ROOT, no MLflow store.")]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Refuse, with exit status 2, if cells are missing, failed, doubled or mixed."),
]


def _results(grid: str | None, uri: str, root: Path, *, from_runs: bool, strict: bool) -> "Results":
    """What the options common to all commands ask for."""
    from analysis.runs import folders
    from analysis.runs import store as runs

    results = folders.load(root, grid) if from_runs else runs.load(uri, grid)
    if strict and results.doubts:
        raise UserError(f"--strict: {len(results.doubts)} findings put numbers in doubt: {'; '.join(results.doubts)}")
    return results


@app.command()
def tables(
    grid: Grid = None,
    layout: Annotated[
        Format,
        typer.Option("--format", help="markdown, latex (booktabs) and html in percent; csv and json as fractions."),
    ] = Format.markdown,
    root: Root = Path("runs"),
    tracking_uri: TrackingUri = None,
    from_runs: FromRuns = False,
    strict: Strict = False,
    completions: Annotated[
        bool,
        typer.Option("--completions", help="Compare each surrogate gradient with its completion: bnn+ with bnn++, ..."),
    ] = False,
    details: Annotated[
        bool, typer.Option("--details", help="Soft-hard gap and size in markdown and latex, too; the others have them.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Published numbers beside ours, with a verdict: a name in analysis/published, or a file.",
        ),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="DATASET/MODEL/QUANTIZER", help="Instead of the table, the runs behind one entry of it."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write instead of the terminal.")] = None,
) -> None:
    """Accuracy of every quantizer and model, with BNN++'s paired difference to it, or its completion's.

    Accuracy is measured with binary weights, as mean ± standard deviation over seeds. Seeds that are missing or failed
    are shown in their place, and what else is amiss stands above the table.

    \b
    Examples:
      python -m analysis tables digits
      python -m analysis tables zoo --completions
      python -m analysis tables digits --format latex --output digits.tex
      python -m analysis tables digits --explain digits/resnet8/bnn++
      python -m analysis tables cifar10 --against resnet-cifar10 --strict
      python -m analysis tables imagenet --tracking-uri http://tracker:5000 --format csv > imagenet.csv
    """  # noqa: D301 - \b is typer's: keep these lines
    from analysis.compare import comparison, published
    from analysis.render import explanation
    from analysis.render import tables as render

    publication = published.load(against) if against is not None else None
    results = _results(grid, _uri(tracking_uri, root), root, from_runs=from_runs, strict=strict)
    if explain is not None:
        text = explanation.render(results, explain, layout.value)
    else:
        reference = comparison.completions() if completions else comparison.BNN_PLUS_PLUS
        table = comparison.comparison(results.frame, results.findings, reference, publication)
        text = render.render(table, layout.value, details=details)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    elif layout is Format.markdown and sys.stdout.isatty():
        _draw(text)
    else:
        sys.stdout.write(text)


def _uri(tracking_uri: str | None, root: Path) -> str:
    return tracking_uri or f"sqlite:///{root}/mlflow.db"


@app.command()
def figures(
    output: Annotated[Path, typer.Option(help="Folder for the pictures, each as PDF and as PNG.")],
    grid: Grid = None,
    root: Root = Path("runs"),
    tracking_uri: TrackingUri = None,
    from_runs: FromRuns = False,
    strict: Strict = False,
) -> None:
    """Paired differences, curves and flip rates over training, soft-hard gap, accuracy against size, ranks over models.

    Writes each picture of each data set as PDF and PNG, and prints their names; what cannot be drawn is told on stderr.

    \b
    Examples:
      python -m analysis figures digits --output figures
      python -m analysis figures digits --from-runs --output figures
    """  # noqa: D301 - \b is typer's: keep these lines
    from analysis.compare.comparison import comparison
    from analysis.render import figures as render
    from analysis.runs import curves
    from analysis.runs import store as runs

    uri = _uri(tracking_uri, root)
    results = _results(grid, uri, root, from_runs=from_runs, strict=strict)
    for finding in results.findings:
        print(f"finding: {finding}", file=sys.stderr)
    if from_runs:
        recorded = curves.from_folders(results.frame)
    else:
        recorded = curves.curves_of(runs.histories(uri, results.frame, curves.METRICS))
    pictures = render.pictures(results.frame, comparison(results.frame, results.findings), recorded)
    for path in render.write(pictures, output):
        print(path)
    for picture in pictures:
        if picture.figure is None:
            print(f"no {picture.name}: {picture.caption}", file=sys.stderr)


@app.command()
def power(
    grid: Grid = None,
    root: Root = Path("runs"),
    tracking_uri: TrackingUri = None,
    from_runs: FromRuns = False,
    strict: Strict = False,
    difference: Annotated[float, typer.Option(metavar="POINTS", help="The difference you want to find.")] = 1.0,
    seeds: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of seeds to tell about.")] = "3,5,10,20",
    chance: Annotated[float, typer.Option("--power", help="The chance to find it, between 0 and 1.")] = 0.8,
    sd: Annotated[
        float | None,
        typer.Option(metavar="POINTS", help="Assume this spread of the paired differences instead of reading runs."),
    ] = None,
    family: Annotated[
        int | None, typer.Option(min=1, help="Comparisons tested together.  [default: those of the grid; 1 with --sd]")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a file.png or file.pdf.")] = None,
) -> None:
    """What difference n seeds can detect, and how many seeds a wanted difference takes, before a GPU-hour is spent.

    The spread is that of the runs' own paired differences, BNN++ minus each method; two seeds are enough to begin with.

    \b
    Examples:
      python -m analysis power digits --difference 0.5
      python -m analysis power --sd 0.4 --difference 0.3 --family 10
      python -m analysis power cifar10 --seeds 5,10,15 --plot power.png
    """  # noqa: D301 - \b is typer's: keep these lines
    from analysis.compare import plans

    wish = plans.wish(difference, seeds, chance)
    if sd is not None:
        found = [plans.assumed(sd, family or 1)]
        text = plans.to_markdown(found, wish)
    else:
        results = _results(grid, _uri(tracking_uri, root), root, from_runs=from_runs, strict=strict)
        found = plans.plans(results, family)
        text = plans.to_markdown(found, wish, results.findings)
    if plot is not None:
        plans.write(plans.draw(found, wish), plot)
    if sys.stdout.isatty():
        _draw(text)
    else:
        sys.stdout.write(text)


def _draw(markdown: str) -> None:
    """For eyes: aligned columns, bold headings."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(markdown))


@app.command()
def report(
    grid: Grid = None,
    root: Root = Path("runs"),
    tracking_uri: TrackingUri = None,
    from_runs: FromRuns = False,
    strict: Strict = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Published numbers to compare with: a name in analysis/published, or a file."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write.  [default: ROOT/GRID/report.html, or ROOT/report.html]")
    ] = None,
) -> None:
    """One HTML file with everything: verdicts in plain sentences, tables, figures, methods, provenance, missing cells.

    It needs no network and no other file. The same runs give the same bytes. Prints its path.

    \b
    Examples:
      python -m analysis report digits
      python -m analysis report digits --from-runs --output report.html
      python -m analysis report cifar10 --against resnet-cifar10
    """  # noqa: D301 - \b is typer's: keep these lines
    from analysis.render.progress import progress

    with progress() as say:
        from analysis.compare import published
        from analysis.compare.comparison import BNN_PLUS_PLUS, comparison
        from analysis.render import report as render
        from analysis.runs import curves, folders, provenance
        from analysis.runs import store as runs

        publication = published.load(against) if against is not None else None
        uri = _uri(tracking_uri, root)
        results = _results(grid, uri, root, from_runs=from_runs, strict=strict)
        say("reading the curves")
        if from_runs:
            recorded, backgrounds = curves.from_folders(results.frame), folders.backgrounds(results.frame)
        else:
            recorded = curves.curves_of(runs.histories(uri, results.frame, curves.METRICS))
            backgrounds = runs.backgrounds(uri, results.frame)
        source = provenance.source(grid, root if from_runs else uri, against)
        table = comparison(results.frame, results.findings, BNN_PLUS_PLUS, publication)
        page = render.report(results, table, recorded, backgrounds, source, say)
    path = output or root / (grid or "") / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(path)


def main() -> None:
    """Runs the command line; what the user got wrong is told on stderr, with exit status 2."""
    try:
        app()
    except (OSError, UserError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
