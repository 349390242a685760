"""A cell's id depends on everything that changes its result, and on nothing else."""

import pickle
import re
from collections.abc import Callable

import pytest
import yaml
from pydantic import ValidationError
from tiny_cells import tiny_grid

from quantizers import QUANTIZERS
from suite.recipe.block import Block
from suite.recipe.cell import Cell
from suite.recipe.grid import Grid
from suite.recipe.settings import RECORDED, Execution, Inputs, Sharpness
from suite.training.build import _shape
from suite.training.seeds import stream


def test_id_is_the_same_on_every_machine_and_day(make_cell: Callable[..., Cell]) -> None:
    assert make_cell().id == "b33053481b13"


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "cifar10"},
        {"model": "resnet20"},
        {"quantizer": "bc"},
        {"seed": 1},
        {"init": "finetune"},
        {"data__horizontal_flip": True},
        {"training__epochs": 3},
        {"training__learning_rate": 0.0031},
        {"quantization__clip_latents": True},
        {"quantization__scale": "channel"},
        {"quantization__update": "pq"},
        {"quantization__full_precision": ["ends", "shortcuts"]},
        {"task": "bwa", "quantization__inputs": {"quantizer": "bnn"}},
    ],
)
def test_id_changes_with_what_changes_the_result(make_cell: Callable[..., Cell], change: dict[str, object]) -> None:
    assert make_cell(**change).id != make_cell().id


SGD = {"training__optimizer": "sgd"}
STEP = {"training__schedule": "step", "training__decay_epochs": [1]}
PHOTOGRAPHS = {
    "dataset": "imagenet",
    "data__image_size": 64,
    "data__crop": "random_resized",
    "data__crop_padding": None,
}


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ({**SGD, "training__momentum": 0.9, "training__nesterov": False}, SGD),
        ({**STEP, "training__decay_rate": 0.1}, STEP),
        ({"data__crop_padding": 4}, {"data__crop_padding": None}),
        ({**PHOTOGRAPHS, "data__evaluation_ratio": 0.875}, PHOTOGRAPHS),
        ({"data__evaluation_ratio": 1.0}, {}),
        ({"training__momentum": None, "training__decay_epochs": None}, {}),
    ],
)
def test_a_default_that_is_written_out_is_the_same_cell(
    make_cell: Callable[..., Cell], given: dict[str, object], left_out: dict[str, object]
) -> None:
    assert make_cell(**given).id == make_cell(**left_out).id
    assert make_cell(**given).recipe_id == make_cell(**left_out).recipe_id


def test_a_cell_says_nothing_of_what_it_does_not_use(make_cell: Callable[..., Cell]) -> None:
    unused = {"momentum", "nesterov", "decay_epochs", "decay_rate"}
    assert set(make_cell().training.model_dump(include=unused).values()) == {None}
    used = make_cell(**SGD, **STEP).training.model_dump(include=unused)
    assert used == {"momentum": 0.9, "nesterov": False, "decay_epochs": (1,), "decay_rate": 0.1}
    assert make_cell(data__crop="none").data.crop_padding is None


def test_a_recorded_cell_is_read_as_it_was_written(make_cell: Callable[..., Cell]) -> None:
    for cell in (make_cell(), make_cell(**SGD, **STEP), make_cell(**PHOTOGRAPHS)):
        assert Cell.model_validate(cell.model_dump(mode="json"), context=RECORDED) == cell


def test_resizing_what_lies_in_memory_is_refused(make_cell: Callable[..., Cell]) -> None:
    with pytest.raises(ValidationError, match="image_size: is for image files; digits is held in memory and stays at"):
        make_cell(data__image_size=16)


def test_id_does_not_depend_on_how_numbers_are_written(make_cell: Callable[..., Cell]) -> None:
    assert make_cell(training__learning_rate="3e-3").id == make_cell().id


def test_how_a_cell_runs_is_no_part_of_it(make_cell: Callable[..., Cell]) -> None:
    with pytest.raises(ValidationError, match=r"execution\n  Extra inputs are not permitted"):
        make_cell(execution={"micro_batch_size": 32})
    block = {key: value for key, value in tiny_grid().items() if key != "name"}
    blocks = [Block.model_validate(block | {"execution": how}) for how in ({}, {"micro_batch_size": 32})]
    grids = [Grid(name="tiny", blocks=(block,)) for block in blocks]
    assert grids[0].cells() == grids[1].cells()
    assert set(grids[1].executions()) == {cell.id for cell in grids[1].cells()}
    assert {execution.micro_batch_size for execution in grids[1].executions().values()} == {32}


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        ({"zero_stage": 2}, "zero_stage: only with engine: deepspeed, here it is plain"),
        ({"offload": True}, "offload: only with engine: deepspeed, here it is plain"),
        ({"deepspeed": {"a": 1}}, "deepspeed: only with engine: deepspeed, here it is plain"),
        ({"engine": "deepspeed", "compile": True}, "compile: only with engine: plain, here it is deepspeed"),
        ({"engine": "deepspeed", "offload": True}, "zero_stage 0 has nothing to offload; take 1, 2 or 3"),
        ({"engine": "deepspeed", "zero_stage": 4}, "Input should be 0, 1, 2 or 3"),
    ],
)
def test_a_key_of_the_other_engine_is_refused(execution: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Execution.model_validate(execution)


def test_recipe_id_is_shared_by_the_seeds_only(make_cell: Callable[..., Cell]) -> None:
    assert make_cell(seed=1).recipe_id == make_cell().recipe_id
    assert make_cell(training__epochs=3).recipe_id != make_cell().recipe_id


def test_name_says_data_set_model_quantizer_seed_and_start(make_cell: Callable[..., Cell]) -> None:
    assert make_cell(seed=3).name == "digits/resnet8/bnn++/s3"
    assert make_cell(init="finetune").name == "digits/resnet8/bnn++/s0/finetune"
    assert _bwa(make_cell, init="finetune").name == "digits/resnet8/bnn++/s0/finetune/bwa"


def test_a_cell_is_frozen(make_cell: Callable[..., Cell]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_cell().__setattr__("seed", 1)


def _bwa(make_cell: Callable[..., Cell], quantizer: str = "bnn", **changes: object) -> Cell:
    inputs = {"quantizer": quantizer, "sharpness": None if quantizer == "bnn" else {"start": 1.0}}
    return make_cell(task="bwa", quantization__inputs=inputs, **changes)


def test_cells_of_either_task_and_of_each_quantizer_of_inputs_are_different(make_cell: Callable[..., Cell]) -> None:
    cells = [make_cell(), _bwa(make_cell), _bwa(make_cell, "bireal")]
    assert len({cell.id for cell in cells}) == len({cell.recipe_id for cell in cells}) == 3


def test_a_cell_has_inputs_exactly_where_its_task_has(make_cell: Callable[..., Cell]) -> None:
    with pytest.raises(ValidationError, match="a cell has them if and only if its task is bwa, ba or bwaa"):
        make_cell(task="bwa")
    with pytest.raises(ValidationError, match="a cell has them if and only if its task is bwa, ba or bwaa"):
        make_cell(quantization__inputs={"quantizer": "bnn"})
    with pytest.raises(ValidationError, match="a full-precision cell has no binary weights"):
        Cell.model_validate(_bwa(make_cell).model_dump() | {"quantizer": "fp"})


def _block(cell: Cell, **changes: object) -> Block:
    raw = {
        "dataset": cell.dataset,
        "models": [cell.model],
        "quantizers": ["fp", "bc", "bnn++"],
        "seeds": [0, 1],
        "data": cell.data,
        "training": cell.training,
        "quantization": cell.quantization,
    }
    return Block.model_validate(raw | changes)


def test_a_copy_with_other_values_has_an_id_of_its_own(make_cell: Callable[..., Cell]) -> None:
    cell = make_cell()
    assert cell.model_copy(update={"seed": 1}).id == make_cell(seed=1).id != cell.id
    assert Cell.model_validate(cell.model_dump()) == cell
    assert pickle.loads(pickle.dumps(cell)).id == cell.id  # noqa: S301


def test_another_methods_mu_changes_no_id(make_cell: Callable[..., Cell]) -> None:
    cell = make_cell()
    sharper = cell.quantization.model_copy(update={"sharpness": {"bnn++": Sharpness(start=7.0)}})
    ids = {each.quantizer: each.id for each in _block(cell, seeds=[0]).cells()}
    new_ids = {each.quantizer: each.id for each in _block(cell, seeds=[0], quantization=sharper).cells()}
    assert {name for name in ids if ids[name] != new_ids[name]} == {"bnn++"}


def test_full_precision_shares_its_cells_between_ways_to_binarize(make_cell: Callable[..., Cell]) -> None:
    cell = make_cell()
    clipped = cell.quantization.model_copy(update={"clip_latents": True})
    assert _block(cell).cells()[0].id == _block(cell, quantization=clipped).cells()[0].id


def test_a_grid_holds_each_cell_once(make_cell: Callable[..., Cell]) -> None:
    block = _block(make_cell())
    assert len(Grid(name="g", blocks=(block, block)).cells()) == len(block.cells()) == 6


def test_a_finetune_cell_starts_from_the_full_precision_cell_of_its_seed(make_cell: Callable[..., Cell]) -> None:
    cells = Grid(
        name="g",
        blocks=(
            _block(make_cell(), init="finetune", quantizers=["bc"]),
            _block(make_cell(), quantizers=["fp"]),
        ),
    ).cells()
    parents = {cell.seed: cell.id for cell in cells[:2]}
    assert [cell.quantizer for cell in cells] == ["fp", "fp", "bc", "bc"]
    assert [cell.parent for cell in cells] == [None, None, parents[0], parents[1]]


def test_a_finetune_cell_of_published_weights_says_how_images_are_normalised(make_cell: Callable[..., Cell]) -> None:
    block = _block(make_cell(), init="pretrained", quantizers=["fp"])
    child = _block(make_cell(), init="finetune", quantizers=["bc"])
    with pytest.raises(ValueError, match=r"needs digits/resnet8/fp/s0/pretrained, .* set data\.mean in both blocks"):
        Grid(name="g", blocks=(block, child)).cells()
    stated = child.model_copy(update={"data": child.data.model_copy(update={"mean": (0.5,), "std": (0.5,)})})
    assert Grid(name="g", blocks=(block, stated)).cells()[-1].parent == block.cells()[-1].id


def test_a_finetune_cell_without_its_parent_is_refused(make_cell: Callable[..., Cell]) -> None:
    with pytest.raises(ValueError, match="the grid has none"):
        Grid(name="g", blocks=(_block(make_cell(), init="finetune", quantizers=["bc"]),)).cells()


def test_streams_of_one_seed_are_unrelated_and_fixed() -> None:
    assert stream(0, "init") == 1519069808562059438
    streams = {
        stream(seed, purpose, epoch) for seed in range(10) for purpose in ("init", "order") for epoch in range(10)
    }
    assert len(streams) == 200
    assert all(0 <= value < 2**63 for value in streams)


def test_full_precision_shares_its_cells_between_tasks_and_policies(make_cell: Callable[..., Cell]) -> None:
    cell = make_cell()
    kept = cell.quantization.model_copy(update={"full_precision": ("ends", "shortcuts")})
    blocks = tuple(_block(cell, task=task, quantization=q) for task in ("bw", "bwa") for q in (cell.quantization, kept))
    cells = Grid(name="g", blocks=blocks).cells()
    assert len([cell for cell in cells if cell.quantizer == "fp"]) == 2  # seeds
    assert len([cell for cell in cells if cell.quantizer == "bc"]) == 8
    assert {(cell.quantizer == "fp", cell.task) for cell in cells} == {(True, "bw"), (False, "bw"), (False, "bwa")}


def test_inputs_are_part_of_bwa_cells_only(make_cell: Callable[..., Cell]) -> None:
    cell = make_cell()
    given = cell.quantization.model_copy(update={"inputs": Inputs(quantizer="bc")})
    assert _block(cell, quantization=given).cells() == _block(cell).cells()
    cells = _block(cell, quantization=given, task="bwa", quantizers=["bc"]).cells()
    assert [cell.quantization.inputs for cell in cells] == [Inputs(quantizer="bc")] * 2
    cells = _block(cell, task="bwa", quantizers=["bc"]).cells()
    assert [cell.quantization.inputs for cell in cells] == [Inputs(quantizer="bnn")] * 2


def test_a_binary_activations_cell_can_start_from_the_full_precision_cell(make_cell: Callable[..., Cell]) -> None:
    blocks = (_block(make_cell()), _block(make_cell(), task="bwa", init="finetune", quantizers=["bc"]))
    cells = {cell.name: cell for cell in Grid(name="g", blocks=blocks).cells()}
    assert cells["digits/resnet8/bc/s1/finetune/bwa"].parent == cells["digits/resnet8/fp/s1"].id


@pytest.mark.parametrize("name", [name for name, row in QUANTIZERS.items() if row.uses_mu])
def test_a_missing_mu_is_answered_with_one_that_works(make_cell: Callable[..., Cell], name: str) -> None:
    with pytest.raises(ValidationError, match=f"{re.escape(name)} needs its mu, for instance ") as refused:
        make_cell(quantizer=name, quantization__sharpness={})
    suggested = str(refused.value).partition("for instance ")[2].partition(" [type")[0]
    sharpness = yaml.safe_load(f"{{{suggested}}}")
    cell = make_cell(quantizer=name, quantization__sharpness=sharpness)
    assert _shape(cell.quantization.sharpness[name]) == QUANTIZERS[name].usual_mu
    with pytest.raises(ValidationError, match=f"{re.escape(name)} needs its mu, for instance sharpness: ") as refused:
        make_cell(task="bwa", quantization__inputs={"quantizer": name})
    assert suggested.partition(": ")[2] in str(refused.value)


def test_inputs_that_stay_real_are_refused() -> None:
    with pytest.raises(ValidationError, match="fp leaves inputs real, as in task: bw"):
        Inputs(quantizer="fp")


def test_layers_that_no_name_matches_are_refused(make_cell: Callable[..., Cell]) -> None:
    with pytest.raises(ValidationError, match=r"unknown layers to keep in full precision 'shortcut'; did you mean"):
        make_cell(quantization__full_precision=["ends", "shortcut"])
    assert make_cell(quantization__full_precision="ends").id == make_cell().id
    assert make_cell(quantization__full_precision=["layer?.0.conv1"]).id != make_cell().id


def test_latents_with_a_scale_are_not_clipped_to_one(make_cell: Callable[..., Cell]) -> None:
    with pytest.raises(ValidationError, match="so it needs scale: none, here it is tensor"):
        make_cell(quantization__scale="tensor", quantization__clip_latents=True)


VIT = {"dataset": "folder/photos", "model": "deit_tiny_patch16_224"}
RISING = {"image_size": 224, "crop": "random_resized", "progressive_resizing": {"start": 128, "to_epoch": 2}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"data__image_size": 16},
            "image_size: is for image files; digits is held in memory and stays at its own size",
        ),
        ({"data__test_size": 16}, "test_size: is for image files"),
        ({"data__interpolation": "area"}, "interpolation: is for image files"),
        ({"data__evaluation_ratio": 0.875}, "evaluation_ratio: is for image files"),
        ({"data__crop": "random_resized"}, "crop: random_resized is for image files"),
        ({"data__crop_scale": [0.2, 1.0]}, r"crop_scale: only with crop: random_resized, here it is padded"),
        (
            {"data": {"crop": "random_resized", "crop_scale": [1.0, 0.2]}},
            r"crop_scale: \[1\.0, 0\.2\] is not an increasing range",
        ),
        ({"data__mean": [0.5]}, "mean: needs std, and std needs mean: give both or neither"),
        ({"data": {"mean": [0.5], "std": [0.5, 0.5]}}, "mean: has 1 channels, std 2"),
        ({"data": {"mean": [0.5], "std": [0.0]}}, "greater than 0"),
        ({**VIT, "data": {"image_size": 224, "test_size": 256}}, "test_size: deit_tiny_patch16_224 takes"),
        ({**VIT, "data": RISING}, "progressive_resizing: deit_tiny_patch16_224 takes images of one size only"),
        ({"data__interpolation": "nearest"}, "'bilinear', 'bicubic' or 'area'"),
    ],
)
def test_keys_of_data_that_do_not_apply_are_refused(
    make_cell: Callable[..., Cell], keys: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        make_cell(**keys)
