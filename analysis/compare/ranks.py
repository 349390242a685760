"""Methods compared across models: average ranks with Friedman's and Nemenyi's tests, on one mean per model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.stats.families import MIN_BLOCKS, Ranking, rank_methods

MIN_METHODS = 3


@dataclass(frozen=True)
class Ranks:
    """The ranking of one task's and init's methods over `models` (data set/model), and who could not take part.

    `incomplete` are the methods without a mean on one of the models.
    """

    task: str
    init: str
    models: tuple[str, ...]
    incomplete: tuple[str, ...]
    ranking: Ranking


def ranks(
    task: str, init: str, means: Mapping[str, Mapping[str, float | None]], methods: Sequence[str]
) -> Ranks | None:
    """Methods ranked by their mean on every model; `means` maps data set/model -> method -> mean over its seeds.

    Models without any mean are passed over. None if fewer than MIN_BLOCKS models or MIN_METHODS methods with a mean on
    all of them are left.
    """
    measured = {model: row for model, row in means.items() if any(mean is not None for mean in row.values())}
    columns = {name: [row.get(name) for row in measured.values()] for name in methods}
    complete = {name: column for name, column in columns.items() if None not in column}
    if len(measured) < MIN_BLOCKS or len(complete) < MIN_METHODS:
        return None
    mean_MQ = [list(row) for row in zip(*complete.values(), strict=True)]
    incomplete = tuple(name for name in methods if name not in complete)
    return Ranks(task, init, tuple(measured), incomplete, rank_methods(mean_MQ, tuple(complete)))
