"""What is known of a cell beside its numbers: its recipe, where and when it ran, why it failed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CellKey = tuple[str, str]
"""Grid and cell id."""


@dataclass(frozen=True)
class Background:
    """Of one cell.

    `recipe` are the params that suite.run.mlflow_replica gives MLflow, as text: `training.epochs`. `facts` are what
    provenance.json has, by names for people; a store has none. `reason` says why it failed, "" if it did not.
    `times`, of a done run, are the first record's and the end's, in unix seconds.
    """

    recipe: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    times: tuple[float, float] | None = None


def facts_of(provenance: Mapping[str, Any]) -> dict[str, str]:
    """A provenance.json's content by names for people; what it does not have is left out, and so is the host's name."""
    code = provenance.get("code") or {}
    changed = "changed by hand" if code.get("diff") or code.get("untracked") else "as committed"
    found = {
        "code": changed if code.get("commit") else "",
        "device": provenance.get("device"),
        "processes": provenance.get("num_processes"),
        "threads of each process": provenance.get("num_threads"),
        "optimizer's step": provenance.get("optimizer_step"),
        "platform": provenance.get("platform"),
        "Python": provenance.get("python"),
        **(provenance.get("packages") or {}),
    }
    return {name: str(value) for name, value in found.items() if value not in {None, ""}}
