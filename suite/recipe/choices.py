"""Values chosen by tuning: GRID/choices.yaml, written from the trials' scores or supplied by the user.

    choices:
    - {dataset: digits, model: resnet8, quantizer: bnn++, values: {training.learning_rate: 0.004}}

A hand-written file needs only this. A file made from trials also has each trial's values, cells and scores.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import Field, PositiveInt

from suite.errors import UserError
from suite.recipe.cell import Cell
from suite.recipe.settings import Frozen, Init, Task
from suite.recipe.tune import Knob, Scalar

FILE = "choices.yaml"
_TIE = 1e-12
"""Mean accuracies closer than this differ only by rounding and count as equal."""


class ChoicesError(UserError):
    """A file of choices cannot be read, or does not fit the grid."""


class Setting(NamedTuple):
    """The unit of tuning: cells of one setting differ only in their seeds."""

    dataset: str
    model: str
    quantizer: str
    task: str
    init: str

    @classmethod
    def of(cls, cell: Cell) -> "Setting":
        """The cell's setting. Its task is the cell's, which for full precision may differ from its block's."""
        return cls(cell.dataset, cell.model, cell.quantizer, cell.task, cell.init)

    @property
    def name(self) -> str:
        """Like a cell's name, without the seed: `digits/resnet8/bnn++`, then an init not scratch and a task not bw."""
        more = f"/{self.init}" * (self.init != "scratch") + f"/{self.task}" * (self.task != "bw")
        return f"{self.dataset}/{self.model}/{self.quantizer}{more}"


@dataclass(frozen=True)
class Trial:
    """One assignment of values to a method's knobs, and its cells, one for each seed."""

    setting: Setting
    values: Mapping[str, Scalar]
    cells: tuple[Cell, ...]


class Tried(Frozen):
    """A trial and its results: for each seed, the validation accuracy as a fraction, or the failure."""

    values: dict[str, Scalar]
    cells: tuple[str, ...] = ()
    scores: tuple[float | str, ...] = ()

    @property
    def mean(self) -> float:
        """Mean over the seeds; minus infinity if any failed."""
        numbers = [score for score in self.scores if not isinstance(score, str)]
        is_whole = numbers and len(numbers) == len(self.scores)
        return math.fsum(numbers) / len(numbers) if is_whole else -math.inf


class Choice(Frozen):
    """The values chosen for one method on one model. `given` is their source, if not this grid's trials."""

    dataset: str
    model: str
    quantizer: str
    task: Task = "bw"
    init: Init = "scratch"
    values: dict[str, Scalar] = Field(description="by key, such as training.learning_rate; others are the grid file's")
    given: str = ""
    epochs: PositiveInt | None = Field(None, description="of a trial")
    trials: tuple[Tried, ...] = ()

    @property
    def setting(self) -> Setting:
        """The method and model that the values are for."""
        return Setting(self.dataset, self.model, self.quantizer, self.task, self.init)

    @property
    def is_given(self) -> bool:
        """Whether the values come from elsewhere than this grid's trials."""
        return bool(self.given) or not self.trials


class Choices(Frozen):
    """All choices of a grid, each setting once."""

    choices: tuple[Choice, ...] = ()

    def by_setting(self) -> dict[Setting, Choice]:
        """The choices by setting."""
        return {choice.setting: choice for choice in self.choices}

    def under(self, others: "Choices") -> "Choices":
        """These choices; for settings that both have, the choices of `others` take precedence."""
        return Choices(choices=tuple((self.by_setting() | others.by_setting()).values()))


def best(trials: Sequence[Tried], space: Mapping[str, Knob]) -> int | None:
    """Index of the trial with the highest mean score; None if all failed.

    Ties go to the trial nearest to the middle of the space (Euclidean, each knob scaled to [0, 1]), then the first.
    """
    highest = max((trial.mean for trial in trials), default=-math.inf)
    if highest == -math.inf:
        return None
    ties = [index for index, trial in enumerate(trials) if highest - trial.mean <= _TIE]
    return min(ties, key=lambda index: (_distance(trials[index].values, space), index))


def _distance(values: Mapping[str, Scalar], space: Mapping[str, Knob]) -> float:
    return sum((knob.position(values[key]) - 0.5) ** 2 for key, knob in space.items())
