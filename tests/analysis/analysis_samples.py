"""Frames of cells for the analysis tests."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from analysis.runs.frame import SCHEMA, Declared, Results, results

NAN = float("nan")


def cells_of(quantizer: str, accuracies: Sequence[float | str], **columns: object) -> list[dict[str, object]]:
    """One row per seed 0, 1, ...: done with this hard accuracy, or in the given state, such as `failed: oom`."""
    rows = []
    for seed, accuracy in enumerate(accuracies):
        state, _, cause = (accuracy if isinstance(accuracy, str) else "done").partition(": ")
        hard = NAN if isinstance(accuracy, str) else accuracy
        row: dict[str, object] = {
            "grid": "digits",
            "dataset": "digits",
            "model": "resnet20",
            "quantizer": quantizer,
            "task": "bw",
            "init": "scratch",
            "recipe_id": f"recipe of {quantizer}",
            "git_commit": "c0ffee" if state == "done" else "",
            "num_binary_parameters": (0 if quantizer == "fp" else 8000) if state == "done" else NAN,
            "num_full_precision_parameters": (9000 if quantizer == "fp" else 1000) if state == "done" else NAN,
            "code_digest": "c0de" if state == "done" else "",
            "users_digest": "",
            "device": "cpu",
            "num_threads": "1",
            "num_processes": "1",
            "determinism": "strict",
            "device_hours": 0.1 if state == "done" else NAN,
            "job_id": "",
            "data_checksum": "",
            "run": "",
            **columns,
            "seed": seed,
            "state": state,
            "cause": cause,
            "top1_hard": hard,
            "top1_soft": hard + 0.004 if quantizer == "bnn++" else hard,
        }
        row["cell_id"] = "/".join(
            str(row[key]) for key in ("dataset", "model", "quantizer", "recipe_id", "task", "init", "seed")
        )
        row.setdefault("weights_sha256", str(row["cell_id"]) if state == "done" else "")
        rows.append(row)
    return rows


def many(shift: float, num_seeds: int = 8) -> list[float]:
    """Accuracies about 0.5 + shift; each shift has the same spread but another order."""
    return [
        0.5 + shift + (0.01 * ((3 * seed + round(100 * shift)) % num_seeds)) / num_seeds for seed in range(num_seeds)
    ]


def results_of(*groups: list[dict[str, object]], margin_points: float | None = None) -> Results:
    """Results from the rows of the groups; the grid declares bnn++ and this margin."""
    found = results([row for group in groups for row in group])
    declared = {grid: Declared(margin_points=margin_points) for grid in found.declared}
    return replace(found, declared=declared)


def frame_of(*groups: list[dict[str, object]]) -> pd.DataFrame:
    """A frame that follows the schema, from the rows of the groups."""
    rows = [row for group in groups for row in group]
    return pd.DataFrame(rows, columns=list(SCHEMA)).astype(SCHEMA)


def example() -> Results:
    """Two models; some baseline cells failed or wait, one baseline has a single pair, one differs by a constant."""
    return results_of(
        cells_of("fp", [0.9911, 0.9904, 0.9917]),
        cells_of("bc", [0.9702, 0.9738, "failed: oom"]),
        cells_of("bnn", [0.9610, 0.9720, 0.9640]),
        cells_of("bnn+", ["queued", "queued", "running"]),
        cells_of("bnn++", [0.9760, 0.9781, 0.9745]),
        cells_of("bc", [0.9450, "failed: nan", "failed: nan"], model="resnet110"),
        cells_of("bnn", [0.9700, 0.9750, 0.9760], model="resnet110"),
        cells_of("bnn++", [0.9800, 0.9850, 0.9860], model="resnet110"),
    )
