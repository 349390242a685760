"""What the numbers of a table mean and what they cannot say, as lines of text; only what applies to the table."""

from collections.abc import Iterator, Sequence

from analysis.compare.comparison import FULL_PRECISION, Entry, Table
from analysis.compare.ranks import Ranks
from analysis.runs.frame import shortened
from analysis.stats.paired import ALPHA, BCA_FROM, CONFIDENCE, Difference, is_underpowered, smallest_p

TIED = "†"
ACCURACY = (
    "Accuracy: top-1 on the test set, read once after the last epoch with every quantised weight exactly −1 or +1; "
    "mean ± sample standard deviation (ddof 1) over n seeds."
)


def notes(table: Table, *, details: bool = False) -> tuple[str, ...]:
    """Notes on what the table shows; details if gap and size are among its columns."""
    entries = [entry for block in table.blocks for entry in block.entries]
    return (
        ACCURACY,
        *_full_precision(entries),
        *_places(entries),
        *_differences(table, entries),
        *map(_ranks, table.ranks),
        *(_details(entries) if details else ()),
        *_published(table, entries),
    )


def _full_precision(entries: Sequence[Entry]) -> Iterator[str]:
    if any(entry.quantizer == FULL_PRECISION for entry in entries):
        yield "fp is full precision: not a binary network."


def _places(entries: Sequence[Entry]) -> Iterator[str]:
    standings = [entry.standing for entry in entries if entry.standing]
    if standings:
        tied = (
            f" {TIED} tied: the two are not separable, for the {CONFIDENCE:.0%} interval of their paired difference "
            "contains 0, or is undefined, or comes from fewer than 6 pairs."
        )
        yield (
            "Bold is the best mean of the binary methods of a model, underlined the second."
            + any(standing.tied for standing in standings) * tied
        )


def _differences(table: Table, entries: Sequence[Entry]) -> Iterator[str]:
    differences = [entry.difference for entry in entries if entry.difference]
    if not differences:
        return
    bca = f", BCa from {BCA_FROM} pairs on" if any(difference.n >= BCA_FROM for difference in differences) else ""
    yield (
        f"{table.against} − row: mean of the differences paired by seed, in percentage points, with its "
        f"{CONFIDENCE:.0%} interval (Student's t{bca}) over n pairs."
    )
    sizes = {block.title: block.family_size for block in table.blocks if block.family_size}
    same = len(set(sizes.values())) == 1
    what = f"{next(iter(sizes.values()))} comparisons" + " each" * (len(sizes) > 1)
    yield (
        "adjusted p: two-sided sign-flip test of the paired differences, adjusted by Holm's method over the family of "
        f"all comparisons with {table.against} under one heading, run or not: "
        + (what if same else "; ".join(f"{title}: {size}" for title, size in sizes.items()))
        + "."
    )
    yield from _powerless(entries)
    if any(difference.low is None for difference in differences):
        yield "no interval: it is undefined for one pair, and for differences that are all equal."


def _powerless(entries: Sequence[Entry]) -> Iterator[str]:
    few: list[Difference] = [
        entry.difference for entry in entries if entry.difference and entry.adjusted and entry.adjusted.underpowered
    ]
    if few:
        counts = sorted({difference.n for difference in few})
        in_family = " in its family" if any(not is_underpowered(n) for n in counts) else ""
        yield (
            f"underpowered: no data from so few pairs could reach p ≤ {ALPHA}{in_family} (the smallest possible p, "
            f"not adjusted, is {', '.join(f'{smallest_p(n):.3g} for n={n}' for n in counts)}); "
            "it is no evidence of equality."
        )


def _ranks(ranks: Ranks) -> str:
    """One line, `Across 6 models (task bw, init scratch), ...`."""
    ranking, test = ranks.ranking, ranks.ranking.friedman
    order = ", ".join(f"{name} {rank:.2f}" for name, rank in zip(ranking.methods, ranking.average_ranks, strict=True))
    groups = "; ".join(", ".join(group) for group in ranking.groups) or "none"
    left_out = f" Left out, without a mean on every model: {shortened(ranks.incomplete)}." if ranks.incomplete else ""
    return (
        f"Across {len(ranks.models)} models (task {ranks.task}, init {ranks.init}; {shortened(ranks.models)}), by one "
        f"mean each: average ranks, 1 is best: {order}. Are all alike? Friedman p = {test.chi2_p:.2g}, Iman and "
        f"Davenport p = {test.f_p:.2g}. Ranks that differ by {ranking.critical_difference:.2f} or more are separable "
        f"(Nemenyi, {ALPHA}); not separable from each other: {groups}.{left_out}"
    )


def _details(entries: Sequence[Entry]) -> Iterator[str]:
    if any(entry.gap_mean is not None for entry in entries):
        yield (
            "soft − hard: test accuracy with the weights as trained, F(w*), minus that with sign(w*), in percentage "
            "points, mean over seeds."
        )
    if any(entry.num_bytes is not None for entry in entries):
        yield "size: one bit for each binary parameter, four bytes for each other one; 1 kB is 1,000 bytes."


def _published(table: Table, entries: Sequence[Entry]) -> Iterator[str]:
    publication = table.publication
    if publication is None:
        return
    shown = [entry.published for entry in entries if entry.published]
    yield f"Published: {publication.citation}."
    if publication.protocol:
        yield f"How the source measures: {publication.protocol}."
    if any(number.verified for number in shown):
        yield f"Published numbers were verified in {publication.verified_in}."
    if any(not number.verified for number in shown):
        yield "unverified: the number was not read in the source itself."
    yield (
        f"Verdicts, ours − published against a margin declared beforehand: reproduced, the {1 - 2 * ALPHA:.0%} "
        "interval shown lies within ± margin (two one-sided t tests); differs, the "
        f"{1 - ALPHA:.0%} interval lies wholly outside; inconclusive, neither: the runs are too few, or it is close to "
        "the margin; untestable, fewer than two runs, or runs without spread."
    )
