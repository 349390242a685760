"""What the comparisons of a table say, in sentences that need no statistics to be read. Pure functions."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from analysis.compare.comparison import FULL_PRECISION, Block, Entry, Table
from analysis.compare.published import Reproduction
from analysis.render.tables import in_points
from analysis.stats.equivalence import Verdict
from analysis.stats.paired import ALPHA, Difference, fewest_pairs


class Finding(str, Enum):
    """What a comparison of the reference with a quantizer came to."""

    better = "better"
    worse = "worse"
    inseparable = "cannot be told apart"
    underpowered = "underpowered"
    no_pair = "not compared"


@dataclass(frozen=True)
class Said:
    """One comparison of a block in words."""

    finding: Finding
    quantizer: str
    text: str


@dataclass(frozen=True)
class Section:
    """All comparisons of one block that came to one finding; `explanation` is of them together."""

    finding: Finding
    explanation: str
    said: tuple[Said, ...]


def finding_of(entry: Entry) -> Finding:
    """By Holm's p alone: an interval is of one comparison, and does not know of the others."""
    if entry.difference is None or entry.adjusted is None:
        return Finding.no_pair
    if entry.adjusted.p is None:
        return Finding.underpowered
    if entry.adjusted.p > ALPHA:
        return Finding.inseparable
    return Finding.better if entry.difference.mean > 0 else Finding.worse


def compared(block: Block) -> list[Entry]:
    """The members of the block's family: entries with cells whose reference has cells on the same model, too."""
    has_cells = {(e.quantizer, e.model) for e in block.entries if e.num_done or e.missing or e.conflict}
    return [
        entry
        for entry in block.entries
        if (entry.quantizer, entry.model) in has_cells and (entry.reference, entry.model) in has_cells
    ]


def sections(block: Block, against: str) -> list[Section]:
    """Every comparison of the block once, by finding; clear ones first."""
    said = [_say(entry, block, against) for entry in sorted(compared(block), key=_by_model(block))]
    return [
        Section(finding, _explanation(finding, block), own)
        for finding in Finding
        if (own := tuple(one for one in said if one.finding is finding))
    ]


def _by_model(block: Block) -> Callable[[Entry], int]:
    return lambda entry: block.models.index(entry.model)


def _say(entry: Entry, block: Block, against: str) -> Said:
    finding = finding_of(entry)
    name = f"{entry.quantizer} (full precision)" if entry.quantizer == FULL_PRECISION else entry.quantizer
    return Said(finding, entry.quantizer, _sentence(finding, entry, block, against, name))


def _sentence(finding: Finding, entry: Entry, block: Block, against: str, name: str) -> str:
    found, p = entry.difference, entry.adjusted.p if entry.adjusted else None
    if found is None:
        why = [
            f"{who}: {reason}"
            for who, one in ((name, entry), (against, _reference(entry, block)))
            if (reason := _why(one))
        ]
        because = f" ({'; '.join(why)})" if why else ""
        return f"{against} and {name} on {entry.model}: no seed is measured on both sides{because}."
    pairs = f"{found.n} pair{'s' * (found.n > 1)}"
    if p is None:
        return (
            f"{against} and {name} on {entry.model} cannot be told apart by any {pairs}: {_observed(found)}, "
            f"underpowered.{_caution(found)}"
        )
    tested = f"adjusted p {p:.2g}, {pairs}"
    if finding is Finding.inseparable:
        told = f"{against} and {name} on {entry.model} cannot be told apart: {_observed(found)}, {tested}."
        return told + _caution(found)
    return f"{against} is {finding.value} than {name} on {entry.model} by {_amount(found)}; {tested}."


def _observed(found: Difference) -> str:
    """`the difference is +0.53 points [−0.20, +1.27]`."""
    if found.sd == 0:
        return f"the observed difference is {in_points(found.mean)} points in every pair"
    return f"the observed difference is {_with_interval(found.mean, found.low, found.high)}"


def _with_interval(mean: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{in_points(mean)} points, without an interval"
    return f"{in_points(mean)} points [{in_points(low)}, {in_points(high)}]"


def _amount(found: Difference) -> str:
    """`0.53 points [0.20, 0.86]`, for better and worse alike: of how much, not of which sign."""
    size = f"{100 * abs(found.mean):.2f} points"
    if found.low is None or found.high is None:
        return f"{size} in every pair"
    ends = (found.low, found.high) if found.mean > 0 else (-found.high, -found.low)
    low, high = (in_points(end).removeprefix("+") for end in ends)
    return f"{size} [{low}, {high}]"


def _caution(found: Difference) -> str:
    """Where the interval and the verdict seem to disagree."""
    if found.low is None or found.high is None or found.low <= 0 <= found.high:
        return ""
    return " Its interval excludes 0: a hint, not a result."


def _reference(entry: Entry, block: Block) -> Entry:
    (found,) = (e for e in block.entries if (e.quantizer, e.model) == (entry.reference, entry.model))
    return found


def _why(entry: Entry) -> str:
    return entry.conflict or ", ".join(f"{count} {reason}" for reason, count in entry.missing)


def _explanation(finding: Finding, block: Block) -> str:
    size = block.family_size
    family = f"{size} comparisons" if size > 1 else "one comparison"
    if finding in {Finding.better, Finding.worse}:
        return f"Real: p ≤ {ALPHA} after adjustment for {family}."
    if finding is Finding.inseparable:
        return (
            f"Enough seeds for a test; p is above {ALPHA} after adjustment for {family}. That is no proof of equality."
        )
    if finding is Finding.underpowered:
        return (
            f"Too few pairs for a test in a family of {family}: no data could reach p ≤ {ALPHA}. With "
            f"{fewest_pairs(size)} pairs each, it could. Neither a difference nor equality may be read from these."
        )
    return "Nothing to compare: runs failed, or have not been made."


def counts(table: Table) -> dict[str, Counter[Finding]]:
    """How many comparisons came to each finding: with binary quantizers, and with full precision."""
    found: dict[str, Counter[Finding]] = {"binary quantizers": Counter(), "full precision (fp)": Counter()}
    for block in table.blocks:
        for entry in compared(block):
            kind = "full precision (fp)" if entry.quantizer == FULL_PRECISION else "binary quantizers"
            found[kind][finding_of(entry)] += 1
    return {kind: counter for kind, counter in found.items() if counter}


def bottom_line(table: Table) -> tuple[str, ...]:
    """The whole in a few sentences: how many differences are real, and what may not be read from the others."""
    total = sum(counts(table).values(), Counter[Finding]())
    if not total.total():
        return (f"Nothing is compared: no model here has runs of {table.against} and of another quantizer.",)
    real = total[Finding.better] + total[Finding.worse]
    return (_how_many_real(table, real, total), *_about_the_others(table.against, total))


def _how_many_real(table: Table, real: int, total: "Counter[Finding]") -> str:
    n = total.total()
    if not real:
        share = "The one comparison does not show" if n == 1 else f"None of the {n} comparisons shows"
        return f"{share} a difference that can be taken as real."
    directions = [f"{word.value} in {total[word]}" for word in (Finding.better, Finding.worse) if total[word]]
    share = "The one comparison shows" if n == 1 else f"{real} of {n} comparisons show{'s' * (real == 1)}"
    what = "a real difference" if real == 1 else "real differences"
    return f"{share} {what}: {table.against} is {' and '.join(directions)}."


def _about_the_others(against: str, total: "Counter[Finding]") -> Iterator[str]:
    if number := total[Finding.inseparable]:
        yield f"In {number}, the seeds were enough for a test, and {against} and the other cannot be told apart."
    if number := total[Finding.underpowered]:
        how_many = f"All {number}" if 1 < number == total.total() else str(number)
        yield (
            f"{how_many} {'is' if number == 1 else 'are'} underpowered: no data from so few seeds could show a "
            "difference, so neither a difference nor equality may be read from them."
        )
    if number := total[Finding.no_pair]:
        yield f"{number} could not be made for want of runs."


def across_models(table: Table) -> Iterator[str]:
    """What the ranks over models say of the reference; nothing where there are no ranks, or it is not ranked."""
    references = {entry.reference for block in table.blocks for entry in block.entries if entry.reference}
    for ranks in table.ranks:
        average = dict(zip(ranks.ranking.methods, ranks.ranking.average_ranks, strict=True))
        for own in sorted(references & average.keys()):
            rank, alike = average[own], ranks.ranking.friedman.f_p
            yield (
                f"Over {len(ranks.models)} models by one mean each (task {ranks.task}, init {ranks.init}), "
                f"{table.against} has the average rank {rank:.2f} of {len(average)} binary methods, 1 being best. By "
                f"ranks it is {_by_rank(own, average, ranks.ranking.critical_difference)} (Nemenyi, all pairs "
                f"together, {ALPHA}; that all methods are alike: p = {alike:.2g})."
            )


def _by_rank(own: str, average: Mapping[str, float], critical_difference: float) -> str:
    """`better than bc, pc; not separable from bnn`."""
    groups: dict[str, list[str]] = {"better than": [], "worse than": [], "not separable from": []}
    for name, rank in average.items():
        if name != own:
            is_far = abs(rank - average[own]) >= critical_difference
            direction = "better than" if rank > average[own] else "worse than"
            groups[direction if is_far else "not separable from"].append(name)
    return "; ".join(f"{words} {', '.join(names)}" for words, names in groups.items() if names)


def published(table: Table) -> list[tuple[Verdict, str]]:
    """Verdicts on published numbers, in words; none without a publication."""
    return [
        (_verdict(entry.published), _published(entry, entry.published, block))
        for block in table.blocks
        for entry in block.entries
        if entry.published
    ]


def _verdict(number: Reproduction) -> Verdict:
    return number.test.verdict if number.test else Verdict.untestable


def _published(entry: Entry, number: Reproduction, block: Block) -> str:
    unverified = "" if number.verified else ", a number that nobody has verified in its source"
    what = f"{entry.quantizer} on {entry.model} ({block.dataset}), published {100 * number.accuracy:.2f} %{unverified}"
    margin = f"margin ± {100 * number.margin:.2f} points"
    test = number.test
    if test is None or entry.top1_hard_mean is None:
        return f"{what}: no run to compare with it; {margin}."
    ours = f"ours {100 * entry.top1_hard_mean:.2f} %, {test.n} run{'s' * (test.n > 1)}"
    interval = _with_interval(test.difference, test.low, test.high)
    return f"{what}; {ours}: difference {interval} ({1 - 2 * ALPHA:.0%} interval); {margin}."
