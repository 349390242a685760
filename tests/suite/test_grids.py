"""The bundled grids have the promised cells, compare like with like, and give the source of each value."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from cost import table

import models
from launch.cost import operations
from suite.recipe.bundled import BUNDLED, bundled_names
from suite.recipe.cell import Cell
from suite.recipe.grid_file import load_grid
from suite.recipe.settings import Data, Training
from suite.training.build import build_lr_schedule

PAPERS = {
    "imagenet": {
        *("resnet18", "resnet50", "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"),
        "vit_base_patch16_224",
    },
    "cifar10": {"resnet20", "resnet56", "vit_mini_patch4_32"},
    "cifar100": {"resnet20", "resnet56", "vit_mini_patch4_32"},
}
BINARY = {"bc", "pc", "bnn", "bnn+", "bnn++"}
SEEDS = {0, 1, 2}
REPRODUCING = Path(__file__).parents[2] / "docs" / "reproducing.md"
PROTOCOLS = ("deit-imagenet", "ffcv-resnet-16", "ffcv-resnet-88", "parq-cifar10", "parq-imagenet", "reactnet-imagenet")
"""Grids that follow a complete published recipe."""
SOURCES = ("He 2016", "DeiT", "ViT", "ClassyVision", "the PC++ paper, as told", "ours", "PARQ", "FFCV", "ReActNet")


def _cells(grid: str) -> list[Cell]:
    return list(load_grid(grid).untuned().cells())


@pytest.mark.parametrize("name", bundled_names())
def test_every_bundled_grid_can_be_read_and_has_its_files_name(name: str) -> None:
    grid = load_grid(name)
    assert grid.name == name
    assert grid.description
    assert grid.cells()


@pytest.mark.parametrize(("grid", "num_cells"), [("imagenet", 198), ("cifar10", 99), ("cifar100", 99)])
def test_each_model_is_trained_from_scratch_and_fine_tuned_by_every_method(grid: str, num_cells: int) -> None:
    cells = _cells(grid)
    expected = {
        *((m, q, s, "scratch") for m in PAPERS[grid] for q in {"fp"} | BINARY for s in SEEDS),
        *((m, q, s, "finetune") for m in PAPERS[grid] for q in BINARY for s in SEEDS),
    }
    assert {(cell.model, cell.quantizer, cell.seed, cell.init) for cell in cells} == expected
    assert len(cells) == num_cells


@pytest.mark.parametrize("grid", PAPERS)
def test_fine_tuning_takes_100_epochs_from_the_full_precision_cell_of_its_seed(grid: str) -> None:
    cells = {cell.id: cell for cell in _cells(grid)}
    for cell in cells.values():
        if cell.init == "finetune":
            assert cell.training.epochs == 100
            parent = cells[str(cell.parent)]
            assert (parent.quantizer, parent.init) == ("fp", "scratch")
            assert (parent.model, parent.seed) == (cell.model, cell.seed)


@pytest.mark.parametrize("grid", ["cifar10", "cifar100"])
def test_training_on_cifar_from_scratch_takes_300_epochs(grid: str) -> None:
    assert {cell.training.epochs for cell in _cells(grid) if cell.init == "scratch"} == {300}


@pytest.mark.parametrize("grid", PAPERS)
def test_methods_that_are_compared_share_everything_but_the_quantizer(grid: str) -> None:
    recipes = defaultdict(set)
    for cell in _cells(grid):
        recipes[cell.model, cell.init].add((cell.data.model_dump_json(), cell.training.model_dump_json()))
    assert all(len(found) == 1 for found in recipes.values()), recipes


@pytest.mark.parametrize("grid", PAPERS)
def test_fine_tuning_keeps_the_recipe_but_for_its_length_and_a_tenth_of_the_learning_rate(grid: str) -> None:
    trained = {(cell.model, cell.init): cell.training for cell in _cells(grid)}
    for model in PAPERS[grid]:
        scratch, finetune = trained[model, "scratch"], trained[model, "finetune"]
        assert finetune.learning_rate == pytest.approx(scratch.learning_rate / 10)
        length = {"epochs": 0, "warmup_epochs": 0, "learning_rate": 0}
        assert finetune.model_copy(update=length) == scratch.model_copy(update=length)


def test_no_network_of_the_imagenet_grid_is_trained_twice_in_the_same_way() -> None:
    """deit_base_patch16_224 and vit_base_patch16_224 are the same network with the same initial weights."""
    recipes = {cell.model: cell.training for cell in _cells("imagenet") if cell.init == "scratch"}
    seen: dict[str, list[Training]] = defaultdict(list)
    for name, training in recipes.items():
        with torch.device("meta"):
            network = repr(models.create(name, num_classes=1000, image_size=224))
        assert training not in seen[network], name
        seen[network].append(training)
    assert max(map(len, seen.values())) == 2


def test_cifar_100_is_trained_as_cifar_10_is() -> None:
    recipes = [{(c.model, c.quantizer, c.seed, c.init): _recipe(c) for c in _cells(grid)} for grid in list(PAPERS)[1:]]
    assert recipes[0] == recipes[1]


def _recipe(cell: Cell) -> dict[str, Any]:
    return cell.model_dump(include={"data", "training", "quantization"})


@pytest.mark.parametrize("grid", PAPERS)
@pytest.mark.parametrize("num_processes", [1, 2, 4, 8, 16])
def test_batches_divide_over_processes_and_into_pairs_and_micro_batches(grid: str, num_processes: int) -> None:
    executions = load_grid(grid).untuned().executions()
    for cell in _cells(grid):
        share, rest = divmod(cell.training.batch_size, num_processes)
        assert rest == 0
        assert share % 2 == 0
        assert share % min(executions[cell.id].micro_batch_size or share, share) == 0


@pytest.mark.parametrize("grid", PROTOCOLS)
def test_binary_methods_share_everything_but_the_quantizer_in_protocol_grids(grid: str) -> None:
    recipes = defaultdict(set)
    for cell in _cells(grid):
        if cell.quantizer != "fp":
            quantization = cell.quantization.model_copy(update={"sharpness": {}})
            parts = (cell.data, cell.training, quantization, cell.distillation)
            recipes[cell.model, cell.init].add(tuple(part and part.model_dump_json() for part in parts))
    assert recipes
    assert all(len(found) == 1 for found in recipes.values())


def test_reactnets_second_stage_starts_from_its_first_and_both_have_the_teacher() -> None:
    cells = {cell.id: cell for cell in _cells("reactnet-imagenet")}
    assert {cell.distillation and cell.distillation.weights for cell in cells.values()} == {"resnet34.tv_in1k"}
    for cell in cells.values():
        parent = cells.get(cell.parent or "")
        assert (parent is None) == (cell.task == "ba")
        assert parent is None or (parent.task, parent.quantizer, parent.seed) == ("ba", "fp", cell.seed)


@pytest.mark.parametrize(("epochs", "start", "end"), [(16, 11, 13), (88, 65, 76)])
def test_ffcvs_recipes_rise_to_their_peak_in_two_epochs_and_fall_to_0(epochs: int, start: int, end: int) -> None:
    cell = _cells(f"ffcv-resnet-{epochs}")[0]
    resizing = cell.data.progressive_resizing
    assert resizing is not None
    assert (cell.training.epochs, resizing.from_epoch, resizing.to_epoch) == (epochs, start, end)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cell.training.learning_rate)
    schedule: Any = build_lr_schedule(cell.training, optimizer, 10)  # type: ignore[arg-type]
    rates = []
    for step in range(10 * epochs):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    peak = cell.training.learning_rate
    assert rates[0] == 0.0
    assert rates[10] == pytest.approx(peak / 2)
    assert rates[20] == pytest.approx(peak)
    assert rates[-1] == pytest.approx(peak / (10 * (epochs - 2)))
    assert rates[5 * epochs + 10] == pytest.approx(peak / 2)


@pytest.mark.parametrize("grid", [*PAPERS, *PROTOCOLS])
def test_every_value_of_a_recipe_names_its_source(grid: str) -> None:
    settings = Data.model_fields.keys() | Training.model_fields.keys()
    unmarked = []
    for number, line in enumerate((BUNDLED / f"{grid}.yaml").read_text(encoding="utf-8").splitlines(), 1):
        value, _, comment = line.partition("#")
        key = re.match(r" +(\w+): +[^{&\s]", value)
        if (
            key
            and key[1] in settings
            and "null" not in value
            and not comment.strip().startswith((*SOURCES, "224 / 256, as DeiT"))
        ):
            unmarked.append(f"{grid}.yaml:{number}: {line.strip()}")
    assert not unmarked


@pytest.mark.parametrize(("grid", "share"), [pytest.param("imagenet", 0.2, marks=pytest.mark.slow), ("cifar10", 0.01)])
def test_the_estimates_in_the_docs_are_what_the_script_prints(grid: str, share: float) -> None:
    printed = "\n".join(table(_cells(grid), share * 312e12))
    assert printed in REPRODUCING.read_text(encoding="utf-8")


def test_operations_are_counted_as_the_literature_counts_them() -> None:
    """He et al. 2016, table 1: ResNet-18 has 1.8 billion multiply-adds. A step is 3 passes, less images' gradients."""
    each = operations("resnet18", "imagenet", 224)
    assert each.forward / 2 == pytest.approx(1.8e9, rel=0.02)
    assert 2.9 < each.step / each.forward < 3


def test_the_docs_grid_of_published_weights_can_be_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"\n\n(    name: .*?)\n\n", REPRODUCING.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(line[4:] for line in text.splitlines()), encoding="utf-8")
    cells = load_grid(str(path)).cells()
    assert {cell.init for cell in cells} == {"pretrained"}
    tags = {cell.model for cell in cells}
    assert all(name in timm.list_pretrained() for name in tags)
