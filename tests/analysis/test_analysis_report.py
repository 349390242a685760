"""The report: its sentences, page and command, and the progress display."""

import dataclasses
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from analysis_samples import cells_of, example, frame_of, results_of
from report_samples import RECIPE, accuracies, example_page, page_of
from tiny_cells import plan, put, tiny_cell

from analysis.compare.comparison import Verdict
from analysis.compare.published import load, requirements
from analysis.compare.table import Table, tabulate
from analysis.render import methods
from analysis.render.progress import progress
from analysis.render.words import published_sentence, sentence
from analysis.runs import folders
from analysis.runs import store as runs
from analysis.runs.provenance import Background, keys_of, source, without_password
from suite.errors import UserError
from suite.recipe.settings import ProgressiveResizing
from suite.run.atomic import write_json
from suite.run.directory import RunDir
from suite.run.journal import Journal
from suite.run.mlflow_replica import default_uri, recipe, sync


def mixed_table() -> Table:
    """On one model, BNN++ is better than bc, worse than pc and equal to bnn; bnn+ failed."""
    groups = [cells_of("fp", accuracies(0.3)), cells_of("bc", accuracies(0.0)), cells_of("bnn", accuracies(0.199))]
    failed = cells_of("bnn+", ["failed: oom"] * 10)
    return tabulate(results_of(*groups, cells_of("pc", accuracies(0.25)), failed, cells_of("bnn++", accuracies(0.2))))


def told(table: Table) -> dict[str, str]:
    return {
        answer.baseline: sentence(answer) for block in table.blocks for answer in (*block.primary, *block.reference)
    }


def test_a_difference_is_told_with_its_size_its_interval_p_and_pairs() -> None:
    number = r"\d+\.\d\d"
    assert re.fullmatch(
        rf"BNN\+\+ is better than bc on resnet20 by (20|19)\.\d\d points \("
        rf"98\.\d % interval of the difference \[\+{number}, \+{number}\]; 10 pairs, adjusted p 0\.0\d+\)\.",
        told(mixed_table())["bc"],
    )
    assert told(mixed_table())["pc"].startswith("BNN++ is worse than pc on resnet20 by 4.")


def test_full_precision_is_told_beside_the_answers_and_is_not_tested() -> None:
    text = told(mixed_table())["fp"]
    assert re.fullmatch(
        r"BNN\+\+ − fp \(full precision\) on resnet20: −\d+\.\d\d points \(10 pairs\); not tested\.", text
    )


def test_what_a_test_with_enough_pairs_does_not_separate_is_not_distinguishable() -> None:
    text = told(mixed_table())["bnn"]
    assert text.startswith("BNN++ and bnn are not distinguishable on resnet20: the difference is ")
    assert text.endswith("That is no proof of equality.")


def test_a_design_that_is_too_small_says_how_many_seeds_would_do() -> None:
    text = told(tabulate(results_of(cells_of("bc", [0.5, 0.51, 0.5]), cells_of("bnn++", [0.9, 0.9, 0.91]))))["bc"]
    assert text == (
        "The design is too small to tell BNN++ from bc on resnet20, whatever the values: with 3 pairs in a family of "
        "1 no adjusted p is below 0.25; 6 seeds could. Observed: +40.00 points."
    )


def test_equivalence_is_told_with_the_margin_and_the_interval_within_it() -> None:
    near = [value + 0.0001 * (-1) ** seed for seed, value in enumerate(accuracies(0.0))]
    table = tabulate(results_of(cells_of("bc", accuracies(0.0)), cells_of("bnn++", near), margin_points=0.5))
    assert re.fullmatch(
        r"BNN\+\+ and bc are equivalent on resnet20 within 0\.5 points: the difference is 0\.00 points, its 90 % "
        r"interval \[−0\.01, \+0\.01\] lies within the margin \(10 pairs, adjusted p of equivalence 0\.00098\)\.",
        told(table)["bc"],
    )


def test_a_comparison_without_pairs_says_which_runs_are_missing() -> None:
    (answer,) = (one for one in mixed_table().blocks[0].primary if one.baseline == "bnn+")
    assert "no seed is measured on both sides" in sentence(answer)
    assert answer.caveats[0] == "resnet20: bnn+: 10 failed: oom"


def test_the_page_leads_with_the_answers_clear_ones_first_and_one_forest_plot() -> None:
    text = page_of(table=mixed_table())
    answers = text[text.index('id="verdicts"') : text.index('id="needed"')]
    order = [verdict.value for verdict in Verdict if f"</span> {verdict.value}</span>" in answers]
    places = [answers.index(f"</span> {verdict}</span>") for verdict in order]
    assert order == ["better", "worse", "not distinguishable", "not compared"]
    assert places == sorted(places)
    assert answers.count("<img ") == 1
    assert "differences-digits" in answers


def test_without_bnn_plus_plus_the_report_says_that_nothing_is_compared() -> None:
    groups = [cells_of("bc", [0.5, 0.6]), cells_of("bnn", [0.5, 0.6])]
    assert "Nothing is compared: no model here has runs of BNN++" in page_of(*groups)


def test_ranks_over_models_are_described_where_there_are_models_enough() -> None:
    shifts = {"bc": 0.0, "bnn": 0.1, "bnn++": 0.2}
    groups = [cells_of(name, [0.5 + s, 0.6 + s], model=f"m{k}") for k in range(8) for name, s in shifts.items()]
    text = page_of(*groups)
    assert "Ranks over 8 models" in text
    assert "a description, no verdict" in text


def test_published_numbers_get_their_verdicts() -> None:
    results = results_of(cells_of("fp", [0.9120, 0.9130, 0.9125], dataset="cifar10"), margin_points=0.5)
    publication = load("resnet-cifar10")
    recipe = {name: str(value) for name, value in (requirements(publication.numbers[0], publication) or {}).items()}
    recipes = dict.fromkeys(keys_of(results.frame), recipe)
    table = tabulate(results, publication=publication, recipes=recipes)
    (entry,) = table.blocks[0].entries
    assert entry.published is not None
    assert entry.published.verdict.value == "reproduced"
    assert published_sentence(table.blocks[0], entry).startswith(
        "fp on resnet20 (cifar10): published 91.25 %, ours 91.25 % (3); reproduced: 0.00 ["
    )
    other = tabulate(
        results, publication=publication, recipes={key: {"training.epochs": "3"} for key in keys_of(results.frame)}
    )
    assert other.blocks[0].entries[0].published is not None
    assert other.blocks[0].entries[0].published.verdict.value == "not comparable"


class Page(HTMLParser):
    """A page's headings, ids, links and loaded resources, and whether each tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.attributes if name == tag]


def test_the_page_is_well_formed_and_its_headings_are_in_order() -> None:
    page = Page(example_page())
    assert page.open == []
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert page.all("html") == [{"lang": "en"}]
    assert all("scope" in header or "blank" in (header.get("class") or "") for header in page.all("th"))
    assert all(image["alt"] for image in page.all("img"))


def test_links_lead_to_places_on_the_page_and_nothing_is_loaded_from_elsewhere() -> None:
    page = Page(example_page())
    ids = [attributes["id"] for _, attributes in page.attributes if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in page.all("a")} <= {f"#{name}" for name in ids}
    loaded = [
        attributes[key] or "" for _, attributes in page.attributes for key in ("src", "href") if key in attributes
    ]
    assert all(address.startswith(("data:", "#")) for address in loaded)
    assert page.all("script") == []


def test_verdicts_come_before_tables_and_findings_before_all() -> None:
    text = example_page()
    places = ["findings", "verdicts", "needed", "tables", "figures", "methods", "not-tested", "provenance", "missing"]
    assert sorted(places, key=lambda name: text.index(f'id="{name}"')) == places
    for line in example().findings:
        assert line in text
        assert text.index(line) < text.index('id="verdicts"')


def test_the_same_runs_give_the_same_bytes() -> None:
    assert page_of() == example_page()


def test_missing_cells_have_their_reasons_and_all_cells_are_listed() -> None:
    text = example_page()
    assert re.search(r"digits/resnet20/bc/s2</th><td>failed: oom</td><td>CUDA out of memory", text)
    assert "6 of 24 cells have no result" in text
    for name in ("digits/resnet20/fp/s0", "digits/resnet110/bnn++/s2"):
        assert f'<th scope="row">{name}</th>' in text


def test_names_are_escaped_everywhere() -> None:
    name = "<script>alert(1)</script>&\"'"
    text = page_of(cells_of(name, [0.5], model=name, dataset=name), cells_of("bnn++", [0.6], model=name, dataset=name))
    assert "<script" not in text
    assert Page(text).open == []


def test_recipes_are_told_by_what_tells_them_apart() -> None:
    frame = frame_of(*(cells_of(name, [0.5], model=model) for name in ("bc", "bnn++") for model in ("a", "b")))
    mu = {"quantization.sharpness.shape": "exponential", "quantization.sharpness.start": "2.0"}
    backgrounds = {
        key: Background(
            {**RECIPE, "training.epochs": "30" if model == "a" else "20"}
            | ({**mu, "quantization.sharpness.end": "500.0"} if quantizer == "bnn++" else {})
        )
        for key, model, quantizer in zip(keys_of(frame), frame["model"], frame["quantizer"], strict=True)
    }
    told = dict(methods.recipes(frame, backgrounds))
    assert told["a"].startswith("30 epochs in batches of 64, adamw")
    assert told["b"].startswith("20 epochs")
    assert told["mu of bnn++"] == "exponential from 2 to 500 over training."
    assert told["mu of bc"] == "none."
    assert dict(methods.settings(frame, backgrounds))["training.epochs"] == "30 (2 cells), 20 (2 cells)"


def test_the_methods_paragraph_has_words_for_every_key_of_a_recipe() -> None:
    """For a cell with every optional section: a key without words would be missing from the report."""
    cell = tiny_cell(
        dataset="cifar10",
        model="bireal_resnet8",
        task="bwaa",
        quantization__inputs={"quantizer": "tanh++", "sharpness": {"start": 2.0}},
        quantization__accumulator={},
        distillation={"share": 0.5},
    )
    told_first = {f"training.{key}" for key in ("epochs", "batch_size", "optimizer", "learning_rate", "schedule")}
    of_mu = {f"quantization.sharpness.{key}" for key in ("shape", "start", "end")}
    resizing = {f"data.progressive_resizing.{key}" for key in ProgressiveResizing.model_fields}
    expected = {name for name, _ in recipe(cell)} - told_first - of_mu - {"data.progressive_resizing"}
    assert methods.WORDS.keys() == expected | resizing


def test_a_stores_password_is_not_shown() -> None:
    told = source("digits", "http://me:secret@host:5000/store?token=x", None)
    assert told.command == "python -m analysis report digits --tracking-uri http://host:5000/store"
    assert without_password("sqlite:///runs/mlflow.db") == "sqlite:///runs/mlflow.db"


@pytest.fixture
def root(make_run: Callable[..., RunDir], tmp_path: Path) -> Path:
    """A grid of two methods and two seeds with one failed cell, in run directories and in a store."""
    made = [make_run("tiny", seed=seed, quantizer=name) for name in ("bc", "bnn++") for seed in range(2)]
    for number, run in enumerate(made[1:]):
        provenance = {"code": {"commit": "c0ffee"}, "data_checksum": "d1", "packages": {"torch": "2.9.0"}}
        attempt = put(run, state="running", attempt=1, job_id="7")
        write_json(attempt.provenance_path, provenance)
        journal = Journal(run.journal, attempt)
        journal.append(1, {"val/top1": 0.9, "health/flip_rate": 0.01, "mu": 2.0})
        journal.close()
        result = {"cell": run.path.name, "top1_hard": 0.9 + number / 30, "top1_soft": 0.9}
        run.result_path.write_text(json.dumps(result), encoding="utf-8")
        attempt.finish(state="done")
    put(made[0], state="failed", cause="error", reason="the disk is full")
    plan(*made)
    sync(tmp_path / "tiny", default_uri(tmp_path))
    return tmp_path


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "analysis", "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_the_command_writes_one_file_and_prints_its_path(root: Path) -> None:
    done = call("tiny", "--root", root)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{root}/tiny/report.html\n", "")
    text = (root / "tiny" / "report.html").read_text(encoding="utf-8")
    assert f"python -m analysis report tiny --root {root}" in text
    assert "the disk is full" in text
    assert "c0ffee" in text
    strict = call("tiny", "--root", root, "--strict", "--output", root / "strict.html")
    assert strict.returncode == 2
    assert not (root / "strict.html").exists()


def test_store_and_run_directories_tell_the_same_of_each_cell(root: Path) -> None:
    uri = default_uri(root)
    read, stored = folders.load(root, "tiny").frame, runs.load(uri, "tiny").frame
    from_folders, from_store = folders.backgrounds(read), runs.backgrounds(uri, stored)
    assert from_folders.keys() == from_store.keys()
    for key, own in from_folders.items():
        other = from_store[key]
        assert (own.recipe, own.reason) == (other.recipe, other.reason)
        assert own.recipe["training.epochs"]
        assert (own.times is None) == (other.times is None)
        assert np.allclose(own.times or (), other.times or (), rtol=0, atol=0.001)
    assert {own.facts.get("torch") for own in from_folders.values()} == {"2.9.0", None}


def test_a_torn_provenance_is_refused_in_one_line(root: Path) -> None:
    frame = folders.load(root, "tiny").frame
    torn = Path(frame["run"].iloc[-1]) / "attempts" / "0001" / "provenance.json"
    torn.write_text('{"packages": 3}', encoding="utf-8")
    with pytest.raises(UserError, match=r"attempts: not what a run writes there"):
        folders.backgrounds(frame)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("patience", "shows"), [(0.0, True), (60.0, False)])
def test_progress_is_shown_on_a_terminal_to_those_who_wait(
    monkeypatch: pytest.MonkeyPatch, patience: float, *, shows: bool
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(patience) as say:
        say("drawing the figures")
        time.sleep(0.3)
        shown = terminal.getvalue()
    assert ("drawing the figures" in shown) is shows


def test_the_table_is_the_one_that_was_given() -> None:
    table = dataclasses.replace(mixed_table(), findings=("the cat slept",))
    assert "the cat slept" in page_of(table=table)
