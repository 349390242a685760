"""What may be said of the methods of one block: adjusted p, the best and the second of each column. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from analysis.compare.groups import Group, difference
from analysis.stats.families import holm
from analysis.stats.paired import ALPHA, Difference, is_underpowered, smallest_p

_ROUNDING = 1e-12
"""Means of fractions that differ by less are equal."""

Member = tuple[str, str]
"""Quantizer and model: its comparison with the reference."""


@dataclass(frozen=True)
class Adjusted:
    """Holm's p of one comparison in a family of `size`, None where it is underpowered.

    That is where no data from so many pairs, in all comparisons of the family, could bring it to ALPHA or below.
    """

    p: float | None
    underpowered: bool


class Place(str, Enum):
    """Of a binary method's mean among those of its model."""

    best = "best"
    second = "second"


@dataclass(frozen=True)
class Standing:
    """A method's place, and whether it is tied: the best and the second are not separable."""

    place: Place
    tied: bool


def adjusted(differences: Mapping[Member, Difference], family_size: int) -> dict[Member, Adjusted]:
    """Holm's adjustment over the declared family: members without a difference, for want of runs, count as p = 1."""
    smallest = holm({member: smallest_p(own.n) for member, own in differences.items()}, family_size).adjusted
    found = holm({member: own.p for member, own in differences.items()}, family_size).adjusted
    return {
        member: Adjusted(p=None, underpowered=True)
        if smallest[member] > ALPHA
        else Adjusted(found[member], underpowered=False)
        for member in differences
    }


def standings(methods: Mapping[str, Group]) -> dict[str, Standing]:
    """Places of the binary methods on one model, by mean hard accuracy; methods without a mean have none.

    Several may be best, then none is second; several may be second.
    """
    means = {name: group.mean for name, group in methods.items() if group.mean is not None}
    if len(means) < 2:  # noqa: PLR2004 - alone, nothing is best
        return {}
    best = _highest(means)
    if len(best) > 1:
        return {name: Standing(Place.best, tied=True) for name in best}
    (winner,) = best
    second = _highest({name: mean for name, mean in means.items() if name != winner})
    tied = {name for name in second if not _separable(methods[winner], methods[name])}
    return {
        winner: Standing(Place.best, tied=bool(tied)),
        **{name: Standing(Place.second, tied=name in tied) for name in second},
    }


def _highest(means: Mapping[str, float]) -> list[str]:
    highest = max(means.values())
    return [name for name, mean in means.items() if highest - mean <= _ROUNDING]


def _separable(winner: Group, other: Group) -> bool:
    """Whether the paired interval is above 0, from enough pairs; seeds in common are what can be compared."""
    found = difference(winner, other)
    return found is not None and found.low is not None and found.low > 0 and not is_underpowered(found.n)
