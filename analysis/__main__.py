"""`python -m analysis`: tables from the runs in an MLflow store."""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from analysis.errors import UserError

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


@app.command()
def tables(
    grid: Annotated[str | None, typer.Argument(help="Name of the grid; default: every grid in the store.")] = None,
    layout: Annotated[
        Format,
        typer.Option("--format", help="markdown, latex (booktabs) and html in percent; csv and json as fractions."),
    ] = Format.markdown,
    root: Annotated[
        Path, typer.Option(envvar="PROXBENCH_ROOT", help="Folder of the runs; its mlflow.db is the default store.")
    ] = Path("runs"),
    tracking_uri: Annotated[
        str | None,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow store or server.  [default: sqlite:///ROOT/mlflow.db]"),
    ] = None,
    completions: Annotated[
        bool,
        typer.Option("--completions", help="Compare each surrogate gradient with its completion: bnn+ with bnn++, ..."),
    ] = False,
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
      python -m analysis tables imagenet --tracking-uri http://tracker:5000 --format csv > imagenet.csv
    """  # noqa: D301 - \b is typer's: keep these lines
    from analysis import comparison
    from analysis import tables as render
    from analysis.runs import load

    results = load(tracking_uri or f"sqlite:///{root}/mlflow.db", grid)
    against = comparison.completions() if completions else comparison.BNN_PLUS_PLUS
    table = comparison.comparison(results.frame, results.findings, against)
    text = getattr(render, f"to_{layout.value}")(table)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    elif layout is Format.markdown and sys.stdout.isatty():
        _draw(text)
    else:
        sys.stdout.write(text)


def _draw(markdown: str) -> None:
    """For eyes: aligned columns, bold headings."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(markdown))


def main() -> None:
    """Runs the command line; what the user got wrong is told on stderr, with exit status 2."""
    try:
        app()
    except (OSError, UserError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
