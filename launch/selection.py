"""Selects a command's grid and cells, and reports bad input."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from suite.recipe.bundled import bundled_names

if TYPE_CHECKING:  # it imports pydantic's models, which --help must not wait for
    from launch.plan import Standing

DEFAULT_ROOT, DEFAULT_DATA = Path("runs"), Path("data")
GridArgument = Annotated[
    str,
    typer.Argument(help=f"A bundled grid ({', '.join(bundled_names())}) or the path of a YAML file.", metavar="GRID"),
]
GridName = Annotated[
    str | None,
    typer.Argument(help="Name of a launched grid; may be omitted if ROOT holds only one.", metavar="[GRID]"),
]
Root = Annotated[
    Path | None,
    typer.Option(
        envvar="PROXBENCH_ROOT", help="Folder of run directories and the MLflow store.", show_default=str(DEFAULT_ROOT)
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        envvar="PROXBENCH_DATA", help="Folder of data sets; downloads go there.", show_default=str(DEFAULT_DATA)
    ),
]
TrackingUri = Annotated[
    str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow store or server; default: sqlite in ROOT.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key for every cell, e.g. training.epochs=2. Repeatable.")
]
Only = Annotated[
    list[str] | None, typer.Option(help="Only cells matching this: an id, 'resnet20/bnn++', '*/s0'. Repeatable.")
]
Cells = Annotated[
    list[str] | None,
    typer.Argument(help="Ids or patterns, 'resnet20/bnn++', '*/s0'; default: all.", metavar="[CELL]..."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask for confirmation.")]
OfGrid = Annotated[
    str | None, typer.Option("--grid", help="Name of a launched grid; may be omitted if ROOT holds only one.")
]


def grid_dir_of(root: Path | None, grid: str | None) -> Path:
    """The folder of the launched grid; without a name, of the only grid in ROOT."""
    root, found = root or DEFAULT_ROOT, launched(root)
    if grid is None and len(found) == 1:
        return root / found[0]
    if grid in found:
        return root / str(grid)
    what = "which grid?" if grid is None else f"no grid {grid!r}."
    return fail(f"{what} {root} holds {', '.join(found) or 'none: launch one, or name another --root'}")


def launched(root: Path | None) -> list[str]:
    """Names of the grids that were launched into ROOT."""
    return sorted(path.parent.name for path in (root or DEFAULT_ROOT).glob("*/plan.json"))


def matching(rows: "Sequence[Standing]", patterns: Sequence[str] | None) -> "list[Standing]":
    """The rows whose cells match any pattern; all rows without patterns."""
    from launch.plan import matches

    found = [row for row in rows if not patterns or any(matches(row.cell, pattern) for pattern in patterns)]
    if not found:
        fail(f"{', '.join(patterns or [])} matches no cell; python -m launch status --json lists them")
    return found


def fail(message: str) -> NoReturn:
    """Prints the message and exits with status 2, as for any bad input."""
    print(message, file=sys.stderr)
    raise SystemExit(2)
