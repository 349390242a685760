"""Many comparisons at once: Holm's method over a declared family, and the level it applies to each member."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

from analysis.stats.stratified import ALPHA, finite, smallest_p

Member = TypeVar("Member", bound=Hashable)
_ROUNDING = 1e-12


def holm(p: Mapping[Member, float], size: int) -> dict[Member, float]:
    """Adjusted p(i) = max over j <= i of min(1, (size - j + 1) p(j)), where p(1) <= p(2) <= ...; rejected if <= ALPHA.

    Holm (1979): the chance of rejecting any true null hypothesis of the family is at most ALPHA, whatever the
    dependence between the comparisons. The family is declared before results are seen: members without a p (failed or
    missing runs) count as p = 1, so that a failed run cannot make the others significant.

    Raises:
        ValueError: a p outside [0, 1], or more p values than the family has members.
    """
    if len(p) > size:
        raise ValueError(f"{len(p)} comparisons in a family declared with {size}")
    values = finite(list(p.values()), at_least=0)
    if ((values < 0) | (values > 1)).any():
        raise ValueError(f"p from {values.min():g} to {values.max():g}; expected probabilities")
    # statsmodels' multipletests runs the garbage collector in every call, which takes 0.1 s or more.
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(values[order] * (size - np.arange(len(values)))))
    return dict(zip(p, adjusted.tolist(), strict=True))


def is_rejected(adjusted_p: float) -> bool:
    """Whether an adjusted p rejects: it is <= ALPHA, up to rounding (five times 0.01 is)."""
    return adjusted_p <= ALPHA * (1 + _ROUNDING)


def levels(p: Mapping[Member, float], size: int) -> dict[Member, float]:
    """The level that Holm's method applies to each member: ALPHA / (size - i + 1) for the i-th smallest p if rejected.

    Members that are not rejected get the level at which Holm stopped. So p <= level exactly for the rejected ones, and
    an interval of confidence 1 - level that inverts the test excludes 0 exactly when the family rejects.
    """
    adjusted, found, num_rejected = holm(p, size), {}, 0
    for member in sorted(p, key=lambda member: (p[member], adjusted[member])):
        found[member] = ALPHA / (size - num_rejected)
        num_rejected += is_rejected(adjusted[member])
    return found


def reachable(num_pairs: Mapping[Member, int], size: int) -> dict[Member, float]:
    """The smallest adjusted p that any data could give each member of a family of `size`.

    This is Holm's adjustment of every member's smallest possible p. If it is above ALPHA, the design is too small and
    the member's p carries no information about the methods.
    """
    return holm({member: smallest_p(n) for member, n in num_pairs.items()}, size)


def seeds_needed(num_models: int, size: int) -> int:
    """Fewest seeds per model, for num_models models, with which the first step of Holm's method can reject."""
    num_seeds = 1
    while not is_rejected(size * smallest_p(num_seeds * num_models)):
        num_seeds += 1
    return num_seeds
