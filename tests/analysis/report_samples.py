"""Sample reports for the tests: their runs and their page."""

from functools import cache

import numpy as np
from analysis_samples import example, results_of

from analysis.compare.table import Table, tabulate
from analysis.render.report import report
from analysis.runs import curves
from analysis.runs.provenance import Background, Source, keys_of

SOURCE = Source("runs", "python -m analysis report --root runs", is_folder=True)
RECIPE = {"training.epochs": "30", "training.batch_size": "64", "training.optimizer": "adamw"}


def accuracies(shift: float, num_seeds: int = 10) -> list[float]:
    """About 0.5 + shift; the differences between two shifts vary slightly by seed."""
    noise = np.random.default_rng(round(1000 * shift)).normal(0, 0.005, num_seeds)
    return [0.5 + shift + float(value) for value in noise]


def page_of(*groups: list[dict[str, object]], table: Table | None = None) -> str:
    results = results_of(*groups, margin_points=0.5) if groups else example()
    frame = results.frame
    backgrounds = {
        key: Background(RECIPE, {"torch": "2.9.0"}, "CUDA out of memory" if state == "failed" else "")
        for key, state in zip(keys_of(frame), frame["state"], strict=True)
    }
    return report(results, table or tabulate(results), curves.curves_of([]), backgrounds, SOURCE)


@cache
def example_page() -> str:
    """The report page of analysis_samples.example()."""
    return page_of()
