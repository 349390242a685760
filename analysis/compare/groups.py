"""Summary of one quantizer's cells on one model, as plain values: the basis of a table entry.

A grid of 10,000 cells has a thousand such groups, and each access to a frame would cost a millisecond.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BYTES_PER_FLOAT, BITS_PER_BYTE = 4, 8


@dataclass(frozen=True)
class Group:
    """Results of the cells by seed, and why some have none. Accuracies are fractions.

    `settings` are the cells' (task, init) pairs; an fp cell's can differ from the block's. `digests` (of the tested
    networks) and `runs` (run directories or MLflow ids of the done cells) are by seed. `averaged` are the ids of cells
    whose curves may be averaged (done, one recipe, one per seed), `single` all other ids. `num_bytes` is the size at
    one bit per binary parameter and float32 for the others; None if not recorded or if cells differ. `conflict` gives
    the reason if no mean may be taken.
    """

    seeds: frozenset[int] = frozenset()
    settings: frozenset[tuple[str, str]] = frozenset()
    hard: Mapping[int, float] = field(default_factory=dict)
    soft: Mapping[int, float] = field(default_factory=dict)
    digests: Mapping[int, str] = field(default_factory=dict)
    runs: Mapping[int, str] = field(default_factory=dict)
    why_not: Mapping[str, int] = field(default_factory=dict)
    averaged: tuple[str, ...] = ()
    single: tuple[str, ...] = ()
    num_bytes: float | None = None
    conflict: str | None = None

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "Group":
        """The group of these rows of a frame with columns frame.SCHEMA and `status`."""
        measured = [row for row in rows if row["state"] == "done" and not math.isnan(row["top1_hard"])]
        reasons = [row["status"] for row in rows if row["state"] != "done" or math.isnan(row["top1_hard"])]
        conflict = _conflict(rows)
        averaged = tuple(row["cell_id"] for row in rows if row["state"] == "done" and conflict is None)
        return cls(
            seeds=frozenset(row["seed"] for row in rows),
            settings=frozenset((row["task"], row["init"]) for row in rows),
            hard={row["seed"]: row["top1_hard"] for row in measured},
            soft={row["seed"]: row["top1_soft"] for row in measured if not math.isnan(row["top1_soft"])},
            digests={row["seed"]: row["weights_sha256"] for row in measured if row["weights_sha256"]},
            runs={row["seed"]: row["run"] for row in measured},
            why_not=Counter("done without accuracy" if reason == "done" else reason for reason in reasons),
            averaged=averaged,
            single=tuple(row["cell_id"] for row in rows if row["cell_id"] not in averaged),
            num_bytes=_num_bytes(measured),
            conflict=conflict,
        )

    @property
    def usable(self) -> Mapping[int, float]:
        """Hard accuracies that may be averaged; empty if there is a conflict."""
        return {} if self.conflict else self.hard

    @property
    def mean(self) -> float | None:
        """Mean hard accuracy over the seeds; None without seeds."""
        return float(np.mean(list(self.usable.values()))) if self.usable else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation (ddof 1) of the hard accuracies; None below two seeds."""
        return float(np.std(list(self.usable.values()), ddof=1)) if len(self.usable) > 1 else None

    @property
    def soft_mean(self) -> float | None:
        """Mean soft accuracy over the seeds that recorded it."""
        return float(np.mean(list(self.soft.values()))) if self.usable and self.soft else None

    @property
    def gap_mean(self) -> float | None:
        """Mean of soft minus hard accuracy over the seeds that recorded both."""
        gaps = [value - self.usable[seed] for seed, value in self.soft.items() if seed in self.usable]
        return float(np.mean(gaps)) if gaps else None

    def missing(self, num_seeds: int) -> tuple[tuple[str, int], ...]:
        """(reason, count) of the model's num_seeds seeds that have no measurement; empty if the group has no cells."""
        if not self.seeds:
            return ()
        reasons = {**self.why_not, "not in the store": num_seeds - len(self.seeds)}
        return tuple(sorted((reason, count) for reason, count in reasons.items() if count))


def pairs(candidate: Group, baseline: Group) -> dict[int, float]:
    """Seed -> candidate minus baseline, for the seeds that both have measured, ascending."""
    ours, theirs = candidate.usable, baseline.usable
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def num_identical(one: Group, other: Group) -> int:
    """Number of seeds for which both trained the same network, by digest."""
    return sum(other.digests.get(seed) == digest for seed, digest in one.digests.items())


def _num_bytes(measured: Sequence[Mapping[str, Any]]) -> float | None:
    sizes = {
        row["num_binary_parameters"] / BITS_PER_BYTE + BYTES_PER_FLOAT * row["num_full_precision_parameters"]
        for row in measured
    }
    size = sizes.pop() if len(sizes) == 1 else math.nan
    return None if math.isnan(size) else float(size)


def _conflict(rows: Sequence[Mapping[str, Any]]) -> str | None:
    num_recipes = len({row["recipe_id"] for row in rows})
    if num_recipes > 1:
        return f"{num_recipes} recipes mixed"
    return "several cells per seed" if len({row["seed"] for row in rows}) < len(rows) else None
