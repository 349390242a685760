"""Where the numbers of a report are from: facts about its runs, each with how many cells it holds for."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd

from analysis.runs.backgrounds import Background, CellKey
from analysis.runs.frame import names, natural_key, shortened, status_of

MADE_WITH = ("proxbench", "numpy", "scipy", "statsmodels", "scikit-posthocs", "pandas", "matplotlib")
Backgrounds = Mapping[CellKey, Background]


@dataclass(frozen=True)
class Source:
    """Where the runs were read, and the command that did; `is_folder` if from run directories."""

    place: str
    command: str
    is_folder: bool


def source(grid: str | None, place: Path | str, against: str | None) -> Source:
    """Of a folder of runs, or of a store's address; the file written to is no part of the command."""
    is_folder = isinstance(place, Path)
    shown = without_password(str(place))
    where = ["--from-runs", "--root", shown] if is_folder else ["--tracking-uri", shown]
    words = ["report", *([grid] if grid else []), *where, *(["--against", against] if against else [])]
    return Source(shown, f"python -m analysis {shlex.join(words)}", is_folder)


def facts(frame: pd.DataFrame, backgrounds: Backgrounds) -> list[tuple[str, str]]:
    """Name and value of what is known of the cells that ran; `a (30 cells), b (6 cells)` where they differ."""
    ran = frame[frame["git_commit"] != ""]
    own = [backgrounds[key].facts for key in keys_of(ran)]
    names = dict.fromkeys(name for fact in own for name in fact)
    recorded = {name: counted(fact.get(name, "not recorded") for fact in own) for name in names}
    checksums = {
        f"data checksum, {dataset}": counted(part["data_checksum"].replace("", "not recorded"))
        for dataset, part in ran.groupby("dataset")
    }
    jobs = sorted(set(ran["job_id"]) - {""}, key=natural_key)
    found = {
        "code, git commit": counted(ran["git_commit"]) or "no cell has run",
        **recorded,
        **checksums,
        "jobs": f"{len(jobs)}: {shortened(jobs, 10)}" if jobs else "",
        "time of the done runs": _times(frame, backgrounds),
    }
    return [(name, value) for name, value in found.items() if value]


def keys_of(frame: pd.DataFrame) -> list[CellKey]:
    """What backgrounds are found by, row by row."""
    return [(str(grid), str(cell_id)) for grid, cell_id in zip(frame["grid"], frame["cell_id"], strict=True)]


def counted(values: Iterable[object]) -> str:
    """The value if it is one; else each with its number of cells, the most frequent first."""
    counts = Counter(str(value) for value in values).most_common()
    if len(counts) < 2:  # noqa: PLR2004
        return "".join(value for value, _ in counts)
    return shortened((f"{value} ({number} cells)" for value, number in counts), 10)


def _times(frame: pd.DataFrame, backgrounds: Backgrounds) -> str:
    times = [own.times for key in keys_of(frame) if (own := backgrounds[key]).times]
    if not times:
        return ""
    first, last = min(begin for begin, _ in times), max(end for _, end in times)
    return f"first record {_utc(first)}, last result {_utc(last)}"


def _utc(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"


def made_with() -> str:
    """The versions of what computed and drew: `proxbench 0.1.0, numpy 2.4.6, ...`."""
    return ", ".join(f"{name} {_version(name)}" for name in MADE_WITH)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def without_password(uri: str) -> str:
    """A store's address that may be shown: `http://user:secret@host` as `http://host`."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".partition("?")[0]


def unfinished(frame: pd.DataFrame, backgrounds: Backgrounds) -> list[tuple[str, str, str]]:
    """Name, state and reason of each cell that has no result."""
    rest = frame[frame["state"] != "done"]
    reasons = [backgrounds[key].reason for key in keys_of(rest)]
    return list(zip(names(rest), status_of(rest).astype(str), reasons, strict=True)) if len(rest) else []
