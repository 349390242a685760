"""Many runs, from run directories or an MLflow store -> one tidy frame -> comparisons -> tables, figures, a report.

In notebooks, use `load` and `to_rliable`; otherwise see `python -m analysis --help`. Read `compare/comparison.py`
first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # keeps --help fast
    import numpy as np
    import numpy.typing as npt
    import pandas as pd


def load(root: str | Path | Sequence[str | Path] = "runs", grid: str | None = None) -> "pd.DataFrame":
    """Cells of one grid, or of every grid under the roots, as a tidy frame: one row per cell, columns `frame.SCHEMA`.

        import analysis
        cells = analysis.load("runs", "digits")
        cells.groupby(["model", "quantizer"])["top1_hard"].agg(["mean", "std", "count"])

    Accuracies are fractions, NaN until a cell is done. `state`, `cause`, `recipe_id`, `code_digest` and `run` (the run
    directory) give each number's origin.

    Raises:
        suite.errors.UserError: no such folder, unknown grid, no cells, or a file of a run that cannot be read.
    """
    from analysis.runs import folders

    roots = [root] if isinstance(root, str | Path) else list(root)
    return folders.load([Path(each) for each in roots], grid).frame


def to_rliable(frame: "pd.DataFrame", metric: str = "top1_hard") -> "dict[str, npt.NDArray[np.float64]]":
    """Scores in rliable's format: method -> float64 array [runs x tasks].

    Tasks are the (data set, model) pairs, such as `digits/resnet8`, in natural order. Runs are the seeds that every
    method has measured on every task, ascending. `frame` comes from `load` and holds one grid, task and init.

    Raises:
        ValueError: several cells for one method, task and seed; or no seed common to all (the message lists what is
            missing).
    """
    from analysis.runs.frame import natural_key

    done = frame[frame[metric].notna()]
    tasks = done["dataset"] + "/" + done["model"]
    wide = done.assign(task=tasks)
    if wide.duplicated(["quantizer", "task", "seed"]).any():
        raise ValueError("several cells for one method, task and seed; choose one grid, task and init")
    scores = wide.pivot_table(index=["quantizer", "seed"], columns="task", values=metric)
    scores = scores[sorted(scores.columns, key=natural_key)]
    methods = sorted(set(frame["quantizer"]), key=natural_key)
    complete = scores.dropna()
    seeds = {method: set(complete.loc[method].index) if method in complete.index else set() for method in methods}
    common = sorted(set.intersection(*seeds.values())) if seeds else []
    if not common:
        lacking = ", ".join(f"{method}: {sorted(own) or 'none'}" for method, own in seeds.items())
        raise ValueError(f"no seed is measured by all methods on all tasks; complete seeds are {lacking}")
    return {method: complete.loc[method].loc[common].to_numpy(dtype="float64") for method in methods}
