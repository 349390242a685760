"""Cells of task bwa: accuracy is measured with signs as inputs and weights of binary layers; resume is bit-exact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from models.inputs import BinaryInput
from models.layers import BinaryConv2d, BinaryLinear
from suite.data.datasets import load
from suite.engines.process_group import Layout
from suite.recipe.cell import Cell
from suite.recipe.settings import Sharpness
from suite.run import checkpoint
from suite.training.build import Weights, build_model
from suite.training.evaluation import Evaluation, evaluate
from suite.training.trainer import Trainer

MakeCell = Callable[..., Cell]
NOWHERE = Path("no-data-needed")
SOFT = {"quantizer": "bnn++", "sharpness": {"shape": "exponential", "start": 1.0, "end": 16.0}}


@pytest.fixture
def make_bwa(make_cell: MakeCell) -> MakeCell:
    """A tiny cell of the smallest Bi-Real network with binary activations."""

    def make(**changes: object) -> Cell:
        defaults = {"model": "bireal_resnet8", "task": "bwa", "quantization__inputs": {"quantizer": "bnn"}}
        return make_cell(**(defaults | changes))

    return make


def _trainer(cell: Cell) -> Trainer:
    return Trainer(cell, Layout(), NOWHERE, None)


def _epoch(trainer: Trainer) -> dict[str, float]:
    metrics = trainer.train_epoch(lambda _step, _loss: None)
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def _input_mus(trainer: Trainer) -> set[float]:
    return {module.mu for module in trainer.engine.model.modules() if isinstance(module, BinaryInput)}


def _operands(model: nn.Module) -> list[bool]:
    """A list that gets, for each call of a binary layer, whether all numbers it multiplies are signs."""
    were_signs: list[bool] = []

    def look(layer: nn.Module, _inputs: object, x: Tensor) -> None:
        weight = layer.get_parameter("weight")
        were_signs.append(bool((x.abs() == 1).all() and (weight.abs() == 1).all()))

    for layer in model.modules():
        if isinstance(layer, BinaryConv2d | BinaryLinear) and layer.inputs is not None:
            layer.inputs.register_forward_hook(lambda _module, inputs, x, layer=layer: look(layer, inputs, x))
    return were_signs


def test_a_bireal_network_learns_with_binary_weights_and_activations(make_bwa: MakeCell) -> None:
    trainer = _trainer(make_bwa(training__epochs=4, training__batch_size=64))
    for _ in range(4):
        _epoch(trainer)
    assert trainer.test()[1].top1 > 0.3  # chance is 0.1; 0.46 on the author's machine


@pytest.mark.parametrize("model", ["bireal_resnet8", "reactnet_resnet8", "vit_mini_patch2_8"])
def test_hard_accuracy_is_measured_on_signs_alone(
    make_bwa: MakeCell, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(make_bwa(model=model, quantization__inputs=SOFT, training__epochs=1))
    operands = _operands(trainer.engine.model)
    evaluations: list[bool] = []

    def spy(*arguments: Any) -> Evaluation:  # noqa: ANN401  (evaluate's)
        operands.clear()
        found = evaluate(*arguments)
        assert operands
        evaluations.append(all(operands))
        return found

    monkeypatch.setattr("suite.training.trainer.evaluate", spy)
    _epoch(trainer)
    assert not any(module.hard for module in trainer.engine.model.modules() if isinstance(module, BinaryInput))
    trainer.test()
    assert evaluations == [True, False, True]  # validation, soft test, hard test


def test_validation_changes_no_bit_of_training(make_bwa: MakeCell) -> None:
    losses = []
    for fraction in (0.1, 0.0):
        trainer = _trainer(make_bwa(quantization__inputs=SOFT))
        if not fraction:
            parts = trainer.loaders
            trainer.loaders = parts.__class__(parts.train, None, parts.final, parts.num_train_images)
        losses.append([_epoch(trainer)["train/loss"] for _ in range(2)])
    assert losses[0] == losses[1]


def test_mu_of_inputs_moves_with_the_weights_own(make_bwa: MakeCell) -> None:
    schedule = {"shape": "exponential", "start": 1.0, "end": 16.0}
    cell = make_bwa(quantization__sharpness={"bnn++": schedule}, quantization__inputs=SOFT)
    trainer = _trainer(cell)
    seen: list[tuple[float, float]] = []
    train_step = trainer.engine.train_step

    def spy(images: Tensor, labels: Tensor, soft: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (of_inputs,) = _input_mus(trainer)
        (of_weights,) = {own["mu"] for own in trainer.optimizer.state_dict()["state"].values() if "mu" in own}
        seen.append((of_inputs, of_weights))
        return train_step(images, labels, soft)

    trainer.engine.train_step = spy  # type: ignore[method-assign]
    for epochs in (1, 2):
        _epoch(trainer)
        assert _input_mus(trainer) == {4.0**epochs}
    assert len(seen) == trainer.num_steps
    assert seen[0] == (1.0, 1.0)
    assert all(of_inputs == of_weights for of_inputs, of_weights in seen)


@pytest.mark.parametrize("inputs", [{"quantizer": "bnn"}, SOFT], ids=["bnn", "bnn++"])
def test_a_resumed_trainer_goes_on_to_the_bit(make_bwa: MakeCell, tmp_path: Path, inputs: dict[str, Any]) -> None:
    cell = make_bwa(quantization__inputs=inputs, training__ema_decay=0.9, training__reestimate_norm=True)
    straight = _trainer(cell)
    _epoch(straight)
    path = checkpoint.save(tmp_path, straight.state_dict())
    resumed = _trainer(cell)
    resumed.load_state_dict(checkpoint.load(path, cell.id, torch.device("cpu")))
    assert _input_mus(resumed) == _input_mus(straight)
    assert _epoch(resumed) == _epoch(straight)
    for ours, theirs in zip(resumed.test(), straight.test(), strict=True):
        assert ours.metrics("test") == theirs.metrics("test")
        assert torch.equal(ours.right, theirs.right)
    assert resumed.weights_digest() == straight.weights_digest()


def test_the_quantizer_of_inputs_changes_the_training(make_bwa: MakeCell) -> None:
    bireal = {"quantizer": "bireal", "sharpness": {"start": 1.0}}
    losses = [_epoch(_trainer(make_bwa(quantization__inputs=inputs)))["train/loss"] for inputs in (SOFT, bireal)]
    assert losses[0] != losses[1]


def test_a_cosine_moves_mu_slowly_first(make_bwa: MakeCell) -> None:
    cosine = {"quantizer": "bnn++", "sharpness": {"shape": "cosine", "start": 1.0, "end": 3.0}}
    trainer = _trainer(make_bwa(quantization__inputs=cosine))
    mus: list[float] = []
    for _ in range(2):
        _epoch(trainer)
        mus.extend(_input_mus(trainer))
    assert mus == [pytest.approx(3.0 - 2.0 * 0.5**0.5), 3.0]


def test_a_cells_policy_is_what_its_model_is_made_with(make_cell: MakeCell) -> None:
    cell = make_cell(model="vit_mini_patch2_8", quantization__full_precision=["ends", "attention"])
    _, split = build_model(cell, load("digits", NOWHERE).description, None)
    assert {name.split(".")[2] for name in split.binary} == {"mlp"}


def test_a_network_with_relus_before_its_convolutions_is_refused(make_bwa: MakeCell) -> None:
    with pytest.raises(ValueError, match="bireal"):
        build_model(make_bwa(model="resnet8"), load("digits", NOWHERE).description, None)


def test_a_full_precision_parents_weights_fit_the_network_with_binary_activations(make_bwa: MakeCell) -> None:
    source = load("digits", NOWHERE)
    fp = make_bwa(quantizer="fp", seed=5, task="bw", quantization__inputs=None)
    parent, _ = build_model(fp, source.description, None)
    child, split = build_model(make_bwa(), source.description, Weights(parent.state_dict()))
    assert torch.equal(child.get_parameter("conv1.weight"), parent.get_parameter("conv1.weight"))
    assert len(split.binary) == 6


def test_inputs_that_start_sharp_do_so_before_the_first_step(make_bwa: MakeCell) -> None:
    inputs = {"quantizer": "bnn++", "sharpness": Sharpness(start=7.0).model_dump()}
    trainer = _trainer(make_bwa(quantization__inputs=inputs))
    assert _input_mus(trainer) == {7.0}
    models.set_input_mu(trainer.engine.model, 1.0)  # as a constant schedule does before each forward pass
    _epoch(trainer)
    assert _input_mus(trainer) == {7.0}
