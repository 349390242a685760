"""The record of launches, GRID/launches.jsonl, one line each. Later commands take their defaults from it."""

import getpass
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from launch.plan import Standing
from suite.run.atomic import as_json, write_once


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without this user
        return str(os.getuid())


_SECRET = re.compile(r"""(?<=://)[^/@\s"\\]+@""")


@dataclass(frozen=True)
class Launch:
    """One launch. `resources`: its workers' requests to SLURM, by shape; `flags`: as given on the command line.

    `command`: grid or retry; `grid`: the name or path that was launched; `text`: the file's content; `code`: the
    snapshot's folder; `declared`: what the grid declares to analysis (see suite.recipe.grid.Grid.declared); `choices`:
    the argument of --choices, or empty. Times are unix seconds.
    """

    command: str
    grid: str
    text: str
    overrides: tuple[str, ...]
    place: Literal["local", "slurm"]
    cluster: str | None
    flags: dict[str, Any]
    resources: dict[str, dict[str, Any]]
    data_dir: str
    tracking_uri: str
    code: str
    train_options: tuple[str, ...] = ()
    on_finish: str | None = None
    num_cells: int = 0
    declared: dict[str, Any] = field(default_factory=dict)
    choices: str = ""
    argv: tuple[str, ...] = field(default_factory=lambda: tuple(sys.argv))
    cwd: str = field(default_factory=os.getcwd)
    user: str = field(default_factory=_user)
    host: str = field(default_factory=platform.node)
    time: float = field(default_factory=time.time)


def remember(grid_dir: Path, launch: Launch) -> None:
    """Appends the launch, with user names and passwords removed from URLs."""
    path = grid_dir / "launches.jsonl"
    line = _SECRET.sub("", json.dumps(asdict(launch)))
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * is_torn + line + "\n")
        file.flush()
        os.fsync(file.fileno())


def launches(grid_dir: Path) -> list[Launch]:
    """All launches, oldest first. Lines torn by a killed launcher are skipped."""
    path = grid_dir / "launches.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            raw = json.loads(line)
        except ValueError:
            continue
        known = {each.name for each in fields(Launch)}
        raw = {key: value for key, value in raw.items() if key in known}
        raw |= {key: tuple(raw[key]) for key in ("overrides", "train_options", "argv")}
        found.append(Launch(**raw))
    return found


def last(grid_dir: Path, place: str | None = None) -> Launch | None:
    """The newest launch, or the newest one to `place` if given; None before the first."""
    return next((each for each in reversed(launches(grid_dir)) if place in {None, each.place}), None)


def on_finish(grid_dir: Path, rows: Sequence[Standing]) -> None:
    """Runs the newest launch's --on-finish command in a shell, once per launch; environment variables name the grid."""
    launch = last(grid_dir)
    if launch is None or launch.on_finish is None:
        return
    path = grid_dir / f"finished-{launch.time:.6f}.json"
    if path.exists() or not write_once(path, as_json({"time": time.time()})):
        return
    from launch.view import summary

    variables = {"PROXBENCH_GRID": str(grid_dir), "PROXBENCH_SUMMARY": summary(rows)}
    subprocess.run(launch.on_finish, shell=True, env=os.environ | variables, cwd=grid_dir, check=False)  # noqa: S602
