"""Makes choices from trials that have ended, and plans the cells that follow from the choices.

A worker does this when a setting's last trial ends, and so does every launch. Concurrent calls write the same files: a
choice is a pure function of its trials' results, and the plan is a pure function of the grid and its choices.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.plan import select
from suite.recipe.bundled import CHOICES
from suite.recipe.cell import Cell
from suite.recipe.choices import FILE, Choice, Choices, ChoicesError, Setting
from suite.recipe.grid import Grid, Resolved
from suite.run.directory import Planned, RunDir, read_plan, write_plan
from suite.run.locks import locked
from suite.run.tuning import (
    PlannedTrial,
    Tuning,
    choose_all,
    place_of,
    read_choices,
    read_tuning,
    write_choices,
)


def advance(grid_dir: Path) -> int:
    """Makes the choices that can be made, and plans the cells that follow; returns how many are new."""
    if not (grid_dir / "tuning.json").exists():
        return 0
    with locked(grid_dir / "tuning.lock"):
        tuning = read_tuning(grid_dir)
        if tuning is None:
            return 0
        before = read_choices(grid_dir / FILE)
        choices, tuning = settled(grid_dir, tuning, before)
        if choices != before:
            write_choices(grid_dir / FILE, choices)
        resolved = tuning.grid.resolve(choices)
        plan = read_plan(grid_dir)
        new = [cell for cell in resolved.cells if cell.id not in plan]
        if not new:
            return 0
        tuning.write(grid_dir)
        made = {cell.id: planned(cell, resolved, tuning) for cell in new}
        write_plan(grid_dir, [*plan.values(), *(replace(each, is_later=True) for each in made.values())])
        asked = wanted(tuning, resolved, choices)
        for cell in new:
            if cell.id in asked:
                RunDir.create(grid_dir / cell.id, cell)
        return len(new)


@dataclass(frozen=True)
class Outlook:
    """The cells of a launch: `resolved` are known now; `whole` is the grid with placeholder values for open choices.

    `wanted`: ids of the requested cells that are known now; `later`: requested cells that will follow from choices.
    """

    tuning: Tuning
    choices: Choices
    resolved: Resolved
    whole: Resolved
    wanted: frozenset[str]
    later: tuple[Cell, ...]


def look_ahead(grid_dir: Path, grid: Grid, path: Path | None, only: Sequence[str], *, only_tune: bool) -> Outlook:
    """The cells that a launch of the grid, with the choices file at `path`, would run. `tuning` has no shapes yet."""
    tuning = Tuning(grid, only=tuple(only), only_tune=only_tune)
    choices, tuning = settled(grid_dir, tuning, start_choices(grid_dir, grid, path))
    resolved, whole = grid.resolve(choices), later(grid, choices)
    now, in_all = wanted(tuning, resolved, choices), wanted(tuning, whole, choices)
    to_come = tuple(cell for cell in whole.cells if cell.id in in_all - now)
    num_cells, num_epochs = Counter[str](), Counter[str]()
    for cell in to_come:
        num_cells[Setting.of(cell).name] += 1
        num_epochs[Setting.of(cell).name] += cell.training.epochs
    tuning = replace(tuning, num_later=num_cells, num_later_epochs=num_epochs)
    return Outlook(tuning, choices, resolved, whole, frozenset(now), to_come)


def settled(grid_dir: Path, tuning: Tuning, choices: Choices) -> tuple[Choices, Tuning]:
    """Makes all choices that the trials' results allow, one after another, and adds the trials that these entail."""
    while True:
        resolved = tuning.grid.resolve(choices)
        tuning = replace(tuning, trials=tuple(map(PlannedTrial.of, resolved.trials)))
        more = choose_all(grid_dir, tuning, choices)
        if more is choices:
            return choices, tuning
        choices = more


def planned(cell: Cell, resolved: Resolved, tuning: Tuning) -> Planned:
    """The plan's entry for a cell of a tuned grid."""
    setting, execution = Setting.of(cell), resolved.executions[cell.id]
    # A cell that is only the parent of trials belongs to no setting's trials.
    is_tuned = cell.id in tuning.trial_cells if cell.trial else bool(tuning.space(setting))
    return Planned(cell, execution, tuning.shapes[place_of(cell)], tuned=setting.name if is_tuned else "")


def later(grid: Grid, choices: Choices) -> Resolved:
    """The whole grid, with placeholder values for open choices: enough for names, shapes and costs."""
    return grid.resolve(grid.imagined().under(choices)) if grid.is_tuned else grid.resolve(choices)


def wanted(tuning: Tuning, resolved: Resolved, choices: Choices) -> set[str]:
    """Ids of the requested cells, and of the parents and trials that these need."""
    chosen = {cell.id for cell in select(resolved.cells, tuning.only)}
    settings = {Setting.of(cell) for cell in select(later(tuning.grid, choices).cells, tuning.only)}
    return {
        cell.id
        for cell in resolved.cells
        if (Setting.of(cell) in settings if cell.trial else cell.id in chosen and not tuning.only_tune)
    }


def start_choices(grid_dir: Path, grid: Grid, path: Path | None) -> Choices:
    """The choices at the start of a launch: GRID/choices.yaml, overridden by the file given with --choices.

    Raises:
        ChoicesError: a file is invalid, has no choice for this grid, or comes from other trials than the grid's.
    """
    known = _known(grid_dir, grid)
    if path is None:
        return known
    if not path.exists():
        bundled = CHOICES / f"{path}.yaml"
        if not bundled.exists():
            raise ChoicesError(f"--choices {path}: no such file, and no bundled choices of that name")
        path, name = bundled, f"the bundled choices {path}"
    else:
        name = str(path)
    settings = grid.tuned().keys()
    given = [
        choice.model_copy(update={"given": choice.given or name})
        for choice in read_choices(path).choices
        if choice.setting in settings
    ]
    if not given:
        raise ChoicesError(f"{name}: no choice for any setting that {grid.name} tunes ({_some(settings)})")
    return known.under(Choices(choices=tuple(given)))


def _known(grid_dir: Path, grid: Grid) -> Choices:
    """The choices in GRID/choices.yaml. A choice whose trials never ran here was copied, so it counts as given."""
    found = read_choices(grid_dir / FILE)
    kept = Choices(choices=tuple(choice for choice in found.choices if choice.setting in grid.tuned()))
    trials: dict[Setting, set[tuple[str, ...]]] = {}
    for trial in grid.resolve(kept).trials:
        trials.setdefault(trial.setting, set()).add(tuple(cell.id for cell in trial.cells))
    return Choices(choices=tuple(_checked(choice, grid_dir, trials) for choice in kept.choices))


def _checked(choice: Choice, grid_dir: Path, trials: dict[Setting, set[tuple[str, ...]]]) -> Choice:
    if choice.is_given:
        return choice.model_copy(update={"given": choice.given or FILE})
    own = {trial.cells for trial in choice.trials}
    if not any((grid_dir / cell / "cell.yaml").exists() for cells in own for cell in cells):
        return choice.model_copy(update={"given": f"{FILE}, from trials elsewhere"})
    if own != trials.get(choice.setting, set()):
        path = grid_dir / FILE
        raise ChoicesError(
            f"{path}: the choice for {choice.setting.name} comes from other trials than the grid now has: delete "
            f"{path} to tune again, or keep it with --choices {path}"
        )
    return choice


def _some(settings: Collection[Setting]) -> str:
    names = sorted(setting.name for setting in settings)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")  # noqa: PLR2004
