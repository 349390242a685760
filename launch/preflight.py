"""Checks for problems that would stop every cell, before any job is submitted."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from suite.errors import UserError
from suite.recipe.cell import Cell
from suite.recipe.settings import Execution


class LaunchError(UserError):
    """A launch cannot start."""


def preflight(cells: Sequence[Cell], executions: Mapping[str, Execution], data_dir: Path, console: Console) -> None:
    """Checks data sets and their splits, names of published weights, and models with binary inputs.

    Raises:
        DataError: a data set is missing, or too small for a recipe's batch or validation share.
        PretrainedError: no published weights have that name.
        LaunchError: a model cannot have binary inputs, because a layer's inputs are never negative.
    """
    from suite.data.datasets import load  # imports torch, which a launch with nothing to start must not wait for

    sources = {}
    for dataset, loader in {(cell.dataset, executions[cell.id].loader) for cell in cells}:
        with console.status(f"checking {dataset}"):
            sources[dataset] = load(dataset, data_dir, loader)
    recipes = {(cell.dataset, cell.data.validation_fraction, cell.training.batch_size): cell for cell in cells}
    for cell in recipes.values():
        from suite.training.build import split_training_set

        split_training_set(cell, sources[cell.dataset])
    published = {cell.model for cell in cells if cell.init == "pretrained"}
    published |= {cell.distillation.weights for cell in cells if cell.distillation and cell.distillation.weights}
    for model in published:
        from suite.training.pretrained import require_named

        require_named(model, data_dir)
    for cell in {(cell.dataset, cell.model): cell for cell in cells if cell.task != "bw"}.values():
        with console.status(f"checking {cell.model}"):
            from suite.training.build import build_model

            try:
                build_model(cell, sources[cell.dataset].description, None)
            except ValueError as error:
                raise LaunchError(f"{cell.name}: {error}") from error
