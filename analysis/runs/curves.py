"""Metrics by epoch of a frame's cells, one row per cell, epoch and metric, from run directories.

`analysis.runs.store.histories` gives the same records from a store; `curves_of` makes the frame.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from suite.run.directory import RunDir
from suite.run.journal import read_metrics

SCHEMA = {
    "grid": "string",
    "cell_id": "string",
    "epoch": "int64",  # from 1
    "metric": "string",
    "value": "float64",
}
ACCURACY, MU = "val/top1", "mu"
FLIP_RATE, MASKED_SHARE, LATENT_GAP = "health/flip_rate", "health/masked_share", "health/latent_gap"
METRICS = (ACCURACY, FLIP_RATE, MASKED_SHARE, LATENT_GAP, MU)
"""Metrics that the figures draw. Validation accuracy is of hardened weights; mu is the last one of its epoch."""

Record = tuple[str, str, int, str, float]
"""Grid, cell id, epoch, metric, value."""
Curves = Mapping[tuple[str, str, str], "pd.Series[float]"]
"""(grid, cell id, metric) -> values by epoch."""


def from_folders(frame: pd.DataFrame) -> pd.DataFrame:
    """METRICS from the journals of a frame that `runs.folders` loaded; a cell without a journal has no rows."""
    return curves_of(
        (grid, cell_id, epoch, metric, value)
        for grid, cell_id, run in zip(frame["grid"], frame["cell_id"], frame["run"], strict=True)
        for epoch, metrics in read_metrics(RunDir(Path(run)).journal).items()
        for metric, value in metrics.items()
        if metric in METRICS
    )


def curves_of(records: Iterable[Record]) -> pd.DataFrame:
    """The records as a sorted frame with columns SCHEMA; the last record for a cell, epoch and metric wins."""
    keys = ["grid", "cell_id", "metric", "epoch"]
    curves = pd.DataFrame(list(records), columns=list(SCHEMA)).astype(SCHEMA)
    return curves.drop_duplicates(keys, keep="last").sort_values(keys).reset_index(drop=True)


def by_cell(curves: pd.DataFrame) -> Curves:
    """Each cell's values of each metric, by epoch. Built once, because figures look up thousands of them."""
    keys = ["grid", "cell_id", "metric"]
    groups = curves.groupby(keys, sort=False)
    # str(): pandas types the keys as Hashable.
    return {
        (str(grid), str(cell_id), str(name)): own.set_index("epoch")["value"] for (grid, cell_id, name), own in groups
    }


def by_epoch(curves: Curves, grid: str, cell_ids: Iterable[str], metric: str) -> pd.DataFrame:
    """Values of one metric: epochs (ascending) by the cells that recorded it; NaN where not recorded."""
    own = {cell_id: curves[grid, cell_id, metric] for cell_id in cell_ids if (grid, cell_id, metric) in curves}
    return pd.DataFrame(own).sort_index()
