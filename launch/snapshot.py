"""Copies a launch's code beside its runs, so that a job that waited for days runs the submitted code, not a later edit.

GRID/code/<hash>/ holds the packages as they were on disk, the modules of the working directory that define the cells'
models and quantizers (`mine:PAIR`), and snapshot.json: the commit and the changes since.
"""

import hashlib
import json
import secrets
import shutil
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from suite.run.atomic import write_bytes, write_json
from suite.run.provenance import CODE, SNAPSHOT, code_version

PACKAGES = ("quantizers", "models", "suite", "launch", "analysis")
SUFFIXES = CODE | {".yaml", ".json"}
if TYPE_CHECKING:  # pydantic comes with it
    from suite.recipe.cell import Cell


def take(grid_dir: Path, cells: "Collection[Cell]" = ()) -> str:
    """Copies the code into the grid's directory, unless it is already there; returns its name, 12 hex digits."""
    files = _files() | _users_modules(cells)
    folder = folder_of(grid_dir, _name(files))
    if not folder.exists():
        part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        for path, content in files.items():
            write_bytes(part / path, content)
        write_json(part / SNAPSHOT, code_version())
        with suppress(OSError):  # another launch was faster
            part.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
    return folder.name


def name(cells: "Collection[Cell]" = ()) -> str:
    """Hash of the current code and its git version."""
    return _name(_files() | _users_modules(cells))


def _name(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256(json.dumps(code_version()).encode())
    for path, content in files.items():
        digest.update(f"{path} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def folder_of(grid_dir: Path, code: str) -> Path:
    """Folder of the code with that hash."""
    return grid_dir.resolve() / "code" / code


def _files() -> dict[str, bytes]:
    source = Path(__file__).parent.parent
    return {
        str(path.relative_to(source)): path.read_bytes()
        for package in PACKAGES
        for path in sorted((source / package).rglob("*"))
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts
    }


def _users_modules(cells: "Collection[Cell]") -> dict[str, bytes]:
    """Modules of the working directory that define the cells' models and quantizers. No installed packages."""
    named = {name for cell in cells for name in (cell.model, cell.quantizer)}
    named |= {cell.quantization.inputs.quantizer for cell in cells if cell.quantization.inputs is not None}
    if not (own := [name for name in named if ":" in name]):
        return {}
    from quantizers.names import module_of

    for name in own:
        module_of(name)
    here = Path.cwd()
    loaded = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    beside = {path.relative_to(here): path for path in loaded if path.is_relative_to(here) and path.suffix == ".py"}
    return {
        str(relative): path.read_bytes()
        for relative, path in sorted(beside.items())
        if relative.parts[0] not in PACKAGES and "site-packages" not in relative.parts
    }
