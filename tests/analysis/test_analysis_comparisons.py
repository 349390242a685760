"""Comparison: its verdicts, and that everything rendered from it agrees with it."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from analysis_samples import cells_of, many, results_of

from analysis.compare.comparison import Comparison, Scope, Verdict
from analysis.compare.table import Table, tabulate
from analysis.render import words
from analysis.render.forest import forest
from analysis.render.style import house_style
from analysis.render.tables import comparison_record, to_csv, to_html, to_json, to_markdown
from analysis.runs.frame import Declared, Results

METHODS = ("bc", "pc", "bnn", "bnn+")


def random_study(rng: np.random.Generator) -> Results:
    """Some models, seeds and baselines; effects from none to many sd; some runs failed, some networks identical."""
    num_models, num_seeds = int(rng.integers(1, 5)), int(rng.integers(1, 8))
    methods = METHODS[: rng.integers(1, 5)]
    sd, groups = float(rng.choice([0.0005, 0.004, 0.02])), list[list[dict[str, object]]]()
    for model in range(num_models):
        base = rng.uniform(0.5, 0.9)
        runs = {"bnn++": base + rng.normal(0, sd, num_seeds)}
        for name in methods:
            runs[name] = base + rng.choice([0.0, 0.0, -0.002, 0.01, -0.03]) + rng.normal(0, sd, num_seeds)
        runs["fp"] = base + 0.05 + rng.normal(0, sd, num_seeds)
        for name, values in runs.items():
            twin = name == "pc" and rng.random() < 0.3 and "bc" in runs
            accuracies: list[float | str] = [
                "failed: oom" if rng.random() < 0.05 else round(float(value), 4)
                for value in (runs["bc"] if twin else values).clip(0, 1)
            ]
            cells = cells_of(name, accuracies, model=f"m{model}")
            groups.append(with_networks_of(groups[-1], cells) if twin else cells)
    margin = rng.choice([0.0, 0.2, 1.0, 5.0])
    return results_of(*groups, margin_points=float(margin) or None)


@cache
def table_of(seed: int) -> Table:
    return tabulate(random_study(np.random.default_rng(seed)))


def with_networks_of(others: list[dict[str, object]], cells: list[dict[str, object]]) -> list[dict[str, object]]:
    """The cells with the networks of the others, seed by seed."""
    return [{**row, "weights_sha256": other["weights_sha256"]} for row, other in zip(cells, others, strict=True)]


def answers_of(table: Table) -> Iterator[Comparison]:
    for block in table.blocks:
        yield from (*block.primary, *block.by_model, *block.architectures, *block.reference)


def require_consistent(answer: Comparison) -> None:
    """Asserts the properties that `comparison` promises for every Comparison."""
    interval, equivalence = answer.interval, answer.equivalence
    if answer.verdict is Verdict.no_pairs:
        assert answer.n == 0
        return
    assert answer.estimate is not None
    if answer.verdict is Verdict.estimate:
        assert (answer.p, interval, equivalence) == (None, None, None)
        return
    assert interval is not None
    assert answer.adjusted_p is not None
    assert answer.smallest_p is not None
    assert interval.confidence >= 0.95 - 1e-12
    assert answer.adjusted_p >= answer.smallest_p * (1 - 1e-12)
    rejects = answer.adjusted_p <= 0.05 * (1 + 1e-12)
    assert rejects == answer.is_difference == (0.0 not in interval)
    assert (answer.verdict is Verdict.better) == (interval.low > 0)
    assert (answer.verdict is Verdict.worse) == (interval.high < 0)
    if answer.is_difference:
        assert (answer.estimate > 0) == (answer.verdict is Verdict.better)
    if equivalence is not None:
        inside = -equivalence.margin < equivalence.interval.low and equivalence.interval.high < equivalence.margin
        assert inside == (equivalence.adjusted_p <= 0.05 * (1 + 1e-12))
        assert (answer.verdict is Verdict.equivalent) == (inside and not rejects)
    assert (answer.verdict is Verdict.too_small) <= (answer.smallest_p > 0.05)
    assert (answer.verdict is Verdict.indistinct) <= (answer.smallest_p <= 0.05 * (1 + 1e-12))


def require_told_alike(answer: Comparison) -> None:
    """Asserts that sentence, cells and record give this verdict and no other, and the Comparison's numbers."""
    sentence, record = words.sentence(answer), comparison_record(answer)
    said = {
        Verdict.better: " is better than ",
        Verdict.worse: " is worse than ",
        Verdict.equivalent: " are equivalent ",
        Verdict.indistinct: " are not distinguishable ",
        Verdict.too_small: "The design is too small ",
        Verdict.estimate: "; not tested.",
        Verdict.no_pairs: " are not compared ",
    }
    assert [verdict for verdict, text in said.items() if text in sentence] == [answer.verdict]
    assert record["verdict"] == answer.verdict.value
    assert words.verdict_cell(answer).startswith(answer.verdict.value)
    cell = words.difference_cell(answer)
    assert (cell == words.NONE) == (answer.estimate is None)
    shown = re.search(r"\[(\S+), (\S+)\]", cell)
    if shown and answer.interval and answer.verdict is not Verdict.estimate:
        low, high = (end.replace("−", "-").replace("∞", "inf") for end in shown.groups())
        assert (float(low) > 0, float(high) < 0) == (answer.verdict is Verdict.better, answer.verdict is Verdict.worse)
    p = words.p_cell(answer)
    if p != words.NONE:
        assert (float(p) <= 0.05) >= answer.is_difference


@pytest.mark.parametrize("seed", range(200))
def test_no_two_statements_about_a_random_study_disagree(seed: int) -> None:
    table = table_of(seed)
    document = json.loads(to_json(table))
    told = {(one["scope"], one["title"], one["baseline"], tuple(one["pairs"])): one for one in document["comparisons"]}
    markdown, html, csv = to_markdown(table, details=True), to_html(table), to_csv(table)
    for answer in answers_of(table):
        require_consistent(answer)
        require_told_alike(answer)
        own = told[answer.scope.value, answer.title, answer.baseline, tuple(s.model for s in answer.strata)]
        assert own["verdict"] == answer.verdict.value
        assert own["n"] == sum(len(pairs) for pairs in own["pairs"].values()) == answer.n
    for block in table.blocks:
        for answer in block.primary:
            for name in (answer.baseline, *answer.identical):
                row = next(line for line in markdown.splitlines() if line.startswith(f"| {name} |"))
                assert words.verdict_cell(answer, name) in row
                assert words.difference_cell(answer) in row
            assert answer.verdict.value in html
            assert answer.verdict.value in csv
        if seed % 10 == 0:
            with house_style():
                figure = forest(table, block).figure
            if figure is not None:
                texts = [text.get_text() for text in figure.axes[0].texts]
                drawn = [answer for answer in (*block.reference, *block.primary) if answer.estimate is not None]
                told_there = [text for text in texts if text]
                assert len(told_there) == len(drawn)
                for answer, text in zip(drawn, told_there, strict=True):
                    assert text.startswith(f"n={answer.n}")
                    assert text.endswith(words.verdict_cell(answer))


def test_the_random_studies_have_every_verdict() -> None:
    found = {answer.verdict for seed in range(200) for answer in answers_of(table_of(seed))}
    assert found == set(Verdict)


def primary(*groups: list[dict[str, object]], margin_points: float | None = None) -> tuple[Comparison, ...]:
    (block,) = tabulate(results_of(*groups, margin_points=margin_points)).blocks
    return block.primary


def test_the_estimate_is_the_mean_over_models_of_the_mean_paired_difference() -> None:
    (answer,) = primary(
        cells_of("bc", [0.5, 0.6, 0.7], model="a"),
        cells_of("bnn++", [0.6, 0.7], model="a"),
        cells_of("bc", [0.5, "failed: oom"], model="b"),
        cells_of("bnn++", [0.8, 0.9], model="b"),
    )
    assert answer.n == 3
    assert answer.estimate == pytest.approx((0.1 + 0.3) / 2)
    assert "a: bnn++: 1 not in the store" in answer.caveats
    assert "b: bc: 1 failed: oom" in answer.caveats


def test_failed_and_missing_members_stay_in_the_family() -> None:
    groups = [cells_of("bc", many(0.0)), cells_of("bnn", ["failed: oom"] * 8), cells_of("bnn++", many(0.1))]
    bc, bnn = primary(*groups)
    assert bc.family_size == 2
    assert bc.adjusted_p == pytest.approx(2 * 2 / 2**8)
    assert bnn.verdict is Verdict.no_pairs


def test_full_precision_is_shown_and_is_no_hypothesis() -> None:
    results = results_of(cells_of("fp", many(0.3)), cells_of("bc", many(0.0)), cells_of("bnn++", many(0.1)))
    (block,) = tabulate(results).blocks
    assert block.family_size == 1
    assert [(answer.scope, answer.verdict) for answer in block.reference] == [(Scope.reference, Verdict.estimate)]


def test_identical_networks_count_once_and_are_told() -> None:
    bc = cells_of("bc", many(0.0))
    bnn = [
        {**row, "weights_sha256": twin["weights_sha256"]}
        for row, twin in zip(cells_of("bnn", many(0.0)), bc, strict=True)
    ]
    (answer,) = primary(bc, bnn, cells_of("bnn++", many(0.1)))
    assert (answer.baseline, answer.identical, answer.family_size) == ("bc", ("bnn",), 1)
    text = to_markdown(tabulate(results_of(bc, bnn, cells_of("bnn++", many(0.1)))))
    assert "| identical to bc |" in text
    other = [{**row, "weights_sha256": "another"} for row in bnn[:1]] + bnn[1:]
    assert len(primary(bc, other, cells_of("bnn++", many(0.1)))) == 2


def test_a_candidate_identical_to_its_baseline_is_told() -> None:
    bc = cells_of("bc", many(0.0))
    same = [
        {**row, "weights_sha256": twin["weights_sha256"]}
        for row, twin in zip(cells_of("bnn++", many(0.0)), bc, strict=True)
    ]
    (answer,) = primary(bc, same, margin_points=0.5)
    assert answer.verdict is Verdict.equivalent
    assert "the two networks are identical, weight for weight, in 8 of 8 pairs" in answer.caveats


def test_models_are_tested_one_by_one_only_where_the_primary_test_rejects() -> None:
    results = results_of(
        *(cells_of("bc", many(0.0, 12), model=model) for model in "ab"),
        *(cells_of("bnn", many(0.1, 12), model=model) for model in "ab"),
        *(cells_of("bnn++", many(0.1, 12), model=model) for model in "ab"),
    )
    (block,) = tabulate(results).blocks
    found = {(answer.baseline, answer.strata[0].model): answer for answer in block.by_model}
    assert {key: answer.verdict for key, answer in found.items()} == {
        ("bc", "a"): Verdict.better,
        ("bc", "b"): Verdict.better,
        ("bnn", "a"): Verdict.estimate,
        ("bnn", "b"): Verdict.estimate,
    }
    assert found["bc", "a"].family_size == 4  # all declared: two baselines on two models
    assert found["bc", "a"].adjusted_p == pytest.approx(4 * 2 / 2**12)


def test_other_architectures_are_asked_about_from_six_models_on() -> None:
    groups = [
        cells_of(name, many(shift), model=f"m{k}") for k in range(6) for name, shift in (("bc", 0.0), ("bnn++", 0.1))
    ]
    (block,) = tabulate(results_of(*groups)).blocks
    (answer,) = block.architectures
    assert (answer.n, answer.verdict) == (6, Verdict.better)
    assert answer.p == pytest.approx(2 / 2**6)
    assert tabulate(results_of(*groups[:-2])).blocks[0].architectures == ()
    more = [cells_of(name, many(0.0), model=f"m{k}") for k in range(6) for name in ("pc", "bnn")]
    few = tabulate(results_of(*groups, *more)).blocks[0].architectures[0]
    assert few.verdict is Verdict.too_small
    assert "; 7 architectures could." in words.sentence(few)
    assert words.verdict_cell(few) == "design too small (needs 7 architectures)"


def test_a_difference_within_the_margin_says_so() -> None:
    (answer,) = primary(cells_of("bc", many(0.0)), cells_of("bnn++", [x + 0.001 for x in many(0.0)]), margin_points=1.0)
    assert answer.verdict is Verdict.better
    assert "the difference is within the declared margin of 1 points" in answer.caveats


def test_models_that_disagree_are_told() -> None:
    (answer,) = primary(
        cells_of("bc", many(0.0), model="a"),
        cells_of("bnn++", many(0.3), model="a"),
        cells_of("bc", many(0.0), model="b"),
        cells_of("bnn++", [x - 0.05 for x in many(0.0)], model="b"),
    )
    assert answer.verdict is Verdict.better
    assert any(caveat.startswith("the models disagree: the mean difference is +30.") for caveat in answer.caveats)


def test_a_baseline_that_a_later_launch_dropped_stays_in_the_family() -> None:
    results = results_of(cells_of("bc", many(0.0)), cells_of("bnn++", many(0.1)))
    first = frozenset(("digits", "bw", "scratch", "resnet20", name, 0) for name in ("bc", "pc", "bnn++", "fp"))
    kept = replace(results, declared={"digits": Declared(settings=first)})
    assert tabulate(kept).blocks[0].family_size == 2
    assert tabulate(results).blocks[0].family_size == 1


def test_the_family_is_the_grids_over_all_its_headings() -> None:
    results = results_of(
        *(
            cells_of(name, many(shift), init=init)
            for name, shift in (("bc", 0.0), ("bnn++", 0.1))
            for init in ("scratch", "finetune")
        )
    )
    assert {block.family_size for block in tabulate(results).blocks} == {2}
    other = results_of(*(cells_of(name, many(0.0), grid=grid) for name in ("bc", "bnn++") for grid in "ab"))
    assert {block.family_size for block in tabulate(other).blocks} == {1}


def test_another_primary_method_than_bnn_plus_plus_may_be_declared() -> None:
    results = results_of(cells_of("bc", many(0.0)), cells_of("mine", many(0.1)), cells_of("bnn++", many(0.05)))
    (block,) = tabulate(replace(results, declared={"digits": Declared(primary="mine")})).blocks
    assert [(answer.label, answer.baseline) for answer in block.primary] == [("mine", "bc"), ("mine", "bnn++")]


def test_new_test_images_have_an_interval_where_predictions_are_known() -> None:
    rng = np.random.default_rng(0)
    groups = [cells_of("bc", [0.5] * 4, run="bc"), cells_of("bnn++", [0.6] * 4, run="bnn++")]
    right = {"bc": rng.random(400) < 0.5, "bnn++": rng.random(400) < 0.6}
    (answer,) = tabulate(results_of(*groups), right=right.get).blocks[0].primary
    assert answer.images is not None
    assert -0.05 < answer.images.low < 0.1 < answer.images.high + 0.05
    assert "for new test images as well as new seeds" in words.images_sentence(answer)
    assert tabulate(results_of(*groups), right=lambda _: None).blocks[0].primary[0].images is None
