"""Grid: named blocks of models x quantizers x seeds, and the cells they amount to. `grid_file` reads one from YAML."""

from collections import defaultdict
from functools import cached_property
from typing import Any

from pydantic import Field, NonNegativeInt, ValidationInfo, field_validator, model_validator

from suite.errors import SettingError
from suite.recipe.cell import (
    Cell,
    Data,
    DatasetName,
    Execution,
    Frozen,
    Init,
    Inputs,
    ModelName,
    Quantization,
    QuantizerName,
    Task,
    Training,
    reads_mu,
    require_fitting,
    require_mu,
)


class Block(Frozen):
    """Models x quantizers x seeds under one recipe. A grid file is one block, plus blocks that override it."""

    dataset: DatasetName
    models: tuple[ModelName, ...] = Field(min_length=1)
    quantizers: tuple[QuantizerName, ...] = Field(
        min_length=1, description="rows of the catalogue, or module:attribute of a Quantizer of yours"
    )
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    task: Task = Field("bw", description="bw: weights are binary; bwa: also the inputs of binary layers. Not for fp")
    init: Init = Field(
        "scratch",
        description="finetune: from the full-precision cell of the same model and seed, which runs first; pretrained: "
        "from timm's weights, which the model's tag names, or DATA/weights/MODEL.safetensors (or .pth)",
    )
    data: Data = Data()
    training: Training
    quantization: Quantization = Quantization()
    execution: Execution = Execution()

    @field_validator("models", "quantizers", "seeds")
    @classmethod
    def _each_once(cls, values: tuple[str | int, ...]) -> tuple[str | int, ...]:
        seen: set[str | int] = set()
        for index, value in enumerate(values):
            if value in seen:
                raise SettingError(f"{index}", f"{value} is given twice")
            seen.add(value)
        return values

    @field_validator("data")
    @classmethod
    def _data_that_fits(cls, data: Data, info: ValidationInfo) -> Data:
        if {"dataset", "models"} <= info.data.keys():  # if invalid, they are reported themselves
            require_fitting(data, info.data["dataset"], info.data["models"])
        return data

    @model_validator(mode="after")
    def _mu_where_needed(self) -> "Block":
        for name in self.quantizers:
            require_mu(name, self.quantization)
        for name in self.quantization.sharpness:
            if not reads_mu(name):
                raise SettingError(
                    f"quantization.sharpness.{name}", f"changes nothing: {name} reads no mu; leave it out"
                )
        return self

    def cells(self) -> list[Cell]:
        """The block's runs, without parents, models outermost."""
        return [
            Cell(
                dataset=self.dataset,
                model=model,
                quantizer=quantizer,
                seed=seed,
                task="bw" if quantizer == "fp" else self.task,
                init=self.init,
                data=self.data,
                training=self.training,
                quantization=self._quantization_of(quantizer),
            )
            for model in self.models
            for quantizer in self.quantizers
            for seed in self.seeds
        ]

    def _quantization_of(self, quantizer: str) -> Quantization:
        # Another method's mu, or any of it under fp, cannot change this cell's result: not part of its id.
        if quantizer == "fp":
            return Quantization()
        own = {name: sharpness for name, sharpness in self.quantization.sharpness.items() if name == quantizer}
        inputs = None if self.task == "bw" else self.quantization.inputs or Inputs()
        return self.quantization.model_copy(update={"sharpness": own, "inputs": inputs})


class Analysis(Frozen):
    """The question that the grid asks, declared before its runs exist. No part of any cell."""

    primary: QuantizerName = Field("bnn++", description="the quantizer that each other binary one is compared with")
    margin_points: float | None = Field(
        None,
        gt=0,
        lt=100,
        description="largest difference in test accuracy, in percentage points, that counts as none: the margin of "
        "equivalence, between methods and to published numbers; without it, equivalence is not tested",
    )


class Grid(Frozen):
    """Named set of cells; every field is data, so a grid file is all there is to share."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    blocks: tuple[Block, ...]
    analysis: Analysis = Analysis()

    @model_validator(mode="after")
    def _primary_is_run(self) -> "Grid":
        names = {name for block in self.blocks for name in block.quantizers}
        if "primary" in self.analysis.model_fields_set and self.analysis.primary not in names:
            have = ", ".join(sorted(names))
            raise SettingError("analysis.primary", f"{self.analysis.primary!r} is no quantizer of this grid ({have})")
        return self

    def declared(self) -> dict[str, Any]:
        """What analysis holds the results to, as JSON: primary, margin_points, settings.

        A setting is [dataset, task, init, model, quantizer, [seeds]].
        """
        seeds: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for cell in self._cells:
            seeds[cell.dataset, cell.task, cell.init, cell.model, cell.quantizer].append(cell.seed)
        settings = [[*setting, sorted(own)] for setting, own in seeds.items()]
        return {**self.analysis.model_dump(), "settings": settings}

    def executions(self) -> dict[str, Execution]:
        """Execution of each cell, by id: from its block, or the last one if several blocks contain it."""
        of = {_without_parent(cell): block.execution for block in self.blocks for cell in block.cells()}
        return {cell.id: of[_without_parent(cell)] for cell in self._cells}

    def cells(self) -> list[Cell]:
        """All runs, each once, parents linked; full-precision parents come before the cells that start from them.

        Raises:
            ValueError: a finetune cell has no full-precision cell to start from, or several.
        """
        return list(self._cells)

    @cached_property  # a grid of 10,000 cells takes a second to resolve: once, for reading it and for running it
    def _cells(self) -> tuple[Cell, ...]:
        unlinked = list({cell.id: cell for block in self.blocks for cell in block.cells()}.values())
        sources: dict[tuple[object, ...], list[Cell]] = defaultdict(list)
        for cell in unlinked:
            if cell.quantizer == "fp" and cell.init != "finetune":
                sources[cell.dataset, cell.model, cell.seed].append(cell)
        linked = [_with_parent(cell, sources[cell.dataset, cell.model, cell.seed]) for cell in unlinked]
        return tuple(sorted(linked, key=lambda cell: cell.init == "finetune"))


def _without_parent(cell: Cell) -> str:
    return cell.model_copy(update={"parent": None}).id


def _with_parent(cell: Cell, parents: list[Cell]) -> Cell:
    if cell.init != "finetune":
        return cell
    if len(parents) != 1:
        found = "none" if not parents else ", ".join(f"{parent.name} ({parent.id})" for parent in parents)
        raise ValueError(
            f"{cell.name} starts from the one full-precision cell of its data set, model and seed; the grid has {found}"
        )
    parent = parents[0]
    if parent.init == "pretrained":
        _require_own_preprocessing(cell, parent)
    return cell.model_copy(update={"parent": parent.id})


def _require_own_preprocessing(cell: Cell, parent: Cell) -> None:
    """ValueError where the cell's images would not be what its parent's were, by the defaults of published weights."""
    from suite.data.datasets import is_small  # imports torch, which a grid without such cells must not wait for

    keys = {"data.mean": cell.data.mean, "data.interpolation": cell.data.interpolation}
    if is_small(cell.dataset):
        del keys["data.interpolation"]
    if unstated := [key for key, value in keys.items() if value is None]:
        raise ValueError(
            f"{cell.name} starts from {parent.name}, whose images are by default what its published weights saw: "
            f"give both blocks {' and '.join(unstated)}"
        )
