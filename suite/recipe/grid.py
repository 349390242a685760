"""Grid: named blocks of models x quantizers x seeds, and the cells they define. `grid_file` reads one from YAML."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, model_validator

from suite.errors import SettingError
from suite.recipe.block import Block, CellOf
from suite.recipe.cell import Cell
from suite.recipe.choices import Choice, Choices, ChoicesError, Setting, Trial, Tried
from suite.recipe.faults import first_fault
from suite.recipe.settings import RECORDED, Execution, Frozen, known_quantizer
from suite.recipe.tune import Tune

NO_CHOICES = Choices()

COMPLETIONS = "completions"
"""As `primary`: is each surrogate gradient's completion more accurate than the surrogate?"""


def _compared(name: str, info: ValidationInfo) -> str:
    return name if name == COMPLETIONS else known_quantizer(name, info)


class Analysis(Frozen):
    """The grid's research question, declared before its runs exist. Not part of any cell."""

    primary: Annotated[str, AfterValidator(_compared)] = Field(
        "bnn++",
        description="the quantizer that every other binary one is compared with; completions: each surrogate gradient "
        "is compared with its completion instead",
    )
    margin_points: float | None = Field(
        None,
        gt=0,
        lt=100,
        description="equivalence margin: the largest difference in test accuracy, in percentage points, that counts as "
        "equal, between methods and to published numbers; without it, equivalence is not tested",
    )


class Grid(Frozen):
    """Named set of cells. Every field is data, so sharing the grid file is enough."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    blocks: tuple[Block, ...]
    analysis: Analysis = Analysis()

    @model_validator(mode="after")
    def _primary_is_run(self) -> "Grid":
        names = {name for block in self.blocks for name in block.quantizers}
        if self.analysis.primary == COMPLETIONS:
            import quantizers

            if not any(row.completes in names and row.name in names for row in quantizers.QUANTIZERS.values()):
                raise SettingError("analysis.primary", "completions: the grid has no surrogate beside its completion")
        elif "primary" in self.analysis.model_fields_set and self.analysis.primary not in names:
            have = ", ".join(sorted(names))
            raise SettingError(
                "analysis.primary", f"{self.analysis.primary!r} is not a quantizer of this grid ({have})"
            )
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
                raise SettingError("tune", f"{twice[0].name} is in several blocks, so its tuning is ambiguous")
        return self

    @property
    def is_tuned(self) -> bool:
        """Whether any block is tuned."""
        return any(block.tune for block in self.blocks)

    def tuned(self) -> dict[Setting, "Tuned"]:
        """The tuned settings, each with its block."""
        return {
            setting: Tuned(block, block.tune)
            for block in self.blocks
            if block.tune is not None
            for setting in block.settings()
        }

    def untuned(self) -> "Grid":
        """The same grid without tuning: its knobs keep the file's values."""
        blocks = tuple(block.model_copy(update={"tune": None}) for block in self.blocks)
        copied = self.model_copy(update={"blocks": blocks})
        copied.__dict__.pop("_resolved", None)  # belongs to this grid
        return copied

    def declared(self, choices: Choices = NO_CHOICES) -> dict[str, Any]:
        """The design that analysis checks the results against, as JSON: primary, margin_points, settings, tuning.

        A setting is [dataset, task, init, model, quantizer, [seeds]]. tuning has, for each tuned setting, [dataset,
        task, init, model, quantizer, trials, seeds per trial, epochs per trial, source of given values or ""].
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
        """The cells known without any choices: all cells if nothing is tuned. See `resolve`."""
        return list(self.resolve().cells)

    def executions(self) -> Mapping[str, Execution]:
        """Execution of each cell by id: from the cell's block, or the last one if several blocks contain it."""
        return self.resolve().executions

    def resolve(self, choices: Choices = NO_CHOICES) -> "Resolved":
        """All cells known so far, each once; parents and teachers come before the cells that need them.

        A block without tuning contributes its cells; a tuned block, its trials, and its cells once a choice is made.

        Raises:
            ValueError: a cell's parent or teacher is missing, ambiguous or does not fit.
            ChoicesError: a choice has values that no cell can have.
        """
        key = json.dumps([[*each.setting, each.is_given, each.values] for each in choices.choices])
        if key not in self._resolved:
            self._resolved[key] = _resolve(self, choices)
        return self._resolved[key]

    @cached_property  # resolving 10,000 cells takes a second, so reading and running the grid share the result
    def _resolved(self) -> "dict[str, Resolved]":
        """Results of `resolve`, by choices."""
        return {}

    def imagined(self) -> Choices:
        """Each setting's first trial as its choice: gives the names of all cells, though not their values."""
        found = []
        for setting, tuned in self.tuned().items():
            values = tuned.tune.draw(setting.quantizer, tuned.block.quantizers)[0]
            found.append(Choice(**setting._asdict(), values=values, trials=(Tried(values=values),)))
        return Choices(choices=tuple(found)) if found else NO_CHOICES


class Tuned(NamedTuple):
    """A tuned block and its tuning."""

    block: Block
    tune: Tune

    @property
    def epochs(self) -> int:
        """Of a trial."""
        own = self.block.training.epochs
        return own if self.tune.epochs is None else min(self.tune.epochs, own)


def _declared(setting: Setting) -> tuple[str, ...]:
    """The setting's fields in the order of `Grid.declared`."""
    return (setting.dataset, setting.task, setting.init, setting.model, setting.quantizer)


@dataclass(frozen=True)
class Resolved:
    """A grid's cells so far, without the cells of tuned settings that have no choice yet."""

    cells: tuple[Cell, ...]
    trials: tuple[Trial, ...]
    executions: Mapping[str, Execution]


def _resolve(grid: Grid, choices: Choices) -> Resolved:
    chosen = choices.by_setting()
    links = _Links(grid, chosen)
    trials: list[Trial] = []
    for block in grid.blocks:
        if block.tune is None:
            links.add(block, block.cells())
            continue
        for setting in block.settings():
            choice = chosen.get(setting)
            if choice is None or not choice.is_given:
                own = block.trials_of(setting, block.tune)
                trials += own
                links.add(block, [cell for trial in own for cell in trial.cells])
            if choice is not None:
                links.add(block, _chosen(block, choice).cells())
    linked = links.all()
    known_trials = []
    for trial in trials:
        block = next(block for block in grid.blocks if block.tune and trial.setting in block.settings())
        cells = tuple(cell for each in trial.cells if (cell := links.linked(block, each)) is not None)
        if len(cells) == len(trial.cells):
            known_trials.append(Trial(trial.setting, trial.values, cells))
    return Resolved(tuple(linked), tuple(known_trials), links.executions)


def _chosen(block: Block, choice: Choice) -> Block:
    """The block reduced to the choice's setting, with the chosen values."""
    try:
        return block.narrowed([choice.model], choice.quantizer, block.seeds, choice.values)
    except ValidationError as error:
        raise ChoicesError(f"the choice for {choice.setting.name}: {first_fault(error)}") from error


class _Links:
    """Finds each cell's parent and teacher among the cells with the same data set and seed, as its block specifies.

    A trial's parent and teacher have a tuning seed: such cells exist in the grid only for its trials.
    """

    def __init__(self, grid: Grid, chosen: Mapping[Setting, Choice]) -> None:
        self.executions: dict[str, Execution] = {}
        self._grid, self._chosen = grid, chosen
        self._unlinked: list[tuple[Block, Cell]] = []
        self._by_setting: dict[tuple[str, str, str, str, int], list[tuple[Block, Cell]]] = defaultdict(list)
        self._linked: dict[tuple[str, object], Cell | None] = {}
        self._under_way: list[Cell] = []
        self._blocks: dict[tuple[str, str, CellOf], list[Block]] = {}

    def add(self, block: Block, cells: Sequence[Cell]) -> None:
        """Adds cells of the block, which do not yet have parents and teachers."""
        for cell in cells:
            self._unlinked.append((block, cell))
            if not cell.trial:
                key = (cell.dataset, cell.model, cell.quantizer, cell.task, cell.seed)
                self._by_setting[key].append((block, cell))

    def all(self) -> list[Cell]:
        """Each cell once, linked, after its parent and teacher. Omits cells that wait for a choice."""
        found: dict[str, Cell] = {}
        for block, cell in self._unlinked:
            linked = self.linked(block, cell)
            if linked is not None:
                found[linked.id] = linked
                self.executions[linked.id] = block.execution  # if several blocks have the cell, the last one's
        cells = {cell.id: cell for cell in (*self._of_trials(found), *found.values())}
        depths: dict[str, int] = {}

        def depth(cell: Cell) -> int:
            if cell.id not in depths:
                depths[cell.id] = 1 + max((depth(cells[each]) for each in cell.needs), default=-1)
            return depths[cell.id]

        return sorted(cells.values(), key=depth)

    def _of_trials(self, found: Mapping[str, Cell]) -> list[Cell]:
        """Cells that exist only because trials need them."""
        return [cell for cell in self._linked.values() if cell is not None and cell.id not in found]

    def linked(self, block: Block, cell: Cell) -> Cell | None:
        """The cell with its parent and teacher; None if one of them waits for a choice."""
        key = (cell.id, block.origins)
        if key not in self._linked:
            if cell in self._under_way:
                names = [each.name for each in (*self._under_way, cell)]
                raise ValueError(f"{cell.name} would wait for itself: {' <- '.join(names)}")
            self._under_way.append(cell)
            self._linked[key] = self._with_links(block, cell)
            self._under_way.pop()
        linked = self._linked[key]
        if linked is not None:
            self.executions.setdefault(linked.id, block.execution)
        return linked

    def _with_links(self, block: Block, cell: Cell) -> Cell | None:
        links: dict[str, str] = {}
        for role, origin in zip(("parent", "teacher"), block.origins, strict=True):
            if origin is None:
                continue
            other = self._found(cell, origin, role)
            if other is None:
                return None
            _require_fitting(cell, other, role)
            links[role] = other.id
        return cell.model_copy(update=links) if links else cell

    def _found(self, cell: Cell, origin: CellOf, role: str) -> Cell | None:
        """The only cell that matches `origin` for the cell, itself linked; None if it waits for a choice."""
        model = origin.model or cell.model
        blocks = self._blocks_of(cell.dataset, model, origin)
        waits = any(block.tune and self._setting(block, model, origin) not in self._chosen for block in blocks)
        if cell.trial and len(blocks) == 1:
            return None if waits else self._for_trial(blocks[0], cell, model, origin)
        known = self._by_setting[cell.dataset, model, origin.quantizer, origin.task, cell.seed]
        fitting = [(block, other) for block, other in known if any(block is each for each in blocks)]
        if not fitting and waits and any(cell.seed in block.seeds for block in blocks):
            return None
        others = {linked.id: linked for block, other in fitting if (linked := self.linked(block, other)) is not None}
        if not others and fitting:
            return None
        if len(others) != 1:
            found = ", ".join(f"{other.name} ({other.id})" for other in others.values()) or "none"
            doing = {"parent": "starts from", "teacher": "learns from"}[role]
            raise ValueError(
                f"{cell.name} {doing} the one {_described(origin, model)} of its seed; the grid has {found}"
            )
        return next(iter(others.values()))

    def _blocks_of(self, dataset: str, model: str, origin: CellOf) -> list[Block]:
        """Blocks with cells that match `origin`. Finetune blocks count only if it names them or there are no others."""
        key = (dataset, model, origin)
        if key not in self._blocks:
            found = [
                block
                for block in self._grid.blocks
                if block.dataset == dataset
                and any(
                    (setting.model, setting.quantizer, setting.task) == (model, origin.quantizer, origin.task)
                    for setting in block.settings()
                )
                and origin.init in {None, block.init}
            ]
            first = [block for block in found if block.init != "finetune"]
            self._blocks[key] = found if origin.init else first or found
        return self._blocks[key]

    def _setting(self, block: Block, model: str, origin: CellOf) -> Setting:
        return Setting(block.dataset, model, origin.quantizer, origin.task, block.init)

    def _for_trial(self, block: Block, cell: Cell, model: str, origin: CellOf) -> Cell | None:
        choice = self._chosen.get(self._setting(block, model, origin))
        values = choice.values if choice is not None and block.tune else {}
        own = block.narrowed([model], origin.quantizer, [cell.seed], values)
        [made] = own.cells(trial=True)
        return self.linked(block, made)


def _described(origin: CellOf, model: str) -> str:
    """`full-precision cell of resnet20`, `bnn++ cell of resnet20 (task bwa)`."""
    what = "full-precision" if origin.quantizer == "fp" else origin.quantizer
    more = [*([f"task {origin.task}"] * (origin.task != "bw")), *([f"init {origin.init}"] if origin.init else [])]
    return f"{what} cell of {model}" + (f" ({', '.join(more)})" if more else "")


_SEEN = ("image_size", "mean", "std", "interpolation")
"""Keys of `data` that determine the images a network receives."""


def _require_fitting(cell: Cell, other: Cell, role: str) -> None:
    """Raises ValueError if the cell cannot start from the other's weights or learn from its outputs."""
    if other.init == "pretrained":
        _require_own_preprocessing(cell, other)
    if role == "teacher":
        for key in _SEEN:
            mine, theirs = getattr(cell.data, key), getattr(other.data, key)
            if mine != theirs:
                raise ValueError(
                    f"{cell.name} learns from {other.name}, which gets different images: data.{key} is {mine} "
                    f"for the first and {theirs} for the second"
                )
        if other.training.reestimate_norm:
            raise ValueError(
                f"{other.name} re-estimates its norms, so it cannot be a teacher; set reestimate_norm: false"
            )
    elif other.quantizer != "fp":
        for key in ("scale", "full_precision"):
            mine, theirs = getattr(cell.quantization, key), getattr(other.quantization, key)
            if cell.quantizer == "fp" or mine != theirs:
                raise ValueError(
                    f"{cell.name} starts from {other.name}, whose layers differ: quantization.{key} must be the "
                    "same in both, and both must be binary"
                )


def _require_own_preprocessing(cell: Cell, parent: Cell) -> None:
    """Raises ValueError if the parent gets its published weights' default preprocessing but the cell would not."""
    from suite.data.datasets import is_small  # late: imports torch, which grids without such cells do not need

    keys = {"data.mean": cell.data.mean, "data.interpolation": cell.data.interpolation}
    if is_small(cell.dataset):
        del keys["data.interpolation"]
    if unstated := [key for key, value in keys.items() if value is None]:
        raise ValueError(
            f"{cell.name} needs {parent.name}, whose preprocessing by default follows its published weights: "
            f"set {' and '.join(unstated)} in both blocks"
        )
