"""The code of a launch, kept beside its runs: a job that waited for days runs what was submitted, not a later edit.

GRID/code/<hash>/ holds the packages as they lay on disk, and snapshot.json: the commit, and what differs from it.
"""

import hashlib
import json
import shutil
from pathlib import Path

from suite.files import write_bytes, write_json
from suite.provenance import SNAPSHOT, code_version

PACKAGES = ("quantizers", "models", "suite", "launch", "analysis")
SUFFIXES = {".py", ".yaml", ".json", ".h", ".cpp", ".cu"}


def take(grid_dir: Path) -> str:
    """Copies the code into the grid's directory, unless it lies there already; returns its name, 12 hex digits."""
    folder = folder_of(grid_dir, name())
    if not (folder / SNAPSHOT).exists():  # written last: a copy that was broken off is made again
        shutil.rmtree(folder, ignore_errors=True)
        for path, content in _files().items():
            write_bytes(folder / path, content)
        write_json(folder / SNAPSHOT, code_version())
    return folder.name


def name() -> str:
    """Hash of the code as it is now, and of what git says of it."""
    digest = hashlib.sha256(json.dumps(code_version()).encode())
    for path, content in _files().items():
        digest.update(f"{path} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def folder_of(grid_dir: Path, code: str) -> Path:
    """Where the code of that hash lies."""
    return grid_dir.resolve() / "code" / code


def _files() -> dict[str, bytes]:
    source = Path(__file__).parent.parent
    return {
        str(path.relative_to(source)): path.read_bytes()
        for package in PACKAGES
        for path in sorted((source / package).rglob("*"))
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts
    }
