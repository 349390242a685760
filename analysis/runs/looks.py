"""GRID/looks.jsonl records each look at results before all runs were done; tables and reports mention them.

A p is valid only if the number of seeds did not depend on the results. Seeing results early can influence how many
seeds are added, so later tables state the number of early looks.
"""

import hashlib
import json
import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from analysis.runs.frame import shortened

FILE = "looks.jsonl"


def record(grid_dir: Path, done: Collection[str], num_cells: int, command: str) -> None:
    """Records a look at the results of the done cells (ids), once per distinct set.

    Does nothing if the folder cannot be written.
    """
    digest = _digest(done)
    if any(look["digest"] == digest for look in _read(grid_dir)):
        return
    line = json.dumps(
        {"time": time.time(), "command": command, "num_done": len(done), "num_cells": num_cells, "digest": digest}
    )
    with suppress(OSError), (grid_dir / FILE).open("a", encoding="utf-8") as file:
        file.write(line + os.linesep)


def remark(grid_dir: Path, done: Collection[str]) -> str:
    """One line on earlier looks, made before all cells were done and at a set other than `done` (ids); "" if none."""
    looks = [look for look in _read(grid_dir) if look["digest"] != _digest(done)]
    early = [look for look in looks if look["num_done"] < look["num_cells"]]
    if not early:
        return ""
    times = f"{len(early)} time{'s' * (len(early) > 1)}"
    return (
        f"{grid_dir.name}: results were looked at {times} before all {early[-1]['num_cells']} cells were done "
        f"({shortened(look['num_done'] for look in early)} done): p is valid only if the number of seeds did not "
        "depend on what was seen"
    )


def _digest(done: Collection[str]) -> str:
    return hashlib.sha256("".join(sorted(done)).encode()).hexdigest()[:16]


def _read(grid_dir: Path) -> list[dict[str, Any]]:
    path = grid_dir / FILE
    found = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found
