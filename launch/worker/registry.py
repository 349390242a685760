"""The workers of a grid, GRID/workers/0001/ etc., and the maximum number of them at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.run.atomic import read_json, write_json
from suite.run.attempt import Attempt, enrol, newest_number

RETIRED = "retired"
"""Start of the reason of a worker that left a machine because it seemed faulty."""


@dataclass(frozen=True)
class Worker:
    """A worker, from its record. Times are unix seconds; `ended` is None while it works."""

    number: int
    host: str
    job_id: str
    shape: str
    num_slots: int
    num_gpus: int
    made: float
    ended: float | None
    last_seen: float
    reason: str
    is_live: bool

    @property
    def gpu_hours(self) -> float:
        """GPU-hours that it used; plain hours if it has no GPUs."""
        return ((self.ended or self.last_seen) - self.made) / 3600 * max(self.num_gpus, 1)


def register(grid_dir: Path, job_id: str, **facts: Any) -> Attempt:  # noqa: ANN401  (anything YAML holds)
    """Creates this worker's record."""
    return enrol(_folder(grid_dir), job_id, **facts)


def workers(grid_dir: Path) -> list[Worker]:
    """All workers that ever registered, in order."""
    return [_read(Attempt(_folder(grid_dir), number)) for number in range(1, newest_number(_folder(grid_dir)) + 1)]


def live_numbers(grid_dir: Path, known_gone: set[int] | None = None) -> list[int]:
    """Numbers of the live workers, in order. Adds ended ones to `known_gone`, whose workers are not checked again."""
    gone = set() if known_gone is None else known_gone
    numbers = [each for each in range(1, newest_number(_folder(grid_dir)) + 1) if each not in gone]
    live = [number for number in numbers if Attempt(_folder(grid_dir), number).is_live()]
    gone |= set(numbers) - set(live)
    return live


def limit(grid_dir: Path) -> int | None:
    """Maximum number of workers at a time; None: no limit."""
    found: int | None = read_json(grid_dir / "scale.json").get("workers")
    return found


def set_limit(grid_dir: Path, number: int | None) -> None:
    """Sets the limit; live workers beyond it save and exit."""
    write_json(grid_dir / "scale.json", {"workers": number})


def sick_nodes(found: Sequence[Worker]) -> list[str]:
    """Nodes that workers retired from."""
    return sorted({each.host for each in found if each.reason.startswith(RETIRED)})


def _read(record: Attempt) -> Worker:
    facts, end = record.facts, record.end() or {}
    made = float(facts.get("made", 0.0))
    return Worker(
        record.number,
        str(facts.get("node") or facts.get("host", "")),
        record.job_id,
        str(facts.get("shape", "")),
        int(facts.get("num_slots", 1)),
        int(facts.get("num_gpus", 0)),
        made,
        end.get("time"),
        max(record.last_seen(), made),
        str(end.get("reason", "")),
        record.is_live(),
    )


def _folder(grid_dir: Path) -> Path:
    return grid_dir / "workers"
