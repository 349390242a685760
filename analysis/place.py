"""Where a command's runs are, and how it reads them. Heavy imports wait until something is read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from suite.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.compare.published import Publication
    from analysis.compare.table import Table
    from analysis.runs.frame import Results
    from analysis.runs.provenance import Background


class Place:
    """The run directories under some roots, or an MLflow store. Every command reads through it.

    roots: None: PROXBENCH_ROOT, else ./runs. tracking_uri: None: read the run directories.
    """

    def __init__(self, roots: list[Path] | None, tracking_uri: str | None) -> None:
        self.roots = roots or [Path(os.environ.get("PROXBENCH_ROOT") or "runs")]
        self.uri = tracking_uri

    def results(self, grid: str | None, *, strict: bool) -> "Results":
        """The cells. With `strict`, raises UserError if findings put numbers in doubt."""
        if self.uri is not None:
            from analysis.runs import store

            found = store.load(self.uri, grid)
        else:
            from analysis.runs import folders

            found = folders.load(self.roots, grid)
        if strict and found.doubts:
            raise UserError(f"--strict: {len(found.doubts)} findings put numbers in doubt: {'; '.join(found.doubts)}")
        return found

    def backgrounds(self, results: "Results") -> "Mapping[tuple[str, str], Background]":
        """Recipes, provenance and failure reasons, by grid and cell id."""
        from analysis.runs import folders, store

        return folders.backgrounds(results.frame) if self.uri is None else store.backgrounds(self.uri, results.frame)

    def curves(self, results: "Results") -> "pd.DataFrame":
        """Metrics by epoch."""
        from analysis.runs import curves, store

        if self.uri is None:
            return curves.from_folders(results.frame)
        return curves.curves_of(store.histories(self.uri, results.frame, curves.METRICS))

    def look(self, results: "Results", command: str) -> None:
        """Records in each grid's folder that its results were looked at. Does nothing for a store."""
        from analysis.runs.looks import record

        if self.uri is not None:
            return
        for grid, cells in results.frame.groupby("grid"):
            done = cells[cells["state"] == "done"]["cell_id"].tolist()
            for root in self.roots:
                if (root / str(grid)).is_dir():
                    record(root / str(grid), done, len(cells), command)

    def table(
        self,
        results: "Results",
        publication: "Publication | None" = None,
        *,
        completions: bool = False,
        images: bool = False,
    ) -> "Table":
        """The table of comparisons."""
        from analysis.compare import family, table
        from analysis.runs import folders

        wanted = family.completions() if completions else None
        recipes = None
        if publication is not None:
            recipes = {key: background.recipe for key, background in self.backgrounds(results).items()}
        right = folders.right if images and self.uri is None else None
        return table.tabulate(results, wanted, publication, recipes, right)
