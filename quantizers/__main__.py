"""`python -m quantizers`: list the catalogue, certify pairs, draw pictures; `--help` shows how."""

import re
import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from quantizers.catalog import QUANTIZERS, Quantizer, get
from quantizers.sharpness import Shape, require_sharpness

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="List the forward-backward pairs and check which are principled.\n\n"
    "[bold]python -m quantizers list[/]\n"
    "[bold]python -m quantizers certify bnn+[/]       why BNN+ is not principled\n"
    "[bold]python -m quantizers certify bnn++[/]      and BNN++ is\n"
    "[bold]python -m quantizers certify mine:PAIR[/]  your own pair, PAIR of ./mine.py",
)

DOCS, IMAGES = Path("docs"), Path("docs/images")
PICTURES = Path("images") / "quantizers"
"""Folder of the pictures, relative to the page."""


@app.command("list")
def list_() -> None:
    """List the catalogue, one row a line: is the pair principled, its usual mu, its source.

    [bold]python -m quantizers list[/]
    [bold]python -m quantizers show bnn++[/]
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, expand=True)
    for title in ("name", "principled", "usual mu"):
        table.add_column(title, no_wrap=True)
    table.add_column("source", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in QUANTIZERS.values():
        table.add_row(*map(escape, (row.name, _yes(row), schedule(row.usual_mu), row.citation)))
    Console().print(table)
    print("formulas and sources of one row: python -m quantizers show NAME")


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A row of the catalogue, or module:attribute of your own Quantizer.")
    ],
) -> None:
    """Show one row: its formulas, its mu, its source, and how a grid names it.

    [bold]python -m quantizers show bnn++[/]
    """
    try:
        row = get(name)
    except (ValueError, ImportError) as error:
        _fail(str(error))
    for part in _parts(row.formula):
        print(part)
    print(f"principled: {_yes(row)} (python -m quantizers certify {name})")
    if row.completes is not None:
        print(f"completes: {row.completes}: the same B, with F = the integral of B")
    print(f"usual mu: {schedule(row.usual_mu)}")
    print(f"source: {row.citation}")
    print(f"in a grid: quantizers: [{name}]{_in_a_grid(row)}")


def _yes(row: Quantizer) -> str:
    return "no" if row.prox is None else "yes"


def _in_a_grid(row: Quantizer) -> str:
    """The keys that set the row's mu; empty if it reads none."""
    shape = row.usual_mu
    if shape is None or not is_dataclass(shape):
        return ""
    kind = type(shape).__name__.lower()
    values = [getattr(shape, field.name) for field in fields(shape)]
    ends = "".join(f", {key}: {value:g}" for key, value in zip(("start", "end"), values, strict=False))
    return f" with quantization: {{sharpness: {{{row.name}: {{shape: {kind}{ends}}}}}}}"


@app.command()
def certify(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A row of the catalogue, or module:attribute of your own Quantizer.")
    ],
    mu: Annotated[
        float | None, typer.Option(help="The sharpness. Default: the row's usual mu at mid-training.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="PNG file to write. Default: certificate-NAME-mu.png.")] = None,
) -> None:
    """Check whether a pair is principled: F = T o P and B = T' o P for some proximal map P.

    [bold]python -m quantizers certify bnn+ --mu 5[/]

    Print the verdict and draw F, B, P and T. Exit status: 0 if principled, 1 if
    not, 2 for bad input.
    """
    from quantizers.theory.certificates import certify as examine
    from quantizers.theory.drawing import draw_certificate

    try:
        quantizer = get(name)
        sharpness = middle_mu(quantizer) if mu is None else mu
        require_sharpness(sharpness)
        certificate = examine(quantizer, sharpness)
    except ValueError as error:
        _fail(str(error))
    print(certificate.verdict())
    picture = out or Path(f"certificate-{re.sub(r'[^+.0-9A-Za-z-]', '-', quantizer.name)}-{sharpness:g}.png")
    draw_certificate(quantizer, certificate, picture)
    print(f"picture: {picture}")
    raise typer.Exit(0 if certificate.decomposes else 1)


@app.command()
def gallery(out: Annotated[Path, typer.Option(help="Folder to write quantizers.md to.")] = DOCS) -> None:
    """Write the page of all quantizers, and one picture per row under images/quantizers.

    [bold]python -m quantizers gallery --out docs[/]
    """
    from quantizers.theory.certificates import certify as examine
    from quantizers.theory.drawing import draw_certificate

    for row in QUANTIZERS.values():
        draw_certificate(row, examine(row, middle_mu(row)), out / PICTURES / f"{row.name}.png")
    (out / "quantizers.md").write_text(page(QUANTIZERS.values()), encoding="utf-8")
    print(f"{len(QUANTIZERS)} rows in {out / 'quantizers.md'}")


@app.command()
def convergence(
    out: Annotated[Path, typer.Option(help="Folder to write convergence.png and paths.png to.")] = IMAGES,
) -> None:
    """Run PC++ on convex quadratics; draw the results with their bounds, and the paths of bc, bnn and bnn++ in 2D.

    [bold]python -m quantizers convergence --out docs/images[/]
    """
    from quantizers.theory.convergence import curves
    from quantizers.theory.drawing import draw_convergence, draw_paths

    draw_convergence(curves(num_steps=2000), out / "convergence.png")
    draw_paths(out / "paths.png")
    print(f"{out / 'convergence.png'}, {out / 'paths.png'}")


def schedule(shape: Shape | None) -> str:
    """The schedule of mu in words: 'exponential, 2 to 500', 'constant, 5', or 'none'."""
    if shape is None:
        return "none"
    if not is_dataclass(shape):
        return f"{shape(0):g} to {shape(1):g}"
    ends = " to ".join(f"{getattr(shape, field.name):g}" for field in fields(shape))
    return f"{type(shape).__name__.lower()}, {ends}"


def middle_mu(quantizer: Quantizer) -> float:
    """The row's usual mu at mid-training, to three digits; 1 if the row ignores mu."""
    return 1.0 if quantizer.usual_mu is None else float(f"{quantizer.usual_mu(0.5):.3g}")


def page(rows: Iterable[Quantizer]) -> str:
    """The text of docs/quantizers.md, one section per row."""
    return _HEADER + "".join(_section(row) for row in rows)


_HEADER = """\
# The quantizers

Written by `python -m quantizers gallery` from the catalogue; change `quantizers/catalog.py`, not this page. Each
picture shows F and B over the latents w*, and P and T with F = T o P and B = T' o P where they exist; where they do
not, an interval on which the pair breaks a rule of [the theory](theory.md) is shaded. It is drawn at the mu of
mid-training. The mu below is the usual one: its paper's or its code's, or ours where the catalogue says so; a grid may
ask for another. sign(0) = +1.
"""


def _parts(formula: str) -> list[str]:
    """The formulas of F and B; empty if the row gives none."""
    return formula.split("; ") if formula else []


def _section(row: Quantizer) -> str:
    verdict = "not principled" if row.prox is None else "principled"
    completes = "" if row.completes is None else f", completes {row.completes}"
    formula = "".join(f"- `{part}`\n" for part in _parts(row.formula))
    return f"""
## {row.name}

![F, B, P and T of {row.name}]({(PICTURES / f"{row.name}.png").as_posix()})

- {verdict}{completes}; mu: {schedule(row.usual_mu)}
{formula}- {row.citation}
"""


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(2)


def main() -> None:
    """Run the command line; if a file cannot be written, say so on stderr and exit with status 2."""
    try:
        app()
    except OSError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
