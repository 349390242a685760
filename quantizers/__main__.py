"""`python -m quantizers`: the catalogue, certificates and pictures; `--help` teaches."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:  # --help must not wait for matplotlib
    from quantizers.catalog import Quantizer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Which forward-backward pairs there are, and which are principled.\n\n"
    "Why BNN+ is not and BNN++ is, in words and as pictures:\n\n"
    "[bold]python -m quantizers certify bnn+[/]\n\n"
    "[bold]python -m quantizers certify bnn++[/]\n\n"
    "The same for a pair of yours, the attribute PAIR of a module mine.py here:\n\n"
    "[bold]python -m quantizers certify mine:PAIR[/]",
)

DOCS, IMAGES = Path("docs"), Path("docs/images")


@app.command("list")
def list_() -> None:
    """Show the catalogue: each row's pair, whether it is principled, its usual mu and its source."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from quantizers import QUANTIZERS
    from quantizers.theory.gallery import formula, sharpness

    table = Table(box=box.SIMPLE, show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("principled?", no_wrap=True)
    table.add_column("usual mu", width=12)
    table.add_column("forward, backward, source")
    for row in QUANTIZERS.values():
        pair = f"{formula(row.forward)}\n{formula(row.backward)}\n{row.citation}"
        table.add_row(*map(escape, (row.name, "no" if row.prox is None else "yes", sharpness(row.usual_mu), pair)))
    Console().print(table)


@app.command()
def certify(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A row of the catalogue, or module:attribute of a Quantizer of yours.")
    ],
    mu: Annotated[
        float | None, typer.Option(help="The sharpness; default: the row's usual one at the middle of training.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The picture, a PNG file.  [default: certificate-NAME-mu.png]")
    ] = None,
) -> None:
    """Say whether a pair is principled: whether F = T o P and B = T' o P for some proximal map P.

    Prints the verdict and draws F, B, P and T. Exit status 0 if it is, 1 if it is not, 2 for bad input.

    [dim]python -m quantizers certify bnn+ --mu 5[/]
    """
    from quantizers.sharpness import require_sharpness
    from quantizers.theory.certificates import certify as examine
    from quantizers.theory.drawing import draw_certificate
    from quantizers.theory.gallery import middle_mu

    quantizer = _resolve(name)
    sharpness = middle_mu(quantizer) if mu is None else mu
    try:
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
def gallery(out: Annotated[Path, typer.Option(help="Folder of the page quantizers.md.")] = DOCS) -> None:
    """Write the page of all quantizers, and a picture for each row under images/quantizers.

    [dim]python -m quantizers gallery --out docs[/]
    """
    from quantizers import QUANTIZERS
    from quantizers.theory.certificates import certify as examine
    from quantizers.theory.drawing import draw_certificate
    from quantizers.theory.gallery import PICTURES, middle_mu, page

    for row in QUANTIZERS.values():
        draw_certificate(row, examine(row, middle_mu(row)), out / PICTURES / f"{row.name}.png")
    (out / "quantizers.md").write_text(page(QUANTIZERS.values()), encoding="utf-8")
    print(f"{len(QUANTIZERS)} rows in {out / 'quantizers.md'}")


@app.command()
def convergence(
    out: Annotated[Path, typer.Option(help="Folder of convergence.png and paths.png.")] = IMAGES,
) -> None:
    """Run PC++ on convex quadratics and draw what theory bounds, and the paths of bc, bnn and bnn++ in the plane.

    [dim]python -m quantizers convergence --out docs/images[/]
    """
    from quantizers.theory.convergence import curves
    from quantizers.theory.drawing import draw_convergence, draw_paths

    draw_convergence(curves(num_steps=2000), out / "convergence.png")
    draw_paths(out / "paths.png")
    print(f"{out / 'convergence.png'}, {out / 'paths.png'}")


def _resolve(name: str) -> "Quantizer":
    """The row of that name, or the user's own pair; what is wrong is told with the choices, and ends the program."""
    from quantizers.catalog import Quantizer, get, unknown

    if ":" not in name:
        try:
            return get(name)
        except ValueError as error:
            _fail(f"{error}, or module:attribute")
    import importlib

    module_name, attribute = name.split(":", 1)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        _fail(f"{name}: cannot import {module_name!r}: {error}")
    found = getattr(module, attribute, None)
    if isinstance(found, Quantizer):
        return found
    theirs = [key for key, value in vars(module).items() if isinstance(value, Quantizer)]
    return _fail(f"{name}: {unknown('quantizer', attribute, theirs)}")


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(2)


def main() -> None:
    """Runs the command line; a file that cannot be written is told on stderr, with exit status 2."""
    try:
        app()
    except OSError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
