"""An export is the tested network, bit for bit, in a self-describing file; nothing else is written or read."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_cells import tiny_cell
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import models
from quantizers.packing import pack
from suite.engines.process_group import Layout
from suite.export import __main__ as command
from suite.export.__main__ import compare, export, export_for_timm
from suite.export.one_bit import FORMAT, ExportError, Origin, load_packed, measure, write
from suite.recipe.cell import Cell
from suite.run.directory import RunDir
from suite.train import train
from suite.training.build import build_base, wrap
from suite.training.trainer import Trainer, weights_digest

NOWHERE = Path("no-data-needed")
RECIPES: dict[str, dict[str, Any]] = {
    "without gains": {"training__ema_decay": 0.9, "training__reestimate_norm": True},
    "with gains": {"model": "vit_mini_patch2_8", "training__precision": "bf16"},
    "a scale of layers": {"quantization__scale": "tensor", "training__ema_decay": 0.9},
    "scales of channels": {
        "model": "vit_mini_patch2_8",
        "quantization__scale": "channel",
        "training__precision": "bf16",
        "training__epochs": 1,
    },
    "binary inputs": {
        "model": "bireal_resnet8",
        "task": "bwa",
        "quantization__full_precision": ["ends", "shortcuts"],
        "quantization__inputs": {"quantizer": "tanh++", "sharpness": {"start": 2.0}},
        "training__epochs": 1,
    },
    "sums of few bits": {
        "model": "bireal_resnet8",
        "task": "bwaa",
        "quantization__inputs": {"quantizer": "bnn"},
        "quantization__accumulator": {"bits": 6},
        "training__precision": "bf16",
        "training__epochs": 1,
    },
}


@pytest.fixture(scope="module", params=RECIPES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A done run of each kind of network; binary inputs were soft during training."""
    return _trained(tmp_path_factory.mktemp("runs"), **RECIPES[request.param])


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A done run of the default tiny cell, with its export."""
    run = _trained(tmp_path_factory.mktemp("resnet"))
    export(run, run.path / "packed.safetensors", NOWHERE)
    return run


@pytest.fixture
def copied(resnet: RunDir, tmp_path: Path) -> RunDir:
    """A copy of the run, to be damaged."""
    return RunDir(Path(shutil.copytree(resnet.path, tmp_path / resnet.path.name)))


@pytest.fixture
def exported(copied: RunDir) -> Path:
    """An export, to be damaged."""
    return copied.path / "packed.safetensors"


def _trained(root: Path, **changes: object) -> RunDir:
    cell = tiny_cell(**changes)
    run = RunDir.create(root / cell.id, cell)
    train(run, NOWHERE)
    return run


def _bits(logits: Tensor) -> list[int]:
    return logits.contiguous().view(torch.uint8).flatten().tolist()


def _command(*arguments: object) -> Result:
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


def _rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Rewrites the file with changed tensors and header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    change(tensors, header)
    save_file(tensors, path, {FORMAT: json.dumps(header)})


def test_a_network_read_back_gives_the_same_logits_to_the_bit(run: RunDir, tmp_path: Path) -> None:
    trainer = export(run, tmp_path / "packed.safetensors", NOWHERE)
    loaded = load_packed(tmp_path / "packed.safetensors")
    result = run.result() or {}
    assert weights_digest(loaded.state_dict()) == trainer.weights_digest() == result["weights_sha256"]
    assert not loaded.training
    comparison = compare(trainer, loaded, NOWHERE)
    assert (comparison.num_images, comparison.num_equal) == (359, 359)
    assert comparison.top1 == result["top1_hard"]
    images, _ = next(Trainer(run.cell(), Layout(), NOWHERE, None).loaders.final.evaluation())
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert _bits(loaded(images)) == _bits(trainer.engine.model(images)), "in float32"


def test_what_is_binary_is_plus_or_minus_one_and_gains_are_kept(run: RunDir, tmp_path: Path) -> None:
    trainer = export(run, tmp_path / "packed.safetensors", NOWHERE)
    loaded = load_packed(tmp_path / "packed.safetensors")
    for name in trainer.split.binary:
        assert bool((loaded.get_parameter(name).abs() == 1).all())
    gains = [name for name, _ in loaded.named_parameters() if name.endswith(".gain")]
    has_gains = run.cell().model == "vit_mini_patch2_8" or run.cell().quantization.scale != "none"
    assert bool(gains) == has_gains
    for name in gains:
        assert torch.equal(loaded.get_parameter(name), trainer.engine.model.get_parameter(name))


def test_timm_loads_the_plain_weights_with_the_same_logits(run: RunDir, tmp_path: Path) -> None:
    cell, path = run.cell(), tmp_path / "timm.safetensors"
    if cell.task != "bw":
        with pytest.raises(ExportError, match=f"task {cell.task}: timm's layers have no binary inputs"):
            export_for_timm(run, path, NOWHERE)
        return
    network, loaded = export_for_timm(run, path, NOWHERE), _loaded_as_printed(run, path)
    images, _ = next(Trainer(cell, Layout(), NOWHERE, None).loaders.final.evaluation())
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        ours = network.engine.model.eval()(images)
        assert _bits(loaded.to(memory_format=torch.channels_last).eval()(images)) == _bits(ours)


def test_a_full_precision_network_is_written_for_timm_only(tmp_path: Path) -> None:
    run, path = _trained(tmp_path / "runs", quantizer="fp"), tmp_path / "timm.safetensors"
    loaded = _loaded_as_printed(run, path).state_dict()
    expected = export_for_timm(run, path, NOWHERE).engine.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    with pytest.raises(ExportError, match=r"nothing binary: .*/fp/s0 is full-precision; --format timm exports it"):
        export(run, tmp_path / "packed", NOWHERE)
    assert not (tmp_path / "packed").exists()


def _loaded_as_printed(run: RunDir, path: Path) -> nn.Module:
    """The network made by running the Python lines that the command prints."""
    result = CliRunner().invoke(command.app, [str(run.path), "--format", "timm", "--out", str(path)])
    assert result.exit_code == 0, result.output
    *preparation, creation = result.output.splitlines()[1:]
    scope: dict[str, Any] = {"timm": timm}
    exec("\n".join(preparation), scope)  # noqa: S102  (our own lines)
    loaded: nn.Module = eval(creation, scope)  # noqa: S307
    return loaded


def test_a_changed_weight_shows_in_the_comparison(resnet: RunDir, tmp_path: Path) -> None:
    trainer = export(resnet, tmp_path / "packed.safetensors", NOWHERE)
    loaded = load_packed(tmp_path / "packed.safetensors")
    with torch.no_grad():
        loaded.get_parameter("fc.bias")[3] += 1
    assert compare(trainer, loaded, NOWHERE).num_equal == 0


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(resnet: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "new" / "again.safetensors"
    arguments = [sys.executable, "-m", "suite.export", str(resnet.path), "--out", str(out)]
    subprocess.run(arguments, check=True, capture_output=True)
    assert out.read_bytes() == (resnet.path / "packed.safetensors").read_bytes()


def test_a_file_says_what_it_holds(resnet: RunDir) -> None:
    with safe_open(resnet.path / "packed.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
        conv = file.get_tensor("layer1.0.conv1.weight")
        assert len(file.metadata()) == 1, "the order of several entries would vary"
    cell, result = resnet.cell(), resnet.result() or {}
    assert header["version"] == 1
    assert header["bit_order"] == "least significant first"
    assert header["binary"]["layer1.0.conv1.weight"] == {"shape": [16, 16, 3, 3], "dtype": "float32"}
    assert (conv.dtype, conv.shape) == (torch.uint8, (288,))
    assert Cell.model_validate(header["cell"]) == cell
    assert (header["cell_id"], header["top1_hard"]) == (cell.id, result["top1_hard"])
    assert (header["num_classes"], header["in_chans"], header["image_size"]) == (10, 1, 8)
    assert header["classes"] == list("0123456789")
    assert header["commit"] == resnet.provenance()["code"]["commit"]


def test_the_reader_in_the_docs_reads_a_file(run: RunDir, tmp_path: Path) -> None:
    export(run, tmp_path / "packed.safetensors", NOWHERE)
    state = load_packed(tmp_path / "packed.safetensors").state_dict()
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(textwrap.dedent(page[page.index("    import json\n") :]), names)  # noqa: S102  (our own docs)
    header, tensors = names["read"](tmp_path / "packed.safetensors")
    assert header["weights_sha256"] == (run.result() or {})["weights_sha256"]
    assert tensors.keys() == state.keys()
    for name, value in tensors.items():
        assert torch.equal(torch.tensor(value), state[name]), name


def test_reading_a_file_draws_no_random_numbers(resnet: RunDir) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_packed(resnet.path / "packed.safetensors")
    assert torch.equal(torch.rand(3), expected)


def test_resnet18_shrinks_by_28_and_gives_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cell = tiny_cell(dataset="imagenet", model="resnet18", quantizer="bnn")
    model = models.create("resnet18", num_classes=1000, image_size=224)
    split = models.binarize(model)
    images = torch.randn(4, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    wrap(cell, build_base(cell, model, split)).harden()
    torch.optim.swa_utils.update_bn([images], model)  # untrained statistics would let activations overflow
    path = tmp_path / "resnet18.safetensors"
    write(path, model, split, Origin(cell=cell, classes=tuple(f"class {number}" for number in range(1000))))
    with torch.no_grad():
        logits = model.eval()(images)
        assert logits.isfinite().all()
        assert _bits(load_packed(path)(images)) == _bits(logits)
    sizes = measure(path, model)
    print(f"\nresnet18: {sizes}, ratios {sizes.binary_ratio:.2f} (binary tensors), {sizes.file_ratio:.2f} (file)")
    assert sizes.binary_ratio >= 28
    assert sizes.file_ratio > 12


# Runs that cannot be exported


def test_a_run_that_is_not_done_is_refused(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", tiny_cell())
    with pytest.raises(ExportError, match=r"digits/resnet8/bnn\+\+/s0 is not done \(queued\)"):
        export(run, tmp_path / "out", NOWHERE)
    assert not (tmp_path / "out").exists()


def test_a_run_whose_last_checkpoint_is_damaged_is_refused(copied: RunDir, tmp_path: Path) -> None:
    last = copied.checkpoints / "epoch-000002-step-000000.pt"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ExportError, match="newest intact checkpoint is from epoch 1, the tested network from epoch 2"):
        export(copied, tmp_path / "out", NOWHERE)


def test_a_run_without_checkpoints_is_refused(copied: RunDir, tmp_path: Path) -> None:
    shutil.rmtree(copied.checkpoints)
    with pytest.raises(ExportError, match="no checkpoint"):
        export(copied, tmp_path / "out", NOWHERE)


def test_another_network_than_the_tested_one_is_refused(copied: RunDir, tmp_path: Path) -> None:
    _edit_result(copied, weights_sha256="0" * 64)
    with pytest.raises(ExportError, match="not the tested network, its weights_sha256 differs"):
        export(copied, tmp_path / "out", NOWHERE)
    assert not (tmp_path / "out").exists()


def _edit_result(run: RunDir, **changes: object) -> None:
    run.result_path.write_text(json.dumps((run.result() or {}) | changes), encoding="utf-8")


def test_weights_that_are_not_plus_or_minus_one_are_refused(tmp_path: Path) -> None:
    model = models.create("resnet8", num_classes=10, image_size=8, in_chans=1)
    split = models.binarize(model)  # the weights hold latents
    with pytest.raises(ExportError, match=r"layer1\.0\.conv1\.weight: .* at index \(0, 0, 0, 0\) is neither -1 nor"):
        write(tmp_path / "out", model, split, Origin(cell=tiny_cell(), classes=tuple("0123456789")))
    assert not (tmp_path / "out").exists()


# Files that cannot be loaded


def _flip_a_bit(tensors: dict[str, Tensor], _header: dict[str, Any]) -> None:
    tensors["layer2.0.conv1.weight"][5] ^= 16


def _shift_a_mean(tensors: dict[str, Tensor], _header: dict[str, Any]) -> None:
    tensors["bn1.running_mean"][0] += 1e-6


def _unpack_nothing(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    del header["binary"]["layer1.0.conv1.weight"], tensors["fc.bias"]


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "newer version": (lambda _, header: header.update(version=2), "proxbench-1bit version 2; this .* version 1$"),
    "no version": (lambda _, header: header.pop("version"), "its header is damaged: no 'version'"),
    "no cell": (lambda _, header: header.pop("cell"), "its header is damaged: cell: Field required"),
    "other bit order": (lambda _, header: header.update(bit_order="most"), "damaged: bit_order: Input should be"),
    "unknown model": (lambda _, header: header["cell"].update(model="resnet9"), r"cell\.model: .*'resnet9'"),
    "missing tensor": (lambda tensors, _: tensors.pop("fc.bias"), r"lacks fc\.bias$"),
    "additional tensor": (lambda tensors, _: tensors.update(x=torch.zeros(1)), "has, unlike its model, x$"),
    "no shape": (_unpack_nothing, r"lacks fc\.bias$"),
    "not said to be binary": (
        lambda _, header: header["binary"].pop("layer1.0.conv1.weight"),
        r"does not say how to unpack layer1\.0\.conv1\.weight$",
    ),
    "packed head": (
        lambda _, header: header["binary"].update({"fc.weight": {"shape": [10, 64], "dtype": "float32"}}),
        r"has, unlike its model, fc\.weight$",
    ),
    "too few bits": (
        lambda tensors, _: tensors.update({"layer1.0.conv1.weight": torch.zeros(287, dtype=torch.uint8)}),
        r"layer1\.0\.conv1\.weight: 2304 bits for shape \(16, 16, 3, 3\) are uint8 \(288,\), not uint8 \(287,\)",
    ),
    "other shape": (
        lambda _, header: header["binary"]["layer1.0.conv1.weight"].update(shape=[16, 9, 16]),
        r"layer1\.0\.conv1\.weight is float32 \(16, 9, 16\), its model has float32 \(16, 16, 3, 3\)",
    ),
    "other dtype": (
        lambda tensors, _: tensors.update({"fc.bias": torch.zeros(10, dtype=torch.float64)}),
        r"fc\.bias is float64 \(10,\), its model has float32 \(10,\)",
    ),
    "flipped bit": (_flip_a_bit, "damaged: the weights_sha256 of its network differs"),
    "shifted mean": (_shift_a_mean, "damaged: the weights_sha256 of its network differs"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(exported: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    _rewrite(exported, change)
    with pytest.raises(ExportError, match=message) as refusal:
        load_packed(exported)
    assert str(refusal.value).startswith(f"{exported}: ")
    assert "\n" not in str(refusal.value)


def test_a_file_written_again_unchanged_is_read(exported: Path) -> None:
    _rewrite(exported, lambda _tensors, _header: None)
    load_packed(exported)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(exported: Path, length: int) -> None:
    exported.write_bytes(exported.read_bytes()[:length])
    with pytest.raises(ExportError, match="not a whole safetensors file"):
        load_packed(exported)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"w": pack(torch.ones(3))}, other)
    with pytest.raises(ExportError, match="but not a proxbench-1bit one"):
        load_packed(other)
    with pytest.raises(ExportError, match="not a whole safetensors file: No such file"):
        load_packed(tmp_path / "none")
    torch.save(nn.Linear(2, 2).state_dict(), other)
    with pytest.raises(ExportError, match="not a whole safetensors file"):
        load_packed(other)


# The command


def test_the_command_checks_what_it_wrote(copied: RunDir) -> None:
    answer = _command(copied.path, "--check")
    assert answer.exit_code == 0, answer.output
    assert "bit-identical on 359 of 359 test images" in answer.stdout
    assert "binary tensors" in answer.stdout
    assert "32.00" in answer.stdout


def test_the_command_exits_1_where_the_file_gives_other_logits(copied: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(path: Path) -> nn.Module:
        loaded = load_packed(path)
        with torch.no_grad():
            loaded.get_parameter("fc.bias")[3] += 1
        return loaded

    monkeypatch.setattr(command, "load_packed", changed)
    answer = _command(copied.path, "--check")
    assert answer.exit_code == 1
    assert "bit-identical on 0 of 359 test images" in answer.stdout
    assert "the file is not the tested network" in answer.stdout


def test_an_accuracy_measured_on_another_device_is_shown_and_not_judged(copied: RunDir) -> None:
    _edit_result(copied, top1_hard=0.999)
    answer = _command(copied.path, "--check")
    assert answer.exit_code == 0
    assert "99.90% in result.json" in answer.stdout


def test_a_network_is_exported_without_its_data(copied: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suite.data.datasets.load", None)
    assert _command(copied.path).exit_code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: shutil.rmtree(run.path), "not a run directory"),
        (lambda run: run.cell_path.write_text("model: ["), "its cell.yaml or result.json is damaged"),
        (lambda run: run.cell_path.write_text("model: resnet8"), "is damaged: dataset: Field required"),
        (lambda run: run.result_path.write_text("{"), "result.json: not what a run writes there"),
        (lambda run: (run.path / "packed.safetensors.d").mkdir(), "cannot be written: Is a directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(copied: RunDir, change: Callable[[RunDir], object], message: str) -> None:
    change(copied)
    answer = _command(copied.path, "--out", copied.path / "packed.safetensors.d")
    assert answer.exit_code == 2
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stdout == ""


def test_a_long_comparison_shows_how_far_it_is(
    resnet: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "PATIENCE_SECONDS", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: a terminal
    monkeypatch.setenv("TERM", "xterm")
    trainer = Trainer(resnet.cell(), Layout(), NOWHERE, None)
    compare(trainer, trainer.engine.model, NOWHERE)
    assert "comparing logits" in capsys.readouterr().err
