"""Grid files are read whole or refused with the line, the value and the choices."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantizers import QUANTIZERS
from suite.recipe.bundled import bundled_names
from suite.recipe.grid_file import SCHEMA, GridError, load_grid, schema


def _errors(path: Path, text: str, overrides: list[str] | None = None) -> list[str]:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(GridError) as caught:
        load_grid(str(path), overrides)
    return str(caught.value).splitlines()


GOOD = """\
name: mine
dataset: digits
models: [resnet8]
quantizers: [fp, bc]
seeds: [0]
training:
  epochs: 3
  batch_size: 64
  learning_rate: 0.1
"""


def test_three_typos_make_three_lines(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    text = GOOD.replace("[fp, bc]", "[fp, bnnpp]").replace("epochs:", "epoch:").replace("digits", "digit")
    lines = _errors(path, text)
    assert lines[0].startswith(f"{path}:2: dataset: unknown data set 'digit'; did you mean 'digits'? (digits, fashion-")
    choices = ", ".join(QUANTIZERS)
    expected = (
        f"{path}:4: quantizers: unknown quantizer 'bnnpp'; did you mean 'bnn++'? ({choices}), or module:attribute"
    )
    assert lines[1] == expected
    assert lines[2].startswith(f"{path}:7: training.epoch: unknown key 'epoch'; did you mean 'epochs'? (epochs, ")
    assert len(lines) == 3, "a misspelt required key is missing, too, which goes without saying"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("seeds: [0]", "seeds: [0, -1]"), ":5: seeds: input should be greater than or equal to 0, got -1"),
        (("seeds: [0]", "seeds: []"), ":5: seeds: tuple should have at least 1 item after validation, not 0, got []"),
        (("epochs: 3", "epochs: many"), ":7: training.epochs: input should be a valid integer"),
        (
            ("learning_rate: 0.1", "learning_rate: 0"),
            ":9: training.learning_rate: input should be greater than 0, got 0",
        ),
        (("seeds: [0]", "seeds: [0]\ninit: finetun"), ":6: init: unknown value 'finetun'; did you mean 'finetune'?"),
        (("[resnet8]", "[resnet08]"), ":3: models: unknown model 'resnet08'; did you mean"),
        (("name: mine", "name: my grid"), ":1: name: string should match pattern"),
        (("seeds: [0]", "dataset: digits"), ":5: dataset: given twice, first in line 2"),
        (("seeds: [0]", "seeds: [0"), ": not YAML: "),
        (("seeds: [0]", "seeds: [0]\ntask: bwaa"), ":6: task: unknown value 'bwaa'; did you mean 'bwa'? (bw, bwa)"),
        (
            ("seeds: [0]", "seeds: [0]\nquantization: {full_precision: end}"),
            ":6: quantization.full_precision: unknown full-precision policy 'end'; did you mean 'ends'? (ends, ends+",
        ),
        (
            ("seeds: [0]", "seeds: [0]\nquantization:\n  inputs: {quantizer: ede}"),
            ":7: quantization.inputs: ede needs its mu, for instance sharpness: {shape: exponential, start: 0.1, ",
        ),
        (
            ("seeds: [0]", "seeds: [0]\nquantization:\n  inputs: {quantiser: ede}"),
            ":7: quantization.inputs.quantiser: unknown key 'quantiser'; did you mean 'quantizer'? (quantizer, sharp",
        ),
        (("seeds: [0]", "seeds: [0]\nblocks: 3"), ":6: blocks: needs a list of one or more blocks"),
        (("seeds: [0]", "seeds: [0]\nblocks: [3]"), ":6: blocks: each entry is a mapping"),
        (("seeds: [0]", "seeds: [0]\nblocks:\n  - {training: {epoch: 2}}"), ":7: training.epoch: unknown key 'epoch'"),
    ],
)
def test_a_fault_names_its_line_and_value(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    lines = _errors(tmp_path / "grid.yaml", GOOD.replace(*change))
    assert any(expected in line for line in lines), lines


def test_an_annealed_sharpness_without_its_end_is_refused(tmp_path: Path) -> None:
    text = GOOD + "quantization:\n  sharpness:\n    bnn++: {shape: linear, start: 2.0}\n"
    (line,) = _errors(tmp_path / "grid.yaml", text)
    assert line.endswith(":12: quantization.sharpness.bnn++: shape linear needs an 'end'")


def test_a_quantizer_that_reads_mu_must_be_given_one(tmp_path: Path) -> None:
    (line,) = _errors(tmp_path / "grid.yaml", GOOD.replace("[fp, bc]", "[fp, bnn++]"))
    assert "grid.yaml:1: quantization.sharpness: bnn++ needs its mu, for instance bnn++: {shape: exponential, " in line


def test_an_unknown_grid_lists_the_bundled_ones() -> None:
    with pytest.raises(GridError, match="unknown grid 'digit'; did you mean 'digits'"):
        load_grid("digit")
    with pytest.raises(GridError, match=r"nowhere.yaml: no such grid file; the bundled grids are cifar10, "):
        load_grid("nowhere.yaml")


def test_overrides_win_in_every_block(write_grid: Callable[..., Path]) -> None:
    path = write_grid(blocks=[{}, {"seeds": [1], "training": {"epochs": 9}}])
    grid = load_grid(str(path), ["training.epochs=5", "quantization.sharpness.bnn++.end=50"])
    assert [block.training.epochs for block in grid.blocks] == [5, 5]
    assert [block.seeds for block in grid.blocks] == [(0,), (1,)]
    assert {block.quantization.sharpness["bnn++"].end for block in grid.blocks} == {50.0}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.epochs", "--set training.epochs: write KEY=VALUE"),
        ("training.epochs=x", "--set: training.epochs: input should be a valid integer"),
        ("trainin.epochs=3", "--set: trainin: unknown key 'trainin'; did you mean 'training'?"),
        ("name=other", "--set name=other: only a block's keys can be overridden"),
    ],
)
def test_a_bad_override_is_refused(override: str, expected: str) -> None:
    with pytest.raises(GridError) as caught:
        load_grid("digits", [override])
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("name", "num_cells", "digest"),
    [
        ("cifar10", 99, "af5721aa9b8e6a0a"),
        ("cifar100", 99, "40953f8a111b83e1"),
        ("digits", 36, "22764f864a2f964e"),
        ("fashion-mnist", 18, "77809d3907712b5b"),
        ("imagenet", 198, "fc789c8861b96b5d"),
        ("zoo", 160, "91d90f356248f208"),
    ],
)
def test_bundled_grids_have_their_cells_whose_ids_runs_are_found_by(name: str, num_cells: int, digest: str) -> None:
    ids = [cell.id for cell in load_grid(name).cells()]
    assert len(set(ids)) == len(ids) == num_cells
    assert hashlib.sha256("".join(ids).encode()).hexdigest()[:16] == digest
    assert name in bundled_names()


def test_the_schema_for_editors_is_the_models_schema() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == schema(), "run: python -m suite.recipe.grid_file"
