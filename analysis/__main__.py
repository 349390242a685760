"""`python -m analysis`: comparisons, figures and a report from run directories or an MLflow store."""

import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from analysis.place import Place
from suite.errors import UserError

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="rich", add_completion=False, no_args_is_help=True)


class Format(str, Enum):
    """Output format of a table."""

    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    html = "html"
    json = "json"


@app.callback()
def analysis() -> None:
    """Is BNN++ more accurate than each other binary method, on these models? Tables, figures, a report.

    [bold]python -m analysis tables digits[/]
    [bold]python -m analysis report digits[/]
    [bold]python -m analysis power digits --difference 0.5[/]
    """


Grid = Annotated[str | None, typer.Argument(help="Name of the grid; default: every grid found.")]
Roots = Annotated[
    list[Path] | None,
    typer.Option(
        "--root", help="Folder that holds the runs. Repeat it to merge several.", show_default="PROXBENCH_ROOT, or runs"
    ),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(help="Read an MLflow store or server instead of run directories, e.g. sqlite:///runs/mlflow.db."),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Exit with status 2 if cells are missing, failed, duplicated or from mixed recipes or code."
    ),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Compare with published numbers: the name of a file in analysis/compare/published, or a path.",
    ),
]


@app.command()
def tables(
    grid: Grid = None,
    layout: Annotated[
        Format,
        typer.Option("--format", help="markdown, latex (booktabs) and html show percent; csv and json hold fractions."),
    ] = Format.markdown,
    root: Roots = None,
    tracking_uri: TrackingUri = None,
    strict: Strict = False,
    completions: Annotated[
        bool,
        typer.Option(
            "--completions", help="Compare each published surrogate gradient with its completion: bnn+ with bnn++, ..."
        ),
    ] = False,
    details: Annotated[
        bool,
        typer.Option(
            "--details",
            help="Add soft-hard gap, size and per-model tables to markdown and latex (other formats have them).",
        ),
    ] = False,
    against: AgainstOption = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="DATASET/MODEL/QUANTIZER", help="List the runs behind one table entry instead."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
) -> None:
    """Accuracy of every quantizer on every model, and BNN++'s comparison with each quantizer over all models.

    [bold]python -m analysis tables digits[/]
    [bold]python -m analysis tables digits --details[/]
    [bold]python -m analysis tables zoo --completions[/]
    [bold]python -m analysis tables digits --format latex --output digits.tex[/]
    [bold]python -m analysis tables digits --explain digits/resnet8/bnn++[/]
    [bold]python -m analysis tables cifar10 --against resnet-cifar10 --strict[/]
    [bold]python -m analysis tables imagenet --root mine --root colleagues[/]
    [bold]python -m analysis tables imagenet --tracking-uri http://tracker:5000 --format csv > imagenet.csv[/]

    Accuracy is measured with binary weights and shown as mean ± standard
    deviation over seeds. Where seeds are missing or have failed, the entry says
    so. Other problems are listed above the table (for csv, on stderr).
    """
    from analysis.render.progress import progress

    with progress() as say:
        from analysis.compare import published
        from analysis.render import explanation
        from analysis.render import tables as rendering

        publication = published.load(against) if against is not None else None
        place = Place(root, tracking_uri)
        results = place.results(grid, strict=strict)
        place.look(results, "tables")
        if explain is not None:
            text = explanation.render(results, explain, layout.value)
        else:
            say("comparing")
            text = rendering.render(
                place.table(results, publication, completions=completions), layout.value, details=details
            )
    if layout is Format.csv:
        for finding in results.findings:
            print(f"finding: {finding}", file=sys.stderr)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    elif layout is Format.markdown and sys.stdout.isatty():
        _draw(text)
    else:
        sys.stdout.write(text)


@app.command()
def figures(
    output: Annotated[Path, typer.Option(help="Folder for the figures, each saved as PDF and PNG.")],
    grid: Grid = None,
    root: Roots = None,
    tracking_uri: TrackingUri = None,
    strict: Strict = False,
) -> None:
    """Forest plot, performance profiles, training curves, flip rates, soft-hard gap, accuracy against size, ranks.

    [bold]python -m analysis figures digits --output figures[/]

    Writes each figure of each data set as PDF and PNG and prints the file names.
    On stderr, says what it cannot draw and why.
    """
    from analysis.render.progress import progress

    with progress() as say:
        from analysis.render import figures as rendering

        place = Place(root, tracking_uri)
        results = place.results(grid, strict=strict)
        place.look(results, "figures")
        say("reading the curves")
        recorded = place.curves(results)
        say("drawing")
        pictures = rendering.pictures(place.table(results), recorded)
        written = rendering.write(pictures, output)
    for finding in results.findings:
        print(f"finding: {finding}", file=sys.stderr)
    for path in written:
        print(path)
    for picture in pictures:
        if picture.figure is None:
            print(f"no {picture.name}: {picture.caption}", file=sys.stderr)


@app.command()
def power(
    grid: Grid = None,
    root: Roots = None,
    tracking_uri: TrackingUri = None,
    strict: Strict = False,
    difference: Annotated[
        float, typer.Option(metavar="POINTS", help="Difference in accuracy that you want to detect.")
    ] = 1.0,
    seeds: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of seeds per model to show.")] = "3,5,10,20",
    chance: Annotated[
        float, typer.Option("--power", help="Probability of detecting that difference, between 0 and 1.")
    ] = 0.8,
    sd: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS", help="Assume this standard deviation of the paired differences instead of reading runs."
        ),
    ] = None,
    models: Annotated[
        int | None, typer.Option(min=1, help="Number of models.", show_default="as in the grid; 1 with --sd")
    ] = None,
    family: Annotated[
        int | None,
        typer.Option(min=1, help="Number of comparisons tested together.", show_default="as in the grid; 1 with --sd"),
    ] = None,
) -> None:
    """Plan a study: the difference that a number of seeds can detect, and the seeds that a difference needs.

    [bold]python -m analysis power digits --difference 0.5[/]
    [bold]python -m analysis power --sd 0.4 --difference 0.3 --models 6 --family 5[/]
    [bold]python -m analysis power cifar10 --seeds 5,10,15[/]

    Uses only the spread of the runs' paired differences, never their mean, and
    shows no results, so choosing the number of seeds from this table does not
    change the error rate of the later test. Two seeds are enough to start with.
    """
    from analysis.render.progress import progress

    with progress() as say:
        from analysis.compare import plans

        wanted = plans.wish(difference, seeds, chance)
        if sd is not None:
            text = plans.to_markdown([plans.assumed(sd, models or 1, family or 1)], wanted)
        else:
            place = Place(root, tracking_uri)
            results = place.results(grid, strict=strict)
            say("planning")
            text = plans.to_markdown(plans.plans(place.table(results), models, family), wanted, results.findings)
    if sys.stdout.isatty():
        _draw(text)
    else:
        sys.stdout.write(text)


def _draw(markdown: str) -> None:
    """Renders Markdown for a terminal: aligned columns, bold headings."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(markdown))


@app.command()
def tuning(
    grid: Grid = None,
    root: Roots = None,
    strict: Strict = False,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also draw figures into this folder, each as PDF and PNG.")
    ] = None,
) -> None:
    """How each method was tuned: trials, scores, choices at the edge of a range, hours, the value of smaller budgets.

    [bold]python -m analysis tuning digits[/]
    [bold]python -m analysis tuning digits --figures figures[/]
    """
    from analysis.render.progress import progress

    with progress() as say:
        from analysis.render import figures as drawing
        from analysis.render import tuning as rendering
        from analysis.render.style import house_style
        from analysis.runs import folders

        tuned, findings = folders.load_tuning(Place(root, None).roots, grid)
        if strict and findings.doubts:
            raise UserError(f"--strict: {'; '.join(findings.doubts)}")
        text = rendering.to_markdown(tuned, (*findings.remarks, *findings.doubts))
        written, missing = [], []
        if figures is not None:
            say("drawing")
            with house_style():
                pictures = rendering.pictures(tuned)
            written = drawing.write(pictures, figures)
            missing = [picture for picture in pictures if picture.figure is None]
    if sys.stdout.isatty():
        _draw(text)
    else:
        sys.stdout.write(text)
    for path in written:
        print(path)
    for picture in missing:
        print(f"no {picture.name}: {picture.caption}", file=sys.stderr)


@app.command()
def report(
    grid: Grid = None,
    root: Roots = None,
    tracking_uri: TrackingUri = None,
    strict: Strict = False,
    against: AgainstOption = None,
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write.", show_default="ROOT/GRID/report.html, or ROOT/report.html")
    ] = None,
) -> None:
    """Everything in one HTML file: answers, forest plot, tables, figures, methods, provenance, missing cells.

    [bold]python -m analysis report digits[/]
    [bold]python -m analysis report cifar10 --against resnet-cifar10[/]

    The file needs no network and no other file. The same runs give the same
    bytes. Prints its path.
    """
    from analysis.render.progress import progress

    place = Place(root, tracking_uri)
    path = output or place.roots[0] / (grid or "") / "report.html"
    with progress() as say:
        page = _page(place, grid, against, strict=strict, say=say)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(path)


@app.command()
def bundle(
    grid: Annotated[str, typer.Argument(help="Name of the grid.")],
    root: Roots = None,
    strict: Strict = False,
    output: Annotated[Path | None, typer.Option(help="Archive to write.", show_default="GRID.tar.xz")] = None,
) -> None:
    """One archive for reviewers: grid, launches, results, journals, predictions, provenance, report and tables.

    [bold]python -m analysis bundle digits[/]
    [bold]python -m analysis bundle imagenet --root mine --root colleagues --output imagenet.tar.xz[/]

    Its README.txt gives the command that rebuilds the tables byte for byte.
    Checkpoints are not included. Prints its path.
    """
    from analysis.render.progress import progress

    place = Place(root, None)
    path = output or Path(f"{grid}.tar.xz")
    with progress() as say:
        from analysis.render import bundle as archive
        from analysis.render import tables as rendering
        from analysis.render import tuning as tuning_rendering
        from analysis.runs import folders, provenance
        from suite.run.provenance import own_version

        page = _page(place, grid, None, strict=strict, say=say)
        results = place.results(grid, strict=strict)
        table = place.table(results)
        say("packing")
        roots = archive.named(place.roots, grid)
        made = {
            "README.txt": archive.readme(grid, roots, own_version(), is_tuned=bool(results.tuning)),
            "report.html": page,
            "tables.md": rendering.to_markdown(table, details=True),
            "tables.json": rendering.to_json(table),
            "versions.txt": provenance.made_with() + "\n",
        }
        if results.tuning:
            tuned, findings = folders.load_tuning(place.roots, grid)
            made["tuning.md"] = tuning_rendering.to_markdown(tuned, (*findings.remarks, *findings.doubts))
        archive.write(path, grid, roots, made)
    print(path)


def _page(place: Place, grid: str | None, against: str | None, *, strict: bool, say: Callable[[str], None]) -> str:
    from analysis.compare import published
    from analysis.render import report as rendering
    from analysis.runs import provenance

    publication = published.load(against) if against is not None else None
    results = place.results(grid, strict=strict)
    place.look(results, "report")
    say("reading the curves")
    recorded, backgrounds = place.curves(results), place.backgrounds(results)
    source = provenance.source(grid, place.roots if place.uri is None else place.uri, against)
    say("comparing")
    table = place.table(results, publication, images=True)
    return rendering.report(results, table, recorded, backgrounds, source, say)


def main() -> None:
    """Runs the command line. Usage errors go to stderr and give exit status 2."""
    try:
        app()
    except (OSError, UserError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
