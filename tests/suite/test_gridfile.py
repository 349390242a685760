"""Grid files are read completely or rejected with the line, the value and the choices."""

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
    assert len(lines) == 3, "a misspelt required key is not also reported as missing"


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
        (
            ("seeds: [0]", "seeds: [0]\ntask: bwaaa"),
            ":6: task: unknown value 'bwaaa'; did you mean 'bwaa'? (bw, bwa, ba",
        ),
        (
            ("seeds: [0]", "seeds: [0]\nquantization: {full_precision: end}"),
            ":6: quantization.full_precision: unknown layers to keep in full precision 'end'; did you mean 'ends'? (e",
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


KEYS = (
    "dataset, models, quantizers, seeds, task, init, parent, distillation, data, training, quantization, execution, "
    "tune, name, description, analysis, blocks"
)
DEEP = "nested more than 50 levels deep"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param("", f"1: a grid is a mapping with the keys {KEYS}", id="empty"),
        pytest.param("# later\n", f"1: a grid is a mapping with the keys {KEYS}", id="a comment"),
        pytest.param("- name: mine\n", f"1: a grid is a mapping with the keys {KEYS}", id="a list"),
        pytest.param(GOOD + "seeds: [1]\n", "10: seeds: given twice, first in line 5", id="a key twice"),
        pytest.param(
            GOOD.replace("  epochs: 3", "  epochs: 3\n  epochs: 4"),
            "8: training.epochs: given twice, first in line 7",
            id="an inner key twice",
        ),
        pytest.param(
            GOOD.replace("digits", "!include x.yaml"),
            "2: dataset: the tag !include means nothing here; leave it out",
            id="a tag",
        ),
        pytest.param(
            GOOD.replace("[0]", "!!set {0}"), "5: seeds: the tag !!set means nothing here; leave it out", id="a set"
        ),
        pytest.param(GOOD + "blocks: &b [*b]\n", "10: blocks: the alias *b is inside its own anchor", id="a loop"),
        pytest.param(
            GOOD + "data: &d\n  crop: *d\n",
            "11: data.crop: the alias *d is inside its own anchor",
            id="a loop of keys",
        ),
        pytest.param(GOOD + "data: *d\n", "10: not YAML: found undefined alias 'd'", id="an alias of nothing"),
        pytest.param(
            GOOD + "data: {<<: 3}\n", "10: data.<<: can only merge a mapping or a list of mappings", id="a merge"
        ),
        pytest.param(
            GOOD + "description: 2024-13-45\n",
            "10: description: 2024-13-45 is a date, which no key takes; quote it if it is text",
            id="a date that is none",
        ),
        pytest.param(
            GOOD + "description: 2024-01-01\n",
            "10: description: 2024-01-01 is a date, which no key takes; quote it if it is text",
            id="a date",
        ),
        pytest.param(
            GOOD.replace("mine", "{{grid}}"),
            "1: name: {grid}: a key has to be text; text with braces or brackets needs quotes",
            id="a template's value",
        ),
        pytest.param(
            "{{grid}}: mine\n",
            "1: {{grid}}: a key has to be text; text with braces or brackets needs quotes",
            id="a template's key",
        ),
        pytest.param(
            GOOD + "{a: 1}: 2\n",
            "10: {a: 1}: a key has to be text; text with braces or brackets needs quotes",
            id="a mapping as key",
        ),
        pytest.param(
            GOOD.replace("  epochs", "\tepochs"),
            "7: not YAML: found character '\\t' that cannot start any token",
            id="a tab",
        ),
        pytest.param(
            GOOD.replace("[0]", "[0"),
            "6: not YAML: expected ',' or ']', but got ':' (while parsing a flow sequence that starts in line 5)",
            id="a bracket left open",
        ),
        pytest.param(
            GOOD + "---\n" + GOOD,
            "10: not YAML: found another document (expected a single document in the stream that starts in line 1)",
            id="two documents",
        ),
        pytest.param(
            GOOD + 'description: "\x1b[1mbold"\n', "10: not YAML: the character '\\x1b' is not allowed", id="an escape"
        ),
        pytest.param(
            GOOD + 'description: "\\UFFFFFFFF"\n',
            "10: not YAML: an escape \\U... is not a character",
            id="an escape of no character",
        ),
        pytest.param(GOOD + "x-deep: " + "[" * 5000, f"10: {DEEP}", id="brackets in brackets"),
        pytest.param(
            GOOD + "x-0: &a0 [0]\n" + "".join(f"x-{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60)),
            f"59: x-49: {DEEP}",
            id="aliases of aliases",
        ),
        pytest.param(
            GOOD.replace("[0]", "[!!int many]"), "5: seeds: many is not a number", id="a tagged number that is none"
        ),
        pytest.param(GOOD + "on: 2", f"10: on: unknown key 'on' ({KEYS})", id="a key of YAML 1.1's booleans"),
        pytest.param(GOOD + "1: 2", f"10: 1: unknown key '1' ({KEYS})", id="a number as key"),
        pytest.param(GOOD.replace("[0]", "[0, 1,\n  0]"), "6: seeds: 0 is given twice", id="a seed twice"),
        pytest.param(
            GOOD.replace("[resnet8]", "[resnet8, resnet20, resnet8]"),
            "3: models: resnet8 is given twice",
            id="a model twice",
        ),
        pytest.param(
            GOOD.replace("[fp, bc]", "[fp, bc, fp]"), "4: quantizers: fp is given twice", id="a quantizer twice"
        ),
        pytest.param(
            GOOD.replace("epochs: 3", "epochs: 1:30"),
            "7: training.epochs: input should be a valid integer, unable to parse string as an integer, got '1:30'",
            id="YAML 1.1's minutes",
        ),
        pytest.param(
            GOOD + "x-mine: &mine\n  crop: padde\ndata: {<<: *mine}\n",
            "11: data.crop: unknown value 'padde'; did you mean 'padded'? (none, padded, random_resized)",
            id="a merged key's own line",
        ),
    ],
)
def test_what_is_no_grid_is_one_line_with_its_place(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "grid.yaml"
    assert _errors(path, text) == [f"{path}:{fault}"]


def test_text_that_is_not_utf_8_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_bytes(GOOD.encode() + "description: Zürich".encode("latin-1"))
    with pytest.raises(GridError) as caught:
        load_grid(str(path))
    assert str(caught.value) == f"{path}:10: not UTF-8 text (invalid start byte at byte 151)"


@pytest.mark.parametrize("method", ["read_text", "is_file"])
def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "grid.yaml"
    path.write_text(GOOD, encoding="utf-8")
    monkeypatch.setattr(Path, method, refuse)  # tests may run as root, which may read everything
    with pytest.raises(GridError) as caught:
        load_grid(str(path))
    assert str(caught.value) == f"{path}: Permission denied"


@pytest.mark.parametrize("directive", ["", "%YAML 1.1\n---\n"])
def test_values_are_those_of_yaml_1_2(tmp_path: Path, directive: str) -> None:
    path = tmp_path / "grid.yaml"
    text = GOOD.replace("mine", "no").replace("[0]", "[010, 0x10, 0, 1_000]").replace("0.1", "1e-3")
    path.write_text(f"{directive}{text}description: off\n", encoding="utf-8")
    grid = load_grid(str(path))
    assert (grid.name, grid.description) == ("no", "off")
    assert grid.blocks[0].seeds == (10, 16, 0, 1000)
    assert grid.blocks[0].training.learning_rate == 0.001


def test_anchors_may_stand_under_x_keys_and_be_shared_and_merged(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    blocks = "x-crops: &crop {crop: padded}\nx-more: [&flip {horizontal_flip: true, crop: none}]\n"
    blocks += "blocks:\n  - data: *crop\n  - data: {<<: [*crop, *flip], crop_padding: 2}\n"
    path.write_text(GOOD + blocks, encoding="utf-8")
    first, second = (block.data for block in load_grid(str(path)).blocks)
    assert (first.crop, first.crop_padding, first.horizontal_flip) == ("padded", 4, False)
    assert (second.crop, second.crop_padding, second.horizontal_flip) == ("padded", 2, True)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("epochs: 3", "epochs: yes", "7: training.epochs: yes is no number"),
        ("epochs: 3", "epochs: true", "7: training.epochs: true is no number"),
        ("rate: 0.1", "rate: on", "9: training.learning_rate: on is no number"),
        ("rate: 0.1", "rate: 0.1\n  ema_decay: off", "10: training.ema_decay: off is no number, leave it out"),
        ("rate: 0.1", "rate: 0.1\n  ema_decay: false", "10: training.ema_decay: false is no number, leave it out"),
        ("rate: 0.1", "rate: 0.1\n  ema_decay: true", "10: training.ema_decay: true is no number"),
        ("rate: 0.1", "rate: 0.1\n  mixup: No", "10: training.mixup: no is no number, leave it out"),
        ("seeds: [0]", "seeds: [true]", "5: seeds: true is no number"),
        (
            "seeds: [0]",
            "seeds: [0]\nexecution: {zero_stage: false}",
            "6: execution.zero_stage: false is no number, leave it out",
        ),
        ("rate: 0.1", "rate: .inf", "9: training.learning_rate: input should be a finite number, got inf"),
        ("rate: 0.1", "rate: 0.1\n  weight_decay: .nan", "10: training.weight_decay: input should be a finite number"),
        (
            "seeds: [0]",
            "seeds: [0]\nquantization: {sharpness: {bnn++: {shape: linear, start: 1, end: .inf}}}",
            "6: quantization.sharpness.bnn++.end: input should be a finite number, got inf",
        ),
    ],
)
def test_a_boolean_is_no_number_and_no_number_is_infinite(tmp_path: Path, old: str, new: str, fault: str) -> None:
    path = tmp_path / "grid.yaml"
    (line,) = _errors(path, GOOD.replace(old, new))
    assert line.startswith(f"{path}:{fault}")


ONLY = "changes nothing: only with"
OUT = "leave it out, or unset it with"
IN_MEMORY = "is for image files; digits is held in memory and stays at its own size"
RESIZED = "image_size: 224, crop: random_resized, progressive_resizing: {start: 128, to_epoch: 2}"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("seeds: [0]", "seeds: [0]\ndata:\n  evaluation_ratio: 0.875", f"7: data.evaluation_ratio: {IN_MEMORY}"),
        ("seeds: [0]", "seeds: [0]\ndata:\n  image_size: 16", f"7: data.image_size: {IN_MEMORY}"),
        ("seeds: [0]", "seeds: [0]\ndata:\n  crop: random_resized", f"7: data.crop: random_resized {IN_MEMORY}"),
        (
            "seeds: [0]",
            "seeds: [0]\ndata:\n  crop_padding: 4",
            f"7: data.crop_padding: {ONLY} crop: padded, here it is none; {OUT} crop_padding: null",
        ),
        (
            "rate: 0.1",
            "rate: 0.1\n  momentum: 0.9\n  optimizer: adamw",
            f"10: training.momentum: changes nothing: adamw has no momentum; {OUT} momentum: null",
        ),
        (
            "rate: 0.1",
            "rate: 0.1\n  nesterov: false\n  optimizer: adamw",
            f"10: training.nesterov: {ONLY} optimizer: sgd, here it is adamw; {OUT} nesterov: null",
        ),
        (
            "rate: 0.1",
            "rate: 0.1\n  decay_epochs: [1]",
            f"10: training.decay_epochs: {ONLY} schedule: step, here it is cosine; {OUT} decay_epochs: null",
        ),
        (
            "rate: 0.1",
            "rate: 0.1\n  decay_rate: 0.1",
            f"10: training.decay_rate: {ONLY} schedule: step, here it is cosine; {OUT} decay_rate: null",
        ),
        (
            "rate: 0.1",
            "rate: 0.1\n  momentum: 0\n  nesterov: true",
            "11: training.nesterov: true needs a momentum above 0",
        ),
        (
            "rate: 0.1",
            "rate: 0.1\n  schedule: step",
            "6: training.decay_epochs: schedule: step needs them, for instance [30, 60]",
        ),
        (
            "rate: 0.1",
            "rate: 0.1\n  schedule: step\n  decay_epochs: [2, 1]",
            "11: training.decay_epochs: [2, 1] must increase",
        ),
        (
            "rate: 0.1",
            "rate: 0.1\n  schedule: step\n  decay_epochs: [1, 3]",
            "11: training.decay_epochs: 3 is never reached: the last of 3 epochs is 2",
        ),
        (
            "rate: 0.1",
            "rate: 0.1\n  warmup_epochs: 3",
            "10: training.warmup_epochs: 3 of 3 epochs: learning_rate is never reached; take fewer",
        ),
        (
            "digits\nmodels: [resnet8]",
            f"imagenet\nmodels: [resnet18, deit_tiny_patch16_224]\ndata: {{{RESIZED}}}",
            "4: data.progressive_resizing: deit_tiny_patch16_224 takes images of one size only",
        ),
        (
            "digits\nmodels: [resnet8]",
            f"imagenet\nmodels: [resnet18]\ndata: {{{RESIZED.replace('128', '224')}}}",
            "4: data.progressive_resizing.start: 224 is not below image_size 224",
        ),
        (
            "seeds: [0]",
            "seeds: [0]\nquantization: {sharpness: {bc: {start: 1}}}",
            "6: quantization.sharpness.bc: changes nothing: bc reads no mu; leave it out",
        ),
        (
            "seeds: [0]",
            "seeds: [0]\nquantization: {inputs: {sharpness: {start: 1}}}",
            "6: quantization.inputs.sharpness: changes nothing: bnn reads no mu; leave it out",
        ),
        (
            "seeds: [0]",
            "seeds: [0]\nexecution: {offload: true}",
            "6: execution.offload: only with engine: deepspeed, here it is plain",
        ),
    ],
)
def test_a_key_that_would_change_nothing_is_refused_at_its_line(tmp_path: Path, old: str, new: str, fault: str) -> None:
    path = tmp_path / "grid.yaml"
    assert _errors(path, GOOD.replace(old, new)) == [f"{path}:{fault}"]


def test_null_unsets_what_a_block_or_an_override_is_laid_over(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    base = GOOD + "  momentum: 0.8\n"
    (line,) = _errors(path, base + "blocks:\n  - training: {optimizer: adamw}\n")
    assert line.startswith(f"{path}:10: training.momentum: changes nothing: adamw has no momentum; leave it out, or ")
    path.write_text(base + "blocks:\n  - training: {optimizer: adamw, momentum: null}\n", encoding="utf-8")
    assert load_grid(str(path)).blocks[0].training.momentum is None
    path.write_text(base, encoding="utf-8")
    adamw = load_grid(str(path), ["training.optimizer=adamw", "training.momentum=null"])
    assert adamw.blocks[0].training.momentum is None
    assert load_grid(str(path), ["training.momentum="]).blocks[0].training.momentum == 0.9


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
        ("training.epochs=yes", "--set: training.epochs: yes is no number"),
        ("training.ema_decay=off", "--set: training.ema_decay: off is no number, leave it out"),
        ("seeds=[1, 2, 1]", "--set: seeds: 1 is given twice"),
        ("training.epochs=[", "--set training.epochs=[: not YAML: expected the node content, but found '<stream end>'"),
        ("training.epochs=!x 3", "--set training.epochs=!x 3: the tag !x means nothing here; leave it out"),
        ("training.epochs={{n}}", "--set training.epochs={{n}}: {n}: a key has to be text"),
        ("training.epochs=2024-13-45", "--set training.epochs=2024-13-45: 2024-13-45 is a date, which no key takes"),
        ("data.image_size=16", "--set: data.image_size: is for image files"),
        ("trainin.epochs=3", "--set: trainin: unknown key 'trainin'; did you mean 'training'?"),
        ("name=other", "--set name=other: only a block's keys can be overridden"),
    ],
)
def test_a_bad_override_is_refused(override: str, expected: str) -> None:
    with pytest.raises(GridError) as caught:
        load_grid("digits", [override])
    assert str(caught.value).startswith(expected)


def with_analysis(tmp_path: Path, text: str) -> Path:
    """A grid of bc and bnn++ with this analysis, on line 9."""
    path = tmp_path / "grid.yaml"
    recipe = "name: mine\ndataset: digits\nmodels: [resnet8]\nquantizers: [bc, bnn++]\nseeds: [0]\n"
    recipe += (
        "training: {epochs: 1, batch_size: 64, learning_rate: 0.1}\nquantization:\n  sharpness: {bnn++: {start: 2.0}}\n"
    )
    path.write_text(f"{recipe}analysis: {text}\n", encoding="utf-8")
    return path


def test_a_grid_declares_its_question_and_its_margin_and_no_cell_changes(tmp_path: Path) -> None:
    declared = load_grid(str(with_analysis(tmp_path, "{primary: bc, margin_points: 0.3}")))
    assert (declared.analysis.primary, declared.analysis.margin_points) == ("bc", 0.3)
    plain = load_grid(str(with_analysis(tmp_path, "{}")))
    assert (plain.analysis.primary, plain.analysis.margin_points) == ("bnn++", None)
    assert [cell.id for cell in plain.cells()] == [cell.id for cell in declared.cells()]
    assert declared.declared() == {
        "primary": "bc",
        "margin_points": 0.3,
        "settings": [["digits", "bw", "scratch", "resnet8", name, [0]] for name in ("bc", "bnn++")],
    }


def test_a_grid_can_ask_whether_completions_are_better_than_their_surrogates(tmp_path: Path) -> None:
    path = with_analysis(tmp_path, "{primary: completions}")
    path.write_text(
        path.read_text()
        .replace("[bc, bnn++]", "[bnn+, bnn++]")
        .replace("sharpness: {", "sharpness: {bnn+: {start: 5.0}, ")
    )
    assert load_grid(str(path)).declared()["primary"] == "completions"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{primary: completions}", "analysis.primary: completions: the grid has no surrogate beside its completion"),
        ("{primary: pc}", "analysis.primary: 'pc' is not a quantizer of this grid (bc, bnn++)"),
        ("{primary: bnnn}", "analysis.primary: unknown quantizer 'bnnn'; did you mean 'bnn'"),
        ("{margin_points: 0}", "analysis.margin_points: "),
        ("{margin_points: 100}", "analysis.margin_points: "),
        ("{margin: 1}", "analysis.margin: unknown key 'margin'; did you mean 'margin_points'?"),
    ],
)
def test_a_wrong_declaration_is_refused_at_its_line(tmp_path: Path, text: str, expected: str) -> None:
    path = with_analysis(tmp_path, text)
    with pytest.raises(GridError) as caught:
        load_grid(str(path))
    assert str(caught.value).startswith(f"{path}:9: {expected}")


def test_the_declaration_is_the_files_and_no_override(tmp_path: Path) -> None:
    with pytest.raises(GridError, match="only a block's keys can be overridden"):
        load_grid(str(with_analysis(tmp_path, "{}")), ["analysis.margin_points=1"])


@pytest.mark.parametrize(
    ("name", "num_cells", "digest"),
    [
        ("cifar10", 99, "f011b946268dc5de"),
        ("cifar100", 99, "5a0d82e8a2911e30"),
        ("deit-imagenet", 54, "0a61aaa46b9657ed"),
        ("digits", 48, "0d53e9ed6e5e4da2"),
        ("fashion-mnist", 18, "5f47ce9bc394a7a3"),
        ("ffcv-resnet-16", 36, "449afe6ab1c7bcc8"),
        ("ffcv-resnet-88", 36, "a6e6f879cd56553e"),
        ("imagenet", 198, "27d4751f772452ea"),
        ("parq-cifar10", 36, "82c5028872b9d7f7"),
        ("parq-imagenet", 72, "f65cb6802cb502f9"),
        ("reactnet-imagenet", 18, "f6991c73cee4534c"),
        ("zoo", 160, "7f008490a815cf87"),
    ],
)
def test_bundled_grids_have_their_cells_whose_ids_runs_are_found_by(name: str, num_cells: int, digest: str) -> None:
    ids = [cell.id for cell in load_grid(name).untuned().cells()]
    assert len(set(ids)) == len(ids) == num_cells
    assert hashlib.sha256("".join(ids).encode()).hexdigest()[:16] == digest
    assert name in bundled_names()


@pytest.mark.parametrize(
    ("name", "num_trials", "digest"),
    [
        ("cifar10", 432, "8b9efe7d6a5f4b73"),
        ("cifar100", 432, "e9ea88c4c5bd3449"),
        ("digits", 288, "cb2528cd6e6aad9a"),
        ("imagenet", 288, "7891e87bd7b79860"),
    ],
)
def test_bundled_grids_have_their_trials_on_every_machine(name: str, num_trials: int, digest: str) -> None:
    """These are trials of full precision and from scratch; finetune cells' trials depend on choices."""
    ids = [cell.id for cell in load_grid(name).resolve().cells]
    assert len(set(ids)) == len(ids) == num_trials
    assert hashlib.sha256("".join(ids).encode()).hexdigest()[:16] == digest


def test_the_schema_for_editors_is_the_models_schema() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == schema(), "run: python -m suite.recipe.grid_file"
