"""Golden files are compared whole; `python tests/analysis/test_analysis_tables.py` rewrites them."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from analysis_samples import cells_of, example, many, results_of
from needs import no_latex

from analysis.compare.comparison import Verdict
from analysis.compare.family import completions
from analysis.compare.table import Entry, Table, tabulate
from analysis.render.tables import to_csv, to_html, to_json, to_latex, to_markdown
from analysis.runs.frame import Declared, records

GOLDEN = Path(__file__).parent / "golden"
RENDERED: dict[str, Callable[[Table], str]] = {"md": to_markdown, "tex": to_latex}
FOR_PEOPLE = [to_markdown, to_latex, to_html]
ALL = [*FOR_PEOPLE, to_json]


def example_table() -> Table:
    return tabulate(example())


def entry_of(table: Table, quantizer: str, model: str = "resnet20") -> Entry:
    (entry,) = (e for block in table.blocks for e in block.entries if (e.quantizer, e.model) == (quantizer, model))
    return entry


@pytest.mark.parametrize("suffix", RENDERED)
def test_rendering_equals_the_golden_file(suffix: str) -> None:
    assert RENDERED[suffix](example_table()) == (GOLDEN / f"comparison.{suffix}").read_text(encoding="utf-8")


def test_rows_follow_the_catalogue_and_models_their_numbers() -> None:
    (block,) = tabulate(results_of(cells_of("mine", [0.5]), records(example().frame))).blocks
    assert block.quantizers == ("fp", "bc", "bnn", "bnn+", "bnn++", "mine")
    assert block.models == ("resnet20", "resnet110")


def test_a_seed_that_only_other_quantizers_have_is_missing() -> None:
    table = tabulate(results_of(cells_of("bc", [0.5]), cells_of("bnn++", [0.6, 0.7])))
    assert entry_of(table, "bc").missing == (("not in the store", 1),)


def test_cells_of_several_recipes_are_never_averaged() -> None:
    old, new = cells_of("bnn++", [0.5], recipe_id="old"), cells_of("bnn++", [0.9, 0.9], recipe_id="new")
    table = tabulate(results_of(cells_of("bc", [0.5, 0.6]), old, new))
    assert entry_of(table, "bnn++").top1_hard_mean is None
    assert table.blocks[0].primary[0].verdict is Verdict.no_pairs
    assert "2 recipes mixed, no mean" in to_markdown(table)


def test_without_bnn_plus_plus_accuracies_stand_alone() -> None:
    text = to_markdown(tabulate(results_of(cells_of("bc", [0.5, 0.6]))))
    assert "| bc | 55.00 ± 7.07 (2) | — | — |" in text
    assert "sign-flip" not in text


def test_missing_and_failed_seeds_are_shown_in_their_place() -> None:
    text = to_markdown(example_table())
    assert "| 97.20 ± 0.25 (2 of 3; 1 failed: oom) | 94.50 (1 of 3; 2 failed: nan) | +2.00, no bound (3) | — |" in text
    assert "| missing (2 queued, 1 running) | — | — | — | not compared |" in text


def test_a_row_has_the_one_comparison_on_all_models_and_the_verdict_with_the_seeds_that_would_do() -> None:
    text = to_markdown(example_table())
    assert "| +1.03, no bound (6) | — | design too small (needs 4 seeds) |" in text
    better = results_of(
        *(cells_of(name, many(0.1 * (name == "bnn++")), model=m) for name in ("bc", "bnn++") for m in "ab")
    )
    assert "| 3.1e-05 | better |" in to_markdown(tabulate(better))


def test_the_highest_mean_of_equal_seeds_is_bold_and_fp_and_incomplete_methods_are_not() -> None:
    table = tabulate(
        results_of(
            cells_of("fp", many(0.3)),
            cells_of("pc", [*many(0.25)[:-1], "failed: nan"]),
            *(cells_of(*row) for row in [("bc", many(0.0)), ("bnn", many(0.05)), ("bnn++", many(0.2))]),
        )
    )
    assert {entry.quantizer for entry in table.blocks[0].entries if entry.is_best} == {"bnn++"}
    assert "| **70.44** ± " in to_markdown(table)
    assert r"\textbf{70.44} $\pm$" in to_latex(table)
    assert "<strong>70.44</strong> ± " in to_html(table)


def test_equal_means_are_both_best() -> None:
    table = tabulate(results_of(*(cells_of(name, many(0.0)) for name in ("bc", "bnn")), cells_of("pc", many(-0.2))))
    assert to_markdown(table).count("**50.44**") == 2


def test_gap_and_size_are_columns_where_asked_for_and_always_in_html_csv_and_json() -> None:
    table = example_table()
    entry = entry_of(table, "bnn++")
    assert entry.gap_mean == pytest.approx(0.004)
    assert entry.num_bytes == 8000 / 8 + 4 * 1000
    assert entry_of(table, "fp").num_bytes == 36_000
    for text in (to_markdown(table, details=True), to_latex(table, details=True), to_html(table)):
        assert "size, kB" in text
        assert "+0.40" in text
    assert "size, kB" not in to_markdown(table) + to_latex(table)
    assert json.loads(to_json(table))["entries"][0]["num_bytes"] == 36_000


def test_cells_of_different_size_have_none() -> None:
    cells = cells_of("bc", [0.5, 0.6])
    cells[0]["num_binary_parameters"] = 16
    assert entry_of(tabulate(results_of(cells)), "bc").num_bytes is None


def test_from_five_models_on_methods_are_ranked_across_models_by_one_mean_each() -> None:
    names = ("bc", "bnn", "bnn++")
    models = [(f"resnet{20 + k}", "digits" if k < 3 else "cifar10") for k in range(5)]
    cells = [
        cells_of(name, [0.5 + shift, 0.6 + shift], model=model, dataset=dataset)
        for model, dataset in models
        for name, shift in zip(names, (0.0, 0.1, 0.2), strict=True)
    ]
    table = tabulate(results_of(*cells, cells_of("pc", [0.9], model="resnet20")))
    (ranks,) = table.ranks
    assert ranks.ranking.methods == ("bnn++", "bnn", "bc")
    assert ranks.ranking.average_ranks == (1.0, 2.0, 3.0)
    assert ranks.ranking.friedman.num_blocks == 5
    assert ranks.incomplete == ("pc",)
    text = to_markdown(table)
    assert "Ranks over 5 models (task bw, init scratch; " in text
    assert "bnn++ 1.00, bnn 2.00, bc 3.00" in text
    assert "Left out, without a mean on every model: pc" in text
    assert tabulate(results_of(*cells[:-3])).ranks == ()


def test_a_model_that_stands_in_two_grids_is_not_counted_twice() -> None:
    cells = [
        cells_of(name, [0.5], model=f"m{k}", grid=grid)
        for grid in "ab"
        for k in range(5)
        for name in ("bc", "pc", "bnn")
    ]
    assert tabulate(results_of(*cells)).ranks == ()


def test_fine_tuned_methods_stand_beside_the_full_precision_cells_they_start_from() -> None:
    table = tabulate(
        results_of(
            cells_of("fp", [0.9, 0.8]),
            cells_of("bc", [0.7, 0.6], init="finetune"),
            cells_of("bnn++", [0.8, 0.9], init="finetune"),
        )
    )
    (block,) = table.blocks
    assert block.title == "digits, init finetune"
    assert block.quantizers == ("fp", "bc", "bnn++")


def test_each_init_has_its_block_and_full_precision_stands_in_both() -> None:
    scratch = [*cells_of("fp", [0.9]), *cells_of("bc", [0.7])]
    table = tabulate(results_of(scratch, cells_of("bc", [0.8], init="finetune"), cells_of("fp", [0.5], model="vit")))
    assert {(block.title, block.quantizers, block.models) for block in table.blocks} == {
        ("digits, init scratch", ("fp", "bc"), ("resnet20", "vit")),
        ("digits, init finetune", ("fp", "bc"), ("resnet20",)),
    }


def test_full_precision_stands_beside_the_methods_of_every_task_of_its_model() -> None:
    table = tabulate(
        results_of(
            cells_of("fp", [0.9, 0.8]),
            cells_of("bc", [0.7, 0.6]),
            cells_of("bc", [0.5, 0.4], task="bwa"),
            cells_of("bnn++", [0.6, 0.7], task="bwa", init="finetune"),
            cells_of("fp", [0.5], model="vit"),
        )
    )
    assert {(block.title, block.quantizers, block.models) for block in table.blocks} == {
        ("digits, task bw, init scratch", ("fp", "bc"), ("resnet20", "vit")),
        ("digits, task bwa, init scratch", ("fp", "bc"), ("resnet20",)),
        ("digits, task bwa, init finetune", ("fp", "bnn++"), ("resnet20",)),
    }
    means = {entry.top1_hard_mean for block in table.blocks for entry in block.entries if entry.quantizer == "fp"}
    assert sorted(mean for mean in means if mean is not None) == pytest.approx([0.5, 0.85])


def test_binary_activations_with_real_weights_stand_alone_and_are_no_full_precision() -> None:
    table = tabulate(
        results_of(
            cells_of("fp", [0.9, 0.8]),
            cells_of("fp", [0.6, 0.5], task="ba"),
            cells_of("bc", [0.4, 0.3], task="bwa", init="finetune"),
            cells_of("bnn++", [0.45, 0.35], task="bwa", init="finetune"),
        )
    )
    shown = {block.title: {entry.quantizer: entry.top1_hard_mean for entry in block.entries} for block in table.blocks}
    assert shown == {
        "digits, task bwa, init finetune": pytest.approx({"fp": 0.85, "bc": 0.35, "bnn++": 0.4}),
        "digits, task ba, init scratch": pytest.approx({"fp": 0.55}),
    }
    assert not any(entry.conflict for block in table.blocks for entry in block.entries)


@pytest.mark.parametrize("is_declared", [False, True])
def test_a_surrogate_is_compared_with_its_own_completion(*, is_declared: bool) -> None:
    results = results_of(
        cells_of("bc", [0.90, 0.91]),
        cells_of("ede", [0.80, 0.82]),
        cells_of("ede++", [0.83, 0.83]),
        cells_of("bnn", [0.70, 0.70]),
        cells_of("clip++", [0.75, "failed: nan"]),
    )
    if is_declared:
        table = tabulate(dataclasses.replace(results, declared={"digits": Declared("completions")}))
    else:
        table = tabulate(results, completions())
    (block,) = table.blocks
    assert block.quantizers == ("bc", "bnn", "clip++", "ede", "ede++")
    assert [(answer.candidate, answer.baseline) for answer in block.primary] == [("clip++", "bnn"), ("ede++", "ede")]
    assert [answer.estimate for answer in block.primary] == pytest.approx([0.05, 0.02])
    text = to_markdown(table)
    assert "its completion − row, points (pairs)" in text
    assert ("these comparisons are exploratory" in text) is not is_declared


def test_grids_are_never_mixed() -> None:
    table = tabulate(results_of(cells_of("bc", [0.7]), cells_of("bc", [0.9], grid="other")))
    assert [block.title for block in table.blocks] == ["digits, grid digits", "digits, grid other"]


@pytest.mark.parametrize("render", ALL)
def test_every_finding_stands_above_the_numbers(render: Callable[[Table], str]) -> None:
    table = dataclasses.replace(example_table(), findings=("the cat slept", "the dog did not"))
    text = render(table)
    assert text.index("the cat slept") < text.index("the dog did not") < text.index("bnn++")


@pytest.mark.parametrize("render", FOR_PEOPLE)
def test_tables_for_people_say_what_they_measure(render: Callable[[Table], str]) -> None:
    text = render(example_table())
    for words in (
        "ddof 1",
        "exactly",
        "not a binary network",
        "paired by seed",
        "sign-flip test, stratified by model",
        "Holm",
    ):
        assert words in text.replace("&#x27;", "'")
    assert "design too small" in text


def test_csv_has_nothing_but_rows_and_fractions() -> None:
    table = dataclasses.replace(example_table(), findings=("a #1 finding",))
    frame = pd.read_csv(io.StringIO(to_csv(table)))
    row = frame[(frame["quantizer"] == "bnn") & (frame["model"] == "resnet20")].iloc[0]
    assert row["top1_hard_mean"] == entry_of(table, "bnn").top1_hard_mean
    assert (row["primary_n"], row["primary_verdict"], row["model_n"]) == (6, "design too small", 3)
    assert row["primary_estimate"] == pytest.approx(0.0103, abs=5e-5)
    assert len(frame) == 10


def test_json_is_strict_and_has_null_where_a_value_is_undefined() -> None:
    document = json.loads(to_json(example_table()), parse_constant=pytest.fail)
    answers = {(one["scope"], one["baseline"]): one for one in document["comparisons"]}
    bnn = answers["these models", "bnn"]
    assert (bnn["low"], bnn["high"], bnn["num_needed"]) == (None, None, 4)
    assert bnn["pairs"]["resnet110"] == pytest.approx({"0": 0.01, "1": 0.01, "2": 0.01})
    assert answers["full precision", "fp"]["p"] is None
    assert document["findings"] == list(example().findings)


class _Page(HTMLParser):
    """Collects cell texts and open tags."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells.append(data.strip())


def test_html_is_well_formed_and_holds_the_cells() -> None:
    page = _Page()
    page.feed(to_html(example_table()))
    assert page.open == []
    assert "96.57 ± 0.57 (3)" in page.cells
    assert "97.20 ± 0.25 (2 of 3; 1 failed: oom)" in page.cells
    assert to_html(example_table()) == to_html(example_table())


def hostile_table() -> Table:
    name = r"a_b & 50% <b>#{x}$y|z~^\n"
    table = tabulate(results_of(cells_of(name, [0.5], model=name, dataset=name)))
    return dataclasses.replace(table, findings=(f"beware of {name}",))


def test_latex_is_escaped_everywhere() -> None:
    text = to_latex(hostile_table())
    escaped = r"a\_b \& 50\% \textless{}b\textgreater{}\#\{x\}\$y\textbar{}z\textasciitilde{}\textasciicircum{}"
    assert text.count(escaped + r"\textbackslash{}n") == 4  # data set, model, quantizer, finding
    assert not re.search(r"(?<!\\)[#%]", text)
    assert text.isascii()
    assert to_latex(example_table()).isascii()


@pytest.mark.skipif(no_latex() is not None, reason=str(no_latex()))
def test_latex_compiles_as_it_is(tmp_path: Path) -> None:
    body = "\n".join(to_latex(table, details=True) for table in (example_table(), hostile_table()))
    preamble = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs,graphicx}"
    source = tmp_path / "tables.tex"
    source.write_text(rf"{preamble}\begin{{document}}{body}\end{{document}}", encoding="utf-8")
    program = ["tectonic"] if shutil.which("tectonic") else ["pdflatex", "-interaction=nonstopmode", "-halt-on-error"]
    result = subprocess.run(
        [*program, source.name], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stdout[-2000:]
    assert source.with_suffix(".pdf").stat().st_size > 10_000
    assert "Overfull" not in result.stdout


def test_html_and_markdown_are_escaped() -> None:
    html = to_html(hostile_table())
    assert "<b>" not in html
    assert html.count("&lt;b&gt;") == 6  # title, model in three headers, quantizer, finding
    body = [line for line in to_markdown(hostile_table()).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in body} == {6}


if __name__ == "__main__":
    for golden_suffix, golden_render in RENDERED.items():
        (GOLDEN / f"comparison.{golden_suffix}").write_text(golden_render(example_table()), encoding="utf-8")
