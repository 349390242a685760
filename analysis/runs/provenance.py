"""Origin of a report's numbers: facts about its runs, each with the number of cells it applies to."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.runs.frame import Results, names, natural_key, shortened, status_of

CellKey = tuple[str, str]
"""Grid and cell id."""


@dataclass(frozen=True)
class Background:
    """Further facts about one cell.

    `recipe` holds the params that suite.run.mlflow_replica logs to MLflow, as text: `training.epochs`. `facts` is the
    content of provenance.json under readable names; empty for a store. `reason` says why the cell failed, else "".
    `times` of a done run are the first record's and the end's, in unix seconds.
    """

    recipe: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    times: tuple[float, float] | None = None


def facts_of(provenance: Mapping[str, Any]) -> dict[str, str]:
    """A provenance.json under readable names, without absent values and without the host's name."""
    code = provenance.get("code") or {}
    changed = "changed by hand" if code.get("diff") or code.get("untracked") else "as committed"
    found = {
        "code": changed if code.get("commit") else "",
        "optimizer's step": provenance.get("optimizer_step"),
        "platform": provenance.get("platform"),
        "Python": provenance.get("python"),
        **(provenance.get("packages") or {}),
    }
    return {name: str(value) for name, value in found.items() if value not in {None, ""}}


MADE_WITH = ("proxbench", "numpy", "scipy", "pandas", "matplotlib")
Backgrounds = Mapping[CellKey, Background]


@dataclass(frozen=True)
class Source:
    """Where the runs were read, and the command that reads them again; `is_folder`: from run directories."""

    place: str
    command: str
    is_folder: bool


def source(grid: str | None, place: Sequence[Path] | str, against: str | None) -> Source:
    """The source for run folders or a store's address; the command omits the output file."""
    is_folder = not isinstance(place, str)
    shown = without_password(place) if isinstance(place, str) else ", ".join(map(str, place))
    where = (
        ["--tracking-uri", shown] if isinstance(place, str) else [w for root in place for w in ("--root", str(root))]
    )
    words = ["report", *([grid] if grid else []), *where, *(["--against", against] if against else [])]
    return Source(shown, f"python -m analysis {shlex.join(words)}", is_folder)


def facts(results: Results, backgrounds: Backgrounds) -> list[tuple[str, str]]:
    """(name, value) of the known facts about the cells that ran; `a (30 cells), b (6 cells)` where cells differ."""
    frame = results.frame
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
        "code, digest of what ran": counted(ran["code_digest"].replace("", "not recorded")),
        **{words: counted(ran[column].replace("", "not recorded")) for column, words in _MACHINE.items()},
        **recorded,
        "device-hours by method": _hours(ran),
        "tuning": _tuning(results),
        **checksums,
        "jobs": f"{len(jobs)}: {shortened(jobs, 10)}" if jobs else "",
        "time of the done runs": _times(frame, backgrounds),
    }
    return [(name, value) for name, value in found.items() if value]


_MACHINE = {
    "device": "device",
    "num_processes": "processes",
    "num_threads": "threads of each process",
    "determinism": "determinism",
}


def _hours(ran: pd.DataFrame) -> str:
    """`bc 0.4 (8 runs), bnn++ 0.5 (8 runs)`: sum over attempts of hours times processes."""
    found = [(str(name), own["device_hours"].sum(), len(own)) for name, own in ran.groupby("quantizer", sort=True)]
    return shortened((f"{name} {hours:.2g} ({number} runs)" for name, hours, number in found), 40)


def _tuning(results: Results) -> str:
    """Tuning budgets and hours, or a note that nothing was tuned."""
    budgets = [budget for declared in results.declared.values() for budget in declared.tuning.values()]
    if not budgets:
        return "none declared: every run has the values of its grid file"
    told = counted(f"{budget}, {budget.epochs or 'unknown'} epochs" for budget in budgets).replace("cells", "methods")
    hours = sum(own.device_hours for own in results.tuning)
    return told + (f"; {hours:.2g} device-hours in all" if hours else "")


def keys_of(frame: pd.DataFrame) -> list[CellKey]:
    """Each row's key into the backgrounds."""
    return [(str(grid), str(cell_id)) for grid, cell_id in zip(frame["grid"], frame["cell_id"], strict=True)]


def counted(values: Iterable[object]) -> str:
    """The value if all agree; else each value with its number of cells, the most frequent first."""
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
    """Versions of the packages that computed and drew: `proxbench 0.1.0, numpy 2.4.6, ...`."""
    return ", ".join(f"{name} {_version(name)}" for name in MADE_WITH)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def without_password(uri: str) -> str:
    """A store's address without credentials: `http://user:secret@host` as `http://host`."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".partition("?")[0]


def unfinished(frame: pd.DataFrame, backgrounds: Backgrounds) -> list[tuple[str, str, str]]:
    """Name, state and reason of each cell without a result."""
    rest = frame[frame["state"] != "done"]
    reasons = [backgrounds[key].reason for key in keys_of(rest)]
    return list(zip(names(rest), status_of(rest).astype(str), reasons, strict=True)) if len(rest) else []
