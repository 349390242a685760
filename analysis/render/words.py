"""A Comparison in words: numbers, sentences, and the notes below a table. Computes nothing."""

import math
from collections.abc import Iterable, Iterator, Sequence

from analysis.compare.comparison import Comparison, Scope, Verdict
from analysis.compare.family import FULL_PRECISION
from analysis.compare.published import Reproduction
from analysis.compare.table import Block, Entry, Ranks, Table
from analysis.runs.frame import shortened
from analysis.stats.stratified import ALPHA, EXACT_PAIRS, Interval

NONE = "—"
SYMBOLS = {
    Verdict.better: "▲",
    Verdict.worse: "▼",
    Verdict.equivalent: "=",
    Verdict.indistinct: "≈",
    Verdict.too_small: "?",
    Verdict.estimate: "·",
    Verdict.no_pairs: "–",
}
ACCURACY = (
    "Accuracy: top-1 on the test set, in %, read once after the last epoch with every quantized weight exactly −1 or "
    "+1; mean ± sample standard deviation (ddof 1) over n seeds."
)
_SMALL = 0.005
"""Differences in points that two decimals would print as zero."""


def in_points(fraction: float) -> str:
    """Percentage points: `+0.53`, `−0.20`, `0.00`; if two decimals would hide a value, it keeps its sign: `+0.0012`."""
    points = 100 * fraction
    if math.isinf(points):
        return "+∞" if points > 0 else "−∞"
    if abs(points) < 1e-9:  # noqa: PLR2004 - rounding
        return "0.00"
    text = f"{points:+.2f}" if abs(points) >= _SMALL else f"{points:+.1g}"
    return text.replace("-", "−")


def interval_of(interval: Interval | None) -> str:
    """`[+0.20, +0.86]`; `no bound` if the design cannot exclude any value."""
    if interval is None or (math.isinf(interval.low) and math.isinf(interval.high)):
        return "no bound"
    return f"[{in_points(interval.low)}, {in_points(interval.high)}]"


def percent(share: float) -> str:
    """`95 %`, `98.8 %`."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def p_value(p: float) -> str:
    """`0.031`, `8e-06`."""
    return f"{p:.2g}"


def count(number: int, what: str) -> str:
    """`1 pair`, `8 pairs`."""
    return f"{number} {what}{'s' * (number != 1)}"


def lengths(epochs: Iterable[int]) -> str:
    """`1 epoch`, `10 or 16 epochs`."""
    *others, last = sorted(set(epochs))
    return " or ".join([*map(str, others), count(last, "epoch")])


def models_of(answer: Comparison) -> str:
    """`on resnet8 and vit`."""
    names = answer.models or tuple(stratum.model for stratum in answer.strata)
    if answer.scope is Scope.architectures:
        return f"over {count(answer.n, 'architecture')}"
    if len(names) > 4:  # noqa: PLR2004
        return f"on {len(names)} models"
    return "on " + " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def baseline_of(answer: Comparison) -> str:
    """`bc`, `bc = bnn (identical networks)`."""
    if answer.identical:
        return f"{' = '.join((answer.baseline, *answer.identical))} (identical networks)"
    return f"{answer.baseline} (full precision)" if answer.baseline == FULL_PRECISION else answer.baseline


def sentence(answer: Comparison) -> str:
    """The answer in one sentence; its caveats are separate."""
    ours, theirs, where = answer.label, baseline_of(answer), models_of(answer)
    if answer.estimate is None or answer.verdict is Verdict.no_pairs:
        return f"{ours} and {theirs} are not compared {where}: no seed is measured on both sides."
    observed = f"{in_points(answer.estimate)} points"
    if answer.verdict is Verdict.estimate:
        return f"{ours} − {theirs} {where}: {observed} ({count(answer.n, 'pair')}); not tested."
    tested = f"{count(answer.n, 'pair')}, adjusted p {p_value(answer.adjusted_p or 0.0)}"
    level = percent(answer.interval.confidence) if answer.interval else ""
    if answer.is_difference:
        return (
            f"{ours} is {answer.verdict.value} than {theirs} {where} by {100 * abs(answer.estimate):.2f} points "
            f"({level} interval of the difference {interval_of(answer.interval)}; {tested})."
        )
    if answer.verdict is Verdict.equivalent and answer.equivalence:
        own = answer.equivalence
        return (
            f"{ours} and {theirs} are equivalent {where} within {100 * own.margin:g} points: the difference is "
            f"{observed}, its {percent(own.interval.confidence)} interval {interval_of(own.interval)} lies within the "
            f"margin ({count(answer.n, 'pair')}, adjusted p of equivalence {p_value(own.adjusted_p)})."
        )
    if answer.verdict is Verdict.too_small:
        each = " on each model" if len(answer.models) > 1 else ""
        return (
            f"The design is too small to tell {ours} from {theirs} {where}, whatever the values: with "
            f"{count(answer.n, 'pair')} in a family of {answer.family_size} no adjusted p is below "
            f"{p_value(answer.smallest_p or 1.0)}; {needed(answer)}{each} could. Observed: {observed}."
        )
    return (
        f"{ours} and {theirs} are not distinguishable {where}: the difference is {observed}, {level} interval "
        f"{interval_of(answer.interval)} ({tested}). That is no proof of equality."
    )


def needed(answer: Comparison) -> str:
    """What a too small design needs: `4 seeds` per model; for other architectures, `9 architectures`."""
    return count(answer.num_needed or 0, "architecture" if answer.scope is Scope.architectures else "seed")


def images_sentence(answer: Comparison) -> str:
    """The interval over new test images as a sentence; empty if there is none."""
    if answer.images is None or answer.estimate is None:
        return ""
    return (
        f"{answer.label} − {baseline_of(answer)} {models_of(answer)}, for new test images as well as new seeds: "
        f"{in_points(answer.estimate)} points, {percent(answer.images.confidence)} bootstrap interval "
        f"{interval_of(answer.images)}."
    )


def difference_cell(answer: Comparison | None) -> str:
    """`+0.53 [+0.20, +0.86] (8)`; untested `+0.53 (8)`; without bounds `+0.53, no bound (3)`."""
    if answer is None or answer.estimate is None:
        return NONE
    if answer.interval is None:
        return f"{in_points(answer.estimate)} ({answer.n})"
    shown = interval_of(answer.interval)
    return f"{in_points(answer.estimate)}{' ' if shown.startswith('[') else ', '}{shown} ({answer.n})"


def p_cell(answer: Comparison | None) -> str:
    """Adjusted p; a dash if the design cannot reach 0.05, because p then carries no information."""
    if answer is None or answer.adjusted_p is None or answer.verdict is Verdict.too_small:
        return NONE
    return p_value(answer.adjusted_p)


def verdict_cell(answer: Comparison | None, quantizer: str = "") -> str:
    """The verdict; if the design is too small, with what it needs; for identical networks, the tested baseline."""
    if answer is None:
        return NONE
    if quantizer in answer.identical:
        return f"identical to {answer.baseline}"
    if answer.verdict is Verdict.too_small:
        return f"{answer.verdict.value} (needs {needed(answer)})"
    return str(answer.verdict.value)


def tuned_cell(block: Block, quantizer: str) -> str:
    """`12 × 2 seeds`, `given` or `no`; several of these if models differ."""
    own = [entry.tuned for entry in block.entries if entry.quantizer == quantizer]
    return ", ".join(dict.fromkeys("no" if budget is None else str(budget) for budget in own))


def explanation(verdict: Verdict, family_size: int) -> str:
    """The meaning of a verdict, for all comparisons that have it."""
    family = f"{count(family_size, 'comparison')}"
    meanings: dict[Verdict, str] = {
        Verdict.better: f"p ≤ {ALPHA} after Holm's adjustment for {family}; the candidate is the more accurate one.",
        Verdict.worse: f"p ≤ {ALPHA} after Holm's adjustment for {family}; the candidate is the less accurate one.",
        Verdict.equivalent: (
            f"Two one-sided tests put the difference within the declared margin, p ≤ {ALPHA} after Holm's adjustment."
        ),
        Verdict.indistinct: (
            f"Enough seeds for a test; p is above {ALPHA} after adjustment for {family}. That is no proof of equality."
        ),
        Verdict.too_small: (
            f"No data from so few pairs could give p ≤ {ALPHA} in a family of {family_size}. Neither a difference nor "
            "equality may be read from them."
        ),
        Verdict.estimate: "Shown for orientation; no test was made, so no difference is claimed.",
        Verdict.no_pairs: "Nothing to compare: runs failed, or have not been made.",
    }
    return meanings[verdict]


def notes(table: Table, *, details: bool = False) -> tuple[str, ...]:
    """Notes on the table's numbers, as far as they apply; `details`: gap and size are among the columns."""
    entries = [entry for block in table.blocks for entry in block.entries]
    return (
        ACCURACY,
        *(["fp is full precision: not a binary network, and no hypothesis."] if _has_fp(entries) else []),
        *(
            ["Bold: the highest mean among the binary methods that have all seeds of the model; not a test."]
            if any(entry.is_best for entry in entries)
            else []
        ),
        *_comparison_notes(table),
        *tuning_notes(table),
        *map(_ranks, table.ranks),
        *(_details(entries) if details else ()),
        *_published(table, entries),
    )


def _has_fp(entries: Sequence[Entry]) -> bool:
    return any(entry.quantizer == FULL_PRECISION for entry in entries)


def _comparison_notes(table: Table) -> Iterator[str]:
    answers = [answer for block in table.blocks for answer in block.primary]
    if not any(answer.n for answer in answers):
        return
    if not table.is_declared:
        yield "The grid declared another question before its runs, so these comparisons are exploratory."
    confidences = sorted({answer.interval.confidence for answer in answers if answer.interval})
    level = " to ".join(dict.fromkeys(percent(value) for value in (confidences[0], confidences[-1])))
    yield (
        f"{table.label} − row: mean over the models of the mean difference, paired by seed, in percentage points; in "
        f"brackets the interval ({level}) that inverts the test at the level at which Holm's method judged it; (pairs)."
    )
    sizes = {block.grid: block.family_size for block in table.blocks if block.family_size}
    family = "; ".join(
        f"{count(size, 'comparison')}" + (f" in {grid}" if len(sizes) > 1 else "") for grid, size in sizes.items()
    )
    drawn = max(answer.p_error for answer in answers)
    monte_carlo = (
        f" With more than {EXACT_PAIRS} pairs sign patterns are drawn; the standard error of p is {drawn:.1g} or less."
        if drawn
        else ""
    )
    yield (
        "adjusted p: exact sign-flip test, stratified by model, two-sided, adjusted by Holm's method over the primary "
        f"family ({family}, run or not).{monte_carlo}"
    )
    for verdict in Verdict:
        if any(answer.verdict is verdict for answer in answers) and verdict not in {Verdict.better, Verdict.worse}:
            size = max(answer.family_size for answer in answers if answer.verdict is verdict)
            yield f"{verdict.value}: {explanation(verdict, size)}"
    if table.margin is not None:
        yield f"Margin of equivalence, declared in the grid: {100 * table.margin:g} points."
    for answer in answers:
        if answer.caveats:
            yield f"{answer.label} − {baseline_of(answer)}: {'; '.join(answer.caveats)}."


def tuning_notes(table: Table) -> Iterator[str]:
    """Notes on the tuning column."""
    budgets = {entry.tuned for block in table.blocks for entry in block.entries} - {None}
    if epochs := {budget.epochs for budget in budgets if budget and budget.epochs and not budget.given}:
        yield (
            f"tuned (trials): settings tried for each method on each model × seeds of each, {lengths(epochs)} a run. "
            "Chosen was the best mean validation accuracy of hard weights; the accuracies here are of other seeds, and "
            "no trial read the test set. What was tried and chosen: python -m analysis tuning."
        )
    for given in sorted({budget.given for budget in budgets if budget and budget.given}):
        yield f"given: values that were not chosen by trials of this grid, but taken from {given}."


def _ranks(ranks: Ranks) -> str:
    """One line: `Ranks over 6 models (task bw, init scratch; ...), 1 is best: ...`."""
    ranking, test = ranks.ranking, ranks.ranking.friedman
    order = ", ".join(f"{name} {rank:.2f}" for name, rank in zip(ranking.methods, ranking.average_ranks, strict=True))
    groups = "; ".join(", ".join(group) for group in ranking.groups) or "none"
    left_out = f" Left out, without a mean on every model: {shortened(ranks.incomplete)}." if ranks.incomplete else ""
    return (
        f"Ranks over {len(ranks.models)} models (task {ranks.task}, init {ranks.init}; {shortened(ranks.models)}), "
        f"1 is best: {order}. Friedman p = {test.chi2_p:.2g}, Iman and Davenport p = {test.f_p:.2g}; ranks closer than "
        f"{ranking.critical_difference:.2f} are not separable (Nemenyi, {ALPHA}): {groups}. These tests take models "
        f"for independent samples, which relatives on one test set are not: a description, no verdict.{left_out}"
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
    if any(not number.verified for number in shown):
        yield "unverified: the number was not read in the source itself."
    yield (
        "Verdicts, ours − published against the grid's margin, adjusted for all numbers tested (Bonferroni). "
        "reproduced: two one-sided t tests put the difference within ± margin. differs: the interval lies wholly "
        "outside. inconclusive: neither, because the runs are too few or the difference is close to the margin. not "
        "comparable: the runs do not follow the published protocol."
    )


def published_cell(number: Reproduction | None) -> str:
    """`inconclusive: −0.12 [−0.60, +0.36] (3), margin 0.50`; `not comparable: training.epochs is ...`."""
    if number is None:
        return NONE
    if number.test is None:
        why = "; ".join(number.differences)
        return f"{number.verdict.value}{': ' if why else ''}{why}"
    test = number.test
    interval = (
        "no interval" if test.low is None or test.high is None else f"[{in_points(test.low)}, {in_points(test.high)}]"
    )
    return f"{number.verdict.value}: {in_points(test.difference)} {interval} ({test.n}), margin {100 * test.margin:.2f}"


def published_sentence(block: Block, entry: Entry) -> str:
    """One sentence with a published number, ours, and the verdict."""
    number = entry.published
    if number is None:
        return ""
    unverified = "" if number.verified else ", not verified in its source"
    ours = "no run" if entry.top1_hard_mean is None else f"{100 * entry.top1_hard_mean:.2f} % ({entry.num_done})"
    return (
        f"{entry.quantizer} on {entry.model} ({block.dataset}): published {100 * number.accuracy:.2f} %{unverified}, "
        f"ours {ours}; {published_cell(number)}."
    )
