"""The state and cost of a grid, from its run directories and workers."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from launch.plan import Standing
from launch.worker.registry import Worker
from suite.run.atomic import read_json
from suite.run.directory import Planned, RunDir


def standings(
    grid_dir: Path, plan: Mapping[str, Planned], known: Mapping[str, Standing] | None = None
) -> list[Standing]:
    """Every planned cell with its state, in order. Cells in `known` will not change and are not read again."""
    known = known or {}
    return [known.get(cell_id) or standing(RunDir(grid_dir / cell_id), each) for cell_id, each in plan.items()]


def standing(run: RunDir, planned: Planned) -> Standing:
    """The true state of one cell, whose run directory need not exist."""
    state = run.state()
    if state.state == "running" and not run.is_live():
        state = run.state()  # its worker may have settled it since it was read
        if state.state == "running":
            state = replace(state, state="preempted", reason="its worker is gone")
    return Standing(planned, state)


@dataclass(frozen=True)
class Cost:
    """Worker-hours (GPU-hours if workers have GPUs) spent and, at the same rate, to go; `eta` is in unix seconds."""

    unit: str
    spent: float
    to_go: float | None
    eta: float | None


class Later(NamedTuple):
    """The requested cells that open choices will add to the plan, and their epochs."""

    num_cells: int
    num_epochs: int


def later(grid_dir: Path, rows: Sequence[Standing]) -> Later:
    """What will follow the trials. From what the launch wrote: reading the grid itself would take seconds."""
    chosen = {row.planned.tuned for row in rows if not row.cell.trial}
    written = read_json(grid_dir / "tuning.json")
    cells, epochs = (
        sum(number for name, number in written.get(key, {}).items() if name not in chosen)
        for key in ("num_later", "num_later_epochs")
    )
    return Later(cells, epochs)


def cost(rows: Sequence[Standing], workers: Sequence[Worker], num_later_epochs: int = 0) -> Cost:
    """Estimates the cost from the epochs trained so far: exact only if all epochs cost the same.

    `num_later_epochs`: of cells that are not planned yet.
    """
    spent = sum(worker.gpu_hours for worker in workers)
    total = sum(row.cell.training.epochs for row in rows if row.state.state not in {"failed", "cancelled", "planned"})
    total += num_later_epochs
    trained = sum(_epochs(row) for row in rows)
    live = sum(max(worker.num_gpus, 1) for worker in workers if worker.is_live)
    to_go = spent * (total - trained) / trained if trained else None
    eta = time.time() + 3600 * to_go / live if to_go and live else None
    return Cost("GPU-hours" if any(worker.num_gpus for worker in workers) else "worker-hours", spent, to_go, eta)


def _epochs(row: Standing) -> int:
    if row.state.state in {"failed", "cancelled", "planned"}:
        return 0
    return row.cell.training.epochs if row.state.state == "done" else row.state.epoch
