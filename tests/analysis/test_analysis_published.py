"""Published numbers: read with their faults' lines, compared with runs, never taken for more than was verified."""

import json
from pathlib import Path

import pytest
from analysis_samples import cells_of, frame_of

from analysis.compare.comparison import Entry, Table, comparison
from analysis.compare.published import bundled, load
from analysis.render.tables import to_csv, to_json, to_latex, to_markdown
from suite.errors import UserError

FILE = """\
title: A Paper
authors: Somebody
year: 2020
doi: 10.1000/1
table: Table 2
verified_in: the paper
numbers:
  - {dataset: digits, model: resnet20, quantizer: fp, row: fp, accuracy: 99.0, margin: 0.5, verified: true}
  - {dataset: digits, model: resnet20, quantizer: bc, row: B, accuracy: 90, sd: 0.3, n: 5, margin: 0.5, verified: false}
"""


def published(tmp_path: Path, old: str = "", new: str = "") -> Path:
    assert old in FILE
    path = tmp_path / "paper.yaml"
    path.write_text(FILE.replace(old, new) if old else FILE, encoding="utf-8")
    return path


def table_of(tmp_path: Path, fp: list[float], bc: list[float]) -> Table:
    frame = frame_of(cells_of("fp", fp), cells_of("bc", bc))
    return comparison(frame, publication=load(str(published(tmp_path))))


def entry(table: Table, quantizer: str) -> Entry:
    (found,) = (entry for block in table.blocks for entry in block.entries if entry.quantizer == quantizer)
    return found


@pytest.mark.parametrize("name", bundled())
def test_every_bundled_file_names_its_source_and_margins(name: str) -> None:
    publication = load(name)
    assert publication.arxiv or publication.doi
    assert publication.table in publication.citation
    assert all(number.margin > 0 and number.row for number in publication.numbers)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("accuracy: 99.0", "accuracy: 990", ":8: numbers.accuracy: input should be less than or equal to 100, got 990"),
        ("margin: 0.5, verified: true", "verified: true", ":8: numbers.margin: is required"),
        ("verified: false", "verfied: false", ":9: numbers.verfied: unknown key 'verfied'; did you mean 'verified'"),
        ("sd: 0.3, n: 5", "sd: 0.3", ":9: numbers: sd: 0.3 needs the n of its runs, two or more"),
        ("doi: 10.1000/1\n", "", "arxiv: or doi: is required, so that readers find the source"),
        ("verified_in: the paper\n", "", "verified_in: is required, for some numbers are said to be verified"),
        ("quantizer: bc", "quantizer: fp", "numbers: two for digits/resnet20/fp/bw/scratch"),
        ("title: A Paper", "title: [", "not YAML"),
        ("title: A Paper", "title: !text A Paper", ":1: title: the tag !text means nothing here; leave it out"),
        ("accuracy: 99.0", "accuracy: true", ":8: numbers.accuracy: true is no number"),
        ("margin: 0.5, verified: true", "margin: .inf, verified: true", ":8: numbers.margin: input should be a finite"),
    ],
)
def test_a_fault_in_a_file_is_told_with_its_line(tmp_path: Path, old: str, new: str, fault: str) -> None:
    path = published(tmp_path, old, new)
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert str(caught.value).startswith(f"{path}:")
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_verdicts_follow_the_runs_and_their_number(tmp_path: Path) -> None:
    table = table_of(tmp_path, fp=[0.9901, 0.9899, 0.9903, 0.9898], bc=[0.60, 0.61, 0.62, 0.61])
    verdicts = {name: entry(table, name).published for name in ("fp", "bc")}
    assert {name: found and found.test and found.test.verdict.value for name, found in verdicts.items()} == {
        "fp": "reproduced",
        "bc": "differs",
    }
    wide = entry(table_of(tmp_path, fp=[0.97, 0.99, 1.0], bc=[0.9]), "fp").published
    assert wide is not None
    assert wide.test is not None
    assert wide.test.verdict.value == "inconclusive"


def test_one_run_and_no_run_are_untestable(tmp_path: Path) -> None:
    text = to_markdown(table_of(tmp_path, fp=[0.99], bc=["failed: oom"]))  # type: ignore[list-item]
    assert "| 99.00 | untestable: 0.00, no interval (1), margin 0.50 |" in text
    assert "| 90.00 (unverified) | untestable: no run, margin 0.50 |" in text


def test_an_unverified_number_is_marked_and_the_source_is_cited(tmp_path: Path) -> None:
    table = table_of(tmp_path, fp=[0.99, 0.991], bc=[0.9, 0.901])
    for text in (to_markdown(table), to_latex(table)):
        assert "90.00 (unverified)" in text
        assert "99.00 (unverified)" not in text
        assert "Somebody (2020), A Paper, doi 10.1000/1, Table 2" in text
    assert '"published_verified": false' in to_json(table)


def test_json_has_the_test_behind_the_verdict(tmp_path: Path) -> None:
    rows = json.loads(to_json(table_of(tmp_path, fp=[0.98, 0.99, 1.0], bc=[0.9])))["entries"]
    (row,) = (row for row in rows if row["quantizer"] == "fp")
    assert row["published_low"] < row["published_difference"] < row["published_high"]
    assert (row["published_accuracy"], row["published_margin"], row["published_n"]) == (0.99, 0.005, 3)


def test_a_number_is_compared_with_its_own_task_and_init_only(tmp_path: Path) -> None:
    frame = frame_of(cells_of("bc", [0.9, 0.91], init="finetune"), cells_of("fp", [0.99, 0.98]))
    table = comparison(frame, publication=load(str(published(tmp_path))))
    assert entry(table, "bc").published is None
    assert entry(table, "fp").published is not None  # its own init is scratch, wherever it stands


def test_numbers_of_no_cell_here_are_a_finding(tmp_path: Path) -> None:
    table = comparison(frame_of(cells_of("bnn", [0.9])), publication=load(str(published(tmp_path))))
    assert table.findings == (
        "none of the published numbers is of these cells; they are of digits/resnet20/fp, digits/resnet20/bc",
    )
    assert "published, %" not in to_markdown(table)
    assert "# finding: none of the published" in to_csv(table)
