"""How a grid's methods were tuned: trials, scores and choices, and whether these are still consistent."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from suite.recipe.choices import FILE, Choice, Setting, Tried, best
from suite.recipe.tune import Knob, Scalar, Values, location
from suite.run.directory import RunDir, planned_rows
from suite.run.tuning import read_choices, read_tuning, score


@dataclass(frozen=True)
class Outcome:
    """A trial's values and, for each seed: validation accuracy, or cause of failure, or None if it has not ended."""

    values: Values
    cells: tuple[str, ...]
    scores: tuple[float | str | None, ...]

    @property
    def has_ended(self) -> bool:
        """Whether all seeds have ended."""
        return None not in self.scores

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None if any has failed or has not ended."""
        numbers = [each for each in self.scores if isinstance(each, float)]
        return Tried(values={}, scores=tuple(numbers)).mean if len(numbers) == len(self.scores) else None

    @property
    def failures(self) -> list[str]:
        """Causes of its failed runs."""
        return [each for each in self.scores if isinstance(each, str)]


@dataclass(frozen=True)
class Tuned:
    """One method on one model: search space, trials and choice, and device-hours over all its trials."""

    grid: str
    setting: Setting
    space: Mapping[str, Knob]
    outcomes: tuple[Outcome, ...]
    choice: Choice | None
    epochs: int
    device_hours: float

    @property
    def edges(self) -> list[str]:
        """Knobs whose chosen value lies at the edge of its range."""
        if self.choice is None or self.choice.is_given:
            return []
        values = self.choice.values
        return [key for key, knob in self.space.items() if key in values and knob.is_edge(values[key])]

    @property
    def now(self) -> Values | None:
        """The values that the trials would choose now; None if some have not ended or all failed."""
        if not self.outcomes or not all(outcome.has_ended for outcome in self.outcomes):
            return None
        index = best([_tried(outcome) for outcome in self.outcomes], self.space)
        return None if index is None else self.outcomes[index].values


def _tried(outcome: Outcome) -> Tried:
    scores = tuple(each for each in outcome.scores if each is not None)
    return Tried(values=dict(outcome.values), cells=outcome.cells, scores=scores)


def load(grid_dir: Path) -> list[Tuned]:
    """Every setting that the grid's last launch tunes; empty if it tunes nothing.

    Raises:
        UserError: a file that cannot be read.
    """
    tuning = read_tuning(grid_dir)
    if tuning is None:
        return []
    choices, trials = read_choices(grid_dir / FILE).by_setting(), tuning.by_setting()
    found = []
    for setting, tuned in tuning.grid.tuned().items():
        own = trials.get(setting, [])
        runs = {cell: RunDir(grid_dir / cell) for trial in own for cell in trial.cells}
        outcomes = [
            Outcome(trial.values, trial.cells, tuple(score(runs[cell]) for cell in trial.cells)) for trial in own
        ]
        hours = sum(run.device_hours() or 0.0 for run in runs.values())
        space = tuned.tune.space(setting.quantizer)
        found.append(Tuned(grid_dir.name, setting, space, tuple(outcomes), choices.get(setting), tuned.epochs, hours))
    return found


def doubts(grid_dir: Path, tuned: Sequence[Tuned]) -> Iterator[str]:
    """Reasons to doubt the comparison: choices that differ from what the trials now imply, or from what was trained."""
    for own in tuned:
        choice, name = own.choice, f"{own.grid}: {own.setting.name}"
        if choice is None or choice.is_given:
            continue
        before = {trial.cells: trial.scores for trial in choice.trials}
        changed = [each for each in own.outcomes if each.cells in before and before[each.cells] != each.scores]
        if changed:
            yield (
                f"{name}: {len(changed)} of {len(own.outcomes)} trials have other results than when the choice was "
                "made from them; the choice stands"
            )
        if own.now is not None and dict(own.now) != choice.values:
            yield (
                f"{name}: chosen is {written(choice.values)}, and by the trials' results it would be {written(own.now)}"
            )
    yield from _not_trained(grid_dir, tuned)


def _not_trained(grid_dir: Path, tuned: Sequence[Tuned]) -> Iterator[str]:
    choices = {own.setting: own.choice for own in tuned if own.choice is not None}
    others: dict[Setting, int] = {}
    for raw in planned_rows(grid_dir).values():
        setting = Setting(*(raw[name] for name in Setting._fields))
        choice = choices.get(setting)
        if choice is not None and any(_value(raw, key) != value for key, value in choice.values.items()):
            others[setting] = others.get(setting, 0) + 1
    for setting, number in others.items():
        yield f"{grid_dir.name}: {number} cells of {setting.name} were planned with other values than choices.yaml has"


def _value(raw: Mapping[str, object], key: str) -> object:
    found: object = raw
    for part in location(key):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def remarks(tuned: Sequence[Tuned]) -> Iterator[str]:
    """Remarks for readers: trials still running or failed, choices given from outside, choices at an edge."""
    if not tuned:
        return
    grid = tuned[0].grid
    outcomes = [outcome for own in tuned for outcome in own.outcomes]
    open_trials = sum(not outcome.has_ended for outcome in outcomes)
    if open_trials:
        yield f"{grid}: tuning is under way, {open_trials} of {len(outcomes)} trials have not ended"
    failed = [own.setting.name for own in tuned for outcome in own.outcomes if outcome.failures]
    if failed:
        counts = ", ".join(f"{failed.count(name)} of {name}" for name in dict.fromkeys(failed))
        yield f"{grid}: {len(failed)} of {len(outcomes)} trials failed and count as the worst ({counts})"
    given = {own.choice.given or "choices.yaml" for own in tuned if own.choice is not None and own.choice.is_given}
    if given:
        yield f"{grid}: values were given, not chosen by trials here (from {', '.join(sorted(given))})"
    edges = [f"{own.setting.name} {key}" for own in tuned for key in own.edges]
    if edges:
        more = f" and {len(edges) - 5} more" if len(edges) > 5 else ""  # noqa: PLR2004
        choices = (
            "1 choice at the edge of its range"
            if len(edges) == 1
            else f"{len(edges)} choices at the edge of their range"
        )
        yield f"{grid}: {choices}: widen it ({', '.join(edges[:5])}{more})"


def written(values: Mapping[str, Scalar]) -> str:
    """`training.learning_rate 0.004, quantization.sharpness.bnn++.end 120`."""
    return ", ".join(f"{key} {shown(value)}" for key, value in values.items())


def shown(value: Scalar) -> str:
    """`0.004`, `true`."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def merged(parts: Sequence[Sequence[Tuned]]) -> tuple[Tuned, ...]:
    """Merges a grid from several roots: each setting comes from the first root in which a trial of it has a mean."""
    found: dict[tuple[str, Setting], Tuned] = {}
    for own in (each for part in parts for each in part):
        before = found.get((own.grid, own.setting))
        if before is None or not any(outcome.mean is not None for outcome in before.outcomes):
            found[own.grid, own.setting] = replace(own)
    return tuple(found.values())
