"""Writes that a crash cannot tear: a reader sees the old file or the new one, whole."""

import json
import os
from pathlib import Path
from typing import Any

_TEMPORARY = ".tmp"


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Writes beside the file, flushes to the disk, renames over it, flushes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def clean(folder: Path) -> None:
    """Removes what writers that were killed left half-written. Nobody else may be writing there."""
    for temporary in folder.glob(f".*{_TEMPORARY}"):
        temporary.unlink()


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401  (anything JSON holds)
    """As write_bytes, indented for people."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())
