"""What a recipe says is what trains."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from suite.data.datasets import load
from suite.engines.process_group import Layout
from suite.errors import DataError
from suite.recipe.cell import Cell
from suite.training.build import build_base, build_criterion, build_loaders, build_lr_schedule, build_model, wrap

MakeCell = Callable[..., Cell]
NOWHERE = Path("no-data-needed")


def _learning_rates(cell: Cell, steps_per_epoch: int) -> list[float]:
    model, split = build_model(cell, load("digits", NOWHERE).description, None)
    optimizer = wrap(cell, build_base(cell, model, split))
    schedule = build_lr_schedule(cell.training, optimizer, steps_per_epoch)
    rates = []
    for step in range(cell.training.epochs * steps_per_epoch):
        schedule.step_update(step)
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        rates.append(rate)
    return rates


def test_cosine_with_warm_up_rises_linearly_and_falls_to_nearly_zero(make_cell: MakeCell) -> None:
    cell = make_cell(training__epochs=6, training__warmup_epochs=1.0, training__learning_rate=1.0)
    rates = _learning_rates(cell, steps_per_epoch=10)
    assert rates[:10] == pytest.approx([step / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.01


def test_step_schedule_multiplies_at_its_epochs(make_cell: MakeCell) -> None:
    cell = make_cell(
        training__epochs=4,
        training__schedule="step",
        training__decay_epochs=[2, 3],
        training__decay_rate=0.1,
        training__learning_rate=1.0,
    )
    rates = _learning_rates(cell, steps_per_epoch=5)
    assert rates == pytest.approx([1.0] * 10 + [0.1] * 5 + [0.01] * 5)


def test_a_constant_schedule_is_constant(make_cell: MakeCell) -> None:
    cell = make_cell(training__epochs=3, training__schedule="constant", training__learning_rate=0.5)
    assert set(_learning_rates(cell, steps_per_epoch=4)) == {0.5}


def test_label_smoothing_mixes_in_the_uniform_distribution(make_cell: MakeCell) -> None:
    logits, labels = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    log_p = torch.log_softmax(logits, dim=1)
    hard = -log_p[torch.arange(6), labels].mean()
    for smoothing in (0.0, 0.1):
        criterion = build_criterion(make_cell(training__label_smoothing=smoothing).training)
        expected = (1 - smoothing) * hard - smoothing * log_p.mean()
        assert criterion(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_is_on_weights_and_latents_only(make_cell: MakeCell, optimizer: str) -> None:
    cell = make_cell(training__optimizer=optimizer, training__weight_decay=0.25)
    model, split = build_model(cell, load("digits", NOWHERE).description, None)
    groups = wrap(cell, build_base(cell, model, split)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.25 if parameter.ndim > 1 else 0.0), name
    assert len(decay) == len(list(model.parameters()))


def test_a_finetune_cell_starts_from_its_parents_weights(make_cell: MakeCell) -> None:
    source = load("digits", NOWHERE)
    parent, _ = build_model(make_cell(quantizer="fp", seed=5), source.description, None)
    child, split = build_model(make_cell(quantizer="bc"), source.description, parent.state_dict())
    assert torch.equal(child.get_parameter("conv1.weight"), parent.get_parameter("conv1.weight"))
    for name in split.binary:
        weight = parent.get_parameter(name)
        latent = (weight / (2 * weight.abs().mean())).clamp(-1, 1)
        assert torch.allclose(child.get_parameter(name), latent)


def test_a_batch_that_does_not_divide_or_is_too_large_is_refused(make_cell: MakeCell) -> None:
    source = load("digits", NOWHERE)
    with pytest.raises(DataError, match="batch_size 256 does not divide over 3 processes"):
        build_loaders(make_cell(), source, Layout(0, 3))
    with pytest.raises(DataError, match="batch_size 2000 is more than the 1294 training images"):
        build_loaders(make_cell(training__batch_size=2000), source, Layout())


def test_a_recipe_may_hold_nothing_out(make_cell: MakeCell) -> None:
    loaders = build_loaders(make_cell(data__validation_fraction=0.0), load("digits", NOWHERE), Layout())
    assert loaders.validation is None
    assert loaders.num_train_images == 1438
