"""GRID/tuning.json: the tuning of a launched grid. GRID/choices.yaml: its results.

A choice is final once it is written, whatever happens to its trials later.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from suite.recipe.cell import Cell
from suite.recipe.choices import Choice, Choices, ChoicesError, Setting, Trial, Tried, best
from suite.recipe.faults import Faults
from suite.recipe.grid import Grid
from suite.recipe.settings import RECORDED
from suite.recipe.tune import Knob, Values
from suite.recipe.yaml_lines import read
from suite.run.atomic import read_json, write_bytes, write_json
from suite.run.directory import RunDir

_HEAD_OF_CHOICES = """\
# What tuning chose for each method on each model, and the validation accuracy of every trial by seed.
# The grid's own cells are trained with these values. A choice with `given` was not made from trials here.
"""


@dataclass(frozen=True)
class PlannedTrial:
    """A trial of a launched grid; `cells` are ids, one for each seed."""

    setting: Setting
    values: Values
    cells: tuple[str, ...]

    @classmethod
    def of(cls, trial: Trial) -> "PlannedTrial":
        """The planned form of a resolved trial."""
        return cls(trial.setting, trial.values, tuple(cell.id for cell in trial.cells))


@dataclass(frozen=True)
class Tuning:
    """The grid as launched, and its trials so far.

    `shapes` has the resource shape of every cell, including later ones, by `place_of`. `only` has the launch's
    patterns; `only_tune`: the launch requested trials only. `num_later` and `num_later_epochs`, by setting
    name: the number of requested cells that its choice will add, and of their epochs.
    """

    grid: Grid
    trials: tuple[PlannedTrial, ...] = ()
    shapes: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    only_tune: bool = False
    num_later: Mapping[str, int] = field(default_factory=dict)
    num_later_epochs: Mapping[str, int] = field(default_factory=dict)

    def space(self, setting: Setting) -> dict[str, Knob]:
        """The knobs of a setting; empty if it is not tuned."""
        tuned = self.grid.tuned().get(setting)
        return {} if tuned is None else tuned.tune.space(setting.quantizer)

    @cached_property
    def trial_cells(self) -> frozenset[str]:
        """Ids of the trials' cells."""
        return frozenset(cell for trial in self.trials for cell in trial.cells)

    def by_setting(self) -> dict[Setting, list[PlannedTrial]]:
        """The trials of each setting."""
        found: dict[Setting, list[PlannedTrial]] = {}
        for trial in self.trials:
            found.setdefault(trial.setting, []).append(trial)
        return found

    def write(self, grid_dir: Path) -> None:
        """Replaces GRID/tuning.json."""
        raw = {each.name: getattr(self, each.name) for each in fields(self)}
        raw["grid"] = self.grid.model_dump(mode="json", exclude_unset=True)
        raw["trials"] = [asdict(trial) for trial in self.trials]
        write_json(_path(grid_dir), raw)


def _path(grid_dir: Path) -> Path:
    return grid_dir / "tuning.json"


def read_tuning(grid_dir: Path) -> Tuning | None:
    """The last launch's tuning; None if it tunes nothing."""
    raw: dict[str, Any] = read_json(_path(grid_dir))
    if not raw:
        return None
    raw["grid"] = Grid.model_validate(raw["grid"], context=RECORDED)
    raw["trials"] = tuple(
        PlannedTrial(Setting(*each["setting"]), each["values"], tuple(each["cells"])) for each in raw["trials"]
    )
    return Tuning(**{**raw, "only": tuple(raw["only"])})


def forget_tuning(grid_dir: Path) -> None:
    """Deletes GRID/tuning.json. Call after a launch of a grid that tunes nothing."""
    _path(grid_dir).unlink(missing_ok=True)


def place_of(cell: Cell) -> str:
    """The cell's name without a trial's number, which is known before any value is chosen."""
    return cell.name.partition("/trial-")[0] + "/trial" * cell.trial


def score(run: RunDir) -> float | str | None:
    """A trial's validation accuracy with hard weights, or how it failed; None until it has ended."""
    result = run.result()
    if result is not None:
        return float(result["val_top1_hard"])
    state = run.state()
    if state.state == "failed":
        return f"failed: {state.cause}"
    return "cancelled" if state.state == "cancelled" else None


def tried(grid_dir: Path, trials: Sequence[PlannedTrial]) -> list[Tried] | None:
    """The results of a setting's trials; None until all have ended."""
    found = []
    for trial in trials:
        scores = [score(RunDir(grid_dir / cell)) for cell in trial.cells]
        ended = [each for each in scores if each is not None]
        if len(ended) < len(scores):
            return None
        found.append(Tried(values=dict(trial.values), cells=trial.cells, scores=tuple(ended)))
    return found


def choose(setting: Setting, outcomes: Sequence[Tried], space: Mapping[str, Knob], epochs: int) -> Choice | None:
    """The best trial's values, with all outcomes; None if all trials failed. A pure function."""
    index = best(outcomes, space)
    if index is None:
        return None
    return Choice(**setting._asdict(), values=outcomes[index].values, epochs=epochs, trials=tuple(outcomes))


def choose_all(grid_dir: Path, tuning: Tuning, known: Choices) -> Choices:
    """`known`, plus a choice for each other setting whose trials have all ended."""
    chosen, found = known.by_setting(), []
    for setting, trials in tuning.by_setting().items():
        if setting in chosen or (outcomes := tried(grid_dir, trials)) is None:
            continue
        choice = choose(setting, outcomes, tuning.space(setting), tuning.grid.tuned()[setting].epochs)
        found += [] if choice is None else [choice]
    return known.under(Choices(choices=tuple(found))) if found else known


def read_choices(path: Path) -> Choices:
    """The file's content; no choices if it does not exist.

    Raises:
        ChoicesError: the file is invalid; the message has one line per fault.
    """
    if not path.exists():
        return Choices()
    raw, lines = read(path, "a file of choices", Choices.model_fields, ChoicesError)
    faults = Faults(path, lines)
    try:
        found = Choices.model_validate(raw)
    except ValidationError as error:
        faults.add_all(error, Choices, ())
        raise ChoicesError("\n".join(faults)) from error
    seen: set[Setting] = set()
    for choice in found.choices:
        if choice.setting in seen:
            raise ChoicesError(f"{path}: {choice.setting.name} has two choices")
        seen.add(choice.setting)
    return found


def write_choices(path: Path, choices: Choices) -> None:
    """Replaces the file atomically."""
    from ruamel.yaml import YAML  # writes YAML 1.2, where the id 12e345678901 needs quotes to be text

    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = None  # innermost collections on one line
    writer.width = 1000
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    writer.dump(choices.model_dump(mode="json", exclude_defaults=True), text)
    write_bytes(path, f"{_HEAD_OF_CHOICES}{text.getvalue()}".encode())
