"""Trains the first steps of one cell in this process."""

import logging
import sys
import tempfile
from pathlib import Path

from suite.recipe.cell import Cell
from suite.recipe.settings import Execution
from suite.run.directory import RunDir
from suite.train import first_steps


def debug(cell: Cell, execution: Execution, data_dir: Path, max_steps: int) -> None:
    """Trains `max_steps` steps and prints their losses; nothing is kept.

    A finetune cell starts from fresh weights here, because its parent's may not exist yet.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    orphan = cell.model_copy(update={"parent": None})
    print(cell.name)
    with tempfile.TemporaryDirectory() as folder:
        first_steps(RunDir.create(Path(folder) / orphan.id, orphan), data_dir, max_steps, execution)
