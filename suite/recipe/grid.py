"""Grid: named blocks of models x quantizers x seeds, and the cells they amount to. `grid_file` reads one from YAML."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from suite.errors import SettingError
from suite.recipe.block import Block
from suite.recipe.cell import RECORDED, Cell, Execution, Frozen, QuantizerName
from suite.recipe.choices import Choice, Choices, ChoicesError, Setting, Trial, Tried
from suite.recipe.faults import first_fault
from suite.recipe.tune import Tune

NO_CHOICES = Choices()


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

    @model_validator(mode="after")
    def _tuned_once(self, info: ValidationInfo) -> "Grid":
        if info.context == RECORDED:
            return self
        own_seeds = {seed for block in self.blocks for seed in block.seeds}
        num_blocks: dict[Setting, int] = defaultdict(int)
        for block in self.blocks:
            for setting in block.settings():
                num_blocks[setting] += 1
        for block in self.blocks:
            if block.tune is None:
                continue
            if common := own_seeds & set(block.tune.seeds):
                raise SettingError("tune.seeds", f"{min(common)} is one of the grid's own seeds; take others")
            if twice := [setting for setting in block.settings() if num_blocks[setting] > 1]:
                raise SettingError("tune", f"{twice[0].name} is in several blocks, so it is not clear what is tuned")
        return self

    @property
    def is_tuned(self) -> bool:
        """Whether any block is."""
        return any(block.tune for block in self.blocks)

    def tuned(self) -> dict[Setting, "Tuned"]:
        """Each setting that is tuned, with its block."""
        return {
            setting: Tuned(block, block.tune)
            for block in self.blocks
            if block.tune is not None
            for setting in block.settings()
        }

    def untuned(self) -> "Grid":
        """The same grid with the values that its file has for what it tunes."""
        blocks = tuple(block.model_copy(update={"tune": None}) for block in self.blocks)
        copied = self.model_copy(update={"blocks": blocks})
        copied.__dict__.pop("_resolved", None)  # of this grid
        return copied

    def declared(self, choices: Choices = NO_CHOICES) -> dict[str, Any]:
        """What analysis holds the results to, as JSON: primary, margin_points, settings, tuning.

        A setting is [dataset, task, init, model, quantizer, [seeds]]. tuning has, for each setting that is tuned,
        [dataset, task, init, model, quantizer, trials, seeds of each, epochs of a trial, where its values were given].
        """
        seeds: dict[tuple[str, ...], set[int]] = defaultdict(set)
        tuning: dict[tuple[str, ...], list[Any]] = {}
        chosen = choices.by_setting()
        for block in self.blocks:
            for setting in block.settings():
                seeds[_declared(setting)].update(block.seeds)
        for setting, tuned in self.tuned().items():
            choice = chosen.get(setting)
            if choice is not None and choice.is_given:
                num_seeds = len(choice.trials[0].scores) if choice.trials else 0
                budget = [len(choice.trials), num_seeds, choice.epochs, choice.given]
            else:
                budget = [tuned.tune.trials, len(tuned.tune.seeds), tuned.epochs, ""]
            tuning[_declared(setting)] = [*_declared(setting), *budget]
        settings = [[*setting, sorted(own)] for setting, own in seeds.items()]
        return {
            **self.analysis.model_dump(),
            "settings": settings,
            **({"tuning": list(tuning.values())} if tuning else {}),
        }

    def cells(self) -> list[Cell]:
        """All runs of a grid that tunes nothing, or has its values: see `resolve`."""
        return list(self.resolve().cells)

    def executions(self) -> Mapping[str, Execution]:
        """Execution of each cell, by id: from its block, or the last one if several blocks contain it."""
        return self.resolve().executions

    def resolve(self, choices: Choices = NO_CHOICES) -> "Resolved":
        """All cells that can be known so far, each once, parents linked, and parents before their children.

        A block that tunes nothing has its cells; one that does has its trials, and its own cells once a choice is made.

        Raises:
            ValueError: a finetune cell has no full-precision cell to start from, or several.
            ChoicesError: a choice has values that no cell can have.
        """
        key = json.dumps([[*each.setting, each.is_given, each.values] for each in choices.choices])
        if key not in self._resolved:
            self._resolved[key] = _resolve(self, choices)
        return self._resolved[key]

    @cached_property  # a grid of 10,000 cells takes a second to resolve: once, for reading it and for running it
    def _resolved(self) -> "dict[str, Resolved]":
        """By the choices."""
        return {}

    def imagined(self) -> Choices:
        """Each setting's first trial as its choice: the cells that follow have other values, but the same names."""
        found = []
        for setting, tuned in self.tuned().items():
            values = tuned.tune.draw(setting.quantizer, tuned.block.quantizers)[0]
            found.append(Choice(**setting._asdict(), values=values, trials=(Tried(values=values),)))
        return Choices(choices=tuple(found)) if found else NO_CHOICES


class Tuned(NamedTuple):
    """A block that is tuned, and how."""

    block: Block
    tune: Tune

    @property
    def epochs(self) -> int:
        """Of a trial."""
        own = self.block.training.epochs
        return own if self.tune.epochs is None else min(self.tune.epochs, own)


def _declared(setting: Setting) -> tuple[str, ...]:
    """In the order of `Grid.declared`."""
    return (setting.dataset, setting.task, setting.init, setting.model, setting.quantizer)


@dataclass(frozen=True)
class Resolved:
    """What a grid amounts to so far: the cells of settings without a choice are still to come."""

    cells: tuple[Cell, ...]
    trials: tuple[Trial, ...]
    executions: Mapping[str, Execution]


def _resolve(grid: Grid, choices: Choices) -> Resolved:
    chosen = choices.by_setting()
    unlinked: dict[str, Cell] = {}
    executions: dict[str, Execution] = {}
    trials: list[Trial] = []

    def add(block: Block, cells: Sequence[Cell]) -> None:
        unlinked.update({cell.id: cell for cell in cells})
        executions.update({cell.id: block.execution for cell in cells})

    for block in grid.blocks:
        if block.tune is None:
            add(block, block.cells())
            continue
        for setting in block.settings():
            choice = chosen.get(setting)
            if choice is None or not choice.is_given:
                own = block.trials_of(setting, block.tune)
                trials += own
                add(block, [cell for trial in own for cell in trial.cells])
            if choice is not None:
                add(block, _chosen(block, choice).cells())
    parents = _Parents(grid, chosen, unlinked.values())
    linked = {cell_id: parents.linked(cell) for cell_id, cell in unlinked.items()}
    executions = {cell.id: executions[old] for old, cell in linked.items() if cell is not None}
    for parent, execution in parents.of_trials:
        executions[parent.id] = execution
    known = [cell for cell in linked.values() if cell is not None]
    cells = {cell.id: cell for cell in (*(parent for parent, _ in parents.of_trials), *known)}
    return Resolved(
        tuple(sorted(cells.values(), key=lambda cell: cell.init == "finetune")),
        tuple(found for trial in trials if (found := _linked(trial, linked)) is not None),
        executions,
    )


def _linked(trial: Trial, linked: Mapping[str, Cell | None]) -> Trial | None:
    cells = [linked[cell.id] for cell in trial.cells]
    known = tuple(cell for cell in cells if cell is not None)
    return Trial(trial.setting, trial.values, known) if len(known) == len(cells) else None


def _chosen(block: Block, choice: Choice) -> Block:
    """The block of the choice's setting with its values."""
    try:
        return block.narrowed([choice.model], choice.quantizer, block.seeds, choice.values)
    except ValidationError as error:
        raise ChoicesError(f"the choice for {choice.setting.name}: {first_fault(error)}") from error


class _Parents:
    """The full-precision cells that finetune cells start from: of the same data set, model and seed.

    A trial's parent is one of the tuning seeds, which the grid has for its trials' sake only (`of_trials`).
    """

    def __init__(self, grid: Grid, chosen: Mapping[Setting, Choice], unlinked: Iterable[Cell]) -> None:
        self.chosen = chosen
        self.of_trials: list[tuple[Cell, Execution]] = []
        self._of_trials: dict[tuple[str, str, int], Cell] = {}
        self._blocks: dict[tuple[str, str], list[Block]] = defaultdict(list)
        for block in grid.blocks:
            for model in block.models if "fp" in block.quantizers and block.init != "finetune" else ():
                self._blocks[block.dataset, model].append(block)
        self._found: dict[tuple[str, str, int], list[Cell]] = defaultdict(list)
        for cell in unlinked:
            if cell.quantizer == "fp" and cell.init != "finetune" and not cell.trial:
                self._found[cell.dataset, cell.model, cell.seed].append(cell)

    def linked(self, cell: Cell) -> Cell | None:
        """The cell with its parent; None if that waits for a choice."""
        if cell.init != "finetune":
            return cell
        blocks = self._blocks[cell.dataset, cell.model]
        waits = any(block.tune and self._setting(block, cell) not in self.chosen for block in blocks)
        if cell.trial and len(blocks) == 1:
            parent = None if waits else self._for_trial(blocks[0], cell)
            return parent and _with_parent(cell, [parent])
        found = self._found[cell.dataset, cell.model, cell.seed]
        if waits and not found and any(cell.seed in block.seeds for block in blocks):
            return None
        return _with_parent(cell, found)

    def _setting(self, block: Block, cell: Cell) -> Setting:
        return Setting(cell.dataset, cell.model, "fp", "bw", block.init)

    def _for_trial(self, block: Block, cell: Cell) -> Cell:
        key = (cell.dataset, cell.model, cell.seed)
        if key not in self._of_trials:
            choice = self.chosen.get(self._setting(block, cell))
            values = choice.values if choice is not None and block.tune else {}
            [made] = block.narrowed([cell.model], "fp", [cell.seed], values).cells(trial=True)
            self._of_trials[key] = made
            self.of_trials.append((made, block.execution))
        return self._of_trials[key]


def _with_parent(cell: Cell, parents: list[Cell]) -> Cell:
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
