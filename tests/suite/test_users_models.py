"""A user's own network, `module:function`, is created, binarized, trained, shown and exported like timm's."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from analysis.compare.table import tabulate
from analysis.render.tables import to_markdown
from analysis.runs import folders
from launch import cost, snapshot
from launch.start import layers
from suite.errors import UserError
from suite.export.__main__ import export
from suite.export.one_bit import load_packed
from suite.recipe.cell import Cell
from suite.recipe.grid_file import GridError, load_grid
from suite.run.directory import Planned, RunDir, write_plan
from suite.train import train
from suite.training.pretrained import require_named

MODULE = """
from torch import nn
from users_blocks import block

def three_layers(num_classes, in_chans, drop_rate=0.0):
    return nn.Sequential(*block(in_chans, 8), *block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Dropout(drop_rate), nn.Linear(8, num_classes))

def with_ends(**keywords):
    network = three_layers(**keywords)
    network.pretrained_cfg = {"first_conv": "0", "classifier": "9"}
    return network

def flat(num_classes, in_chans, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * image_size**2, 4), nn.Linear(4, num_classes))

class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)) * x.max().item()

def by_value(num_classes, in_chans, image_size):
    return Scaled(in_chans * image_size**2, num_classes)

def nothing(num_classes, in_chans):
    return None

def unfinished(num_classes, in_chans):
    raise NotImplementedError("the second half")

def by_width(width):
    return nn.Linear(width, width)

SETTINGS = {"width": 8}
"""
BLOCKS = """
from torch import nn

def block(num_inputs, num_outputs):
    return nn.Conv2d(num_inputs, num_outputs, 3, padding=1, bias=False), nn.BatchNorm2d(num_outputs), nn.ReLU()
"""
GRID = """\
name: mine
dataset: digits
models: [{model}]
quantizers: [fp, bc]
seeds: [0]
training: {{epochs: 1, batch_size: 256, optimizer: adamw, learning_rate: 0.003}}
quantization:
  full_precision: {kept}
"""
OWN = "users_models:three_layers"


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory with the user's module, not yet imported."""
    (tmp_path / "users_models.py").write_text(MODULE)
    (tmp_path / "users_blocks.py").write_text(BLOCKS)
    monkeypatch.chdir(tmp_path)
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name in ("users_models", "users_blocks"):
        sys.modules.pop(name, None)
    models.skeleton.cache_clear()


def _grid(model: str, kept: str = '["0", "9"]') -> str:
    path = Path("grid.yaml")
    path.write_text(GRID.format(model=model, kept=kept))
    return str(path)


def _cell(make_cell: Callable[..., Cell], **changes: object) -> Cell:
    kept = {"model": OWN, "quantizer": "bc", "quantization__full_precision": ["0", "9"], "training__epochs": 1}
    return make_cell(**{"quantization__sharpness": {}, **kept, **changes})


def test_a_network_is_made_with_the_sizes_and_the_rate_that_its_function_takes() -> None:
    network = models.create(OWN, num_classes=7, image_size=8, in_chans=1, dropout=0.25)
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    assert [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)] == [0.25]
    assert models.create("users_models:flat", 10, image_size=8, in_chans=1).get_parameter("1.weight").shape == (4, 64)


def test_its_ends_are_those_that_it_records() -> None:
    network = models.create("users_models:with_ends", num_classes=10, image_size=8, in_chans=1)
    assert models.binarize(network).binary == ("3.weight",)


def test_a_skeleton_of_it_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    assert models.skeleton(OWN).get_parameter("0.weight").is_meta
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model", "kept", "message"),
    [
        ("no_such:f", "[]", "3: models: no_such:f: cannot import 'no_such': ModuleNotFoundError: "),
        (
            "users_models:three_layer",
            "[]",
            "3: models: users_models:three_layer: unknown attribute 'three_layer'; did you mean 'three_layers'? (three",
        ),
        ("users_models:SETTINGS", "[]", "3: models: users_models:SETTINGS: of type dict, not a function; users_models"),
        (
            "users_models:by_width",
            "[]",
            "3: models: users_models:by_width is called with num_classes, in_chans: missing a required",
        ),
        ("users_models:nothing", "[]", "3: models: users_models:nothing returned a NoneType, not an nn.Module"),
        (
            "users_models:unfinished",
            "[]",
            "3: models: users_models:unfinished cannot make a network: NotImplementedError: the second half",
        ),
        (OWN, "[ends]", "8: quantization.full_precision: Sequential: timm's metadata has no 'first_conv', so"),
        (OWN, '["7"]', "8: quantization.full_precision: unknown layers to keep in full precision '7'"),
    ],
)
def test_a_grid_with_one_that_cannot_be_trained_is_refused_with_its_line(model: str, kept: str, message: str) -> None:
    with pytest.raises(GridError) as refused:
        load_grid(_grid(model, kept))
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"grid.yaml:{message}")


def test_a_grid_may_use_the_rates_that_its_function_takes_and_no_others() -> None:
    path = Path(_grid(OWN))
    text = path.read_text()
    path.write_text(text.replace("epochs: 1", "epochs: 1, dropout: 0.1"))
    assert len(load_grid(str(path)).cells()) == 2
    path.write_text(text.replace("epochs: 1", "epochs: 1, drop_path: 0.1"))
    with pytest.raises(GridError, match=f"grid.yaml:6: training.drop_path: {OWN} has no drop_path_rate$"):
        load_grid(str(path))


def test_a_dry_run_counts_its_weights_and_its_cost(make_cell: Callable[..., Cell]) -> None:
    expected = f"{OWN}: 576 weights in 1 layer binary; in full precision 0 1 layer, 9 1 layer"
    assert layers([_cell(make_cell)]) == [expected]
    pixels = 64
    multiply_adds = pixels * 9 * (8 + 8 * 8) + 8 * 10
    assert cost.operations(OWN, "digits", None).forward == 2 * multiply_adds


def test_the_cost_of_one_that_computes_with_values_is_unknown(make_cell: Callable[..., Cell]) -> None:
    assert cost.gpu_hours([_cell(make_cell)]) is not None
    own = {"model": "users_models:by_value", "quantizer": "fp", "quantization__full_precision": ["ends"]}
    assert cost.gpu_hours([_cell(make_cell, **own)]) is None


def test_it_has_no_published_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{OWN} is your own model"):
        require_named(OWN, tmp_path)


def test_it_trains_is_tabulated_and_exported_and_its_module_travels_with_the_code(
    tmp_path: Path, make_cell: Callable[..., Cell]
) -> None:
    cells = [_cell(make_cell), _cell(make_cell, quantizer="fp", quantization__full_precision=["ends"])]
    grid_dir = tmp_path / "runs" / "mine"
    runs = [RunDir.create(grid_dir / cell.id, cell) for cell in cells]
    for run in runs:
        train(run, tmp_path)
    write_plan(grid_dir, map(Planned, cells))

    frame = folders.load(tmp_path / "runs", "mine").frame
    assert frame["top1_hard"].notna().all()
    assert frame["users_digest"].str.fullmatch("[0-9a-f]{16}").all()
    assert f"| {OWN}: accuracy" in to_markdown(tabulate(folders.load(tmp_path / "runs", "mine")))

    export(runs[0], tmp_path / "packed.safetensors", tmp_path)
    packed = load_packed(tmp_path / "packed.safetensors")
    assert packed.get_parameter("3.weight").abs().eq(1.0).all()

    code = snapshot.folder_of(tmp_path, snapshot.take(tmp_path, cells))
    assert (code / "users_models.py").read_text() == MODULE
    assert (code / "users_blocks.py").read_text() == BLOCKS


def test_exporting_it_where_its_module_is_missing_says_where_to_go(
    tmp_path: Path, make_cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.create(tmp_path / "runs" / "mine" / _cell(make_cell).id, _cell(make_cell))
    train(run, tmp_path)
    _forget()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{OWN}: cannot import .*; run this where its module is, or in "):
        export(run, tmp_path / "packed.safetensors", tmp_path)
