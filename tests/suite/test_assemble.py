"""Training follows the recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from suite.data.augmentation import IMAGENET
from suite.data.datasets import load
from suite.data.readers.image_folder import FolderReader
from suite.data.source import Files, Source
from suite.engines.process_group import Layout, T
from suite.errors import DataError
from suite.recipe.cell import Cell
from suite.training.build import (
    Weights,
    build_base,
    build_loaders,
    build_lr_schedule,
    build_model,
    load_source,
    pretrained_weights,
    wrap,
)
from suite.training.losses import build_criterion

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
        criterion = build_criterion(make_cell(training__label_smoothing=smoothing))
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
    child, split = build_model(make_cell(quantizer="bc"), source.description, Weights(parent.state_dict()))
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


def test_a_validation_share_of_no_image_is_refused(make_cell: MakeCell) -> None:
    cell = make_cell(data__validation_fraction=0.0003)  # of 1,438
    with pytest.raises(DataError, match=r"0\.0003 holds out none of digits's 1438 images in 10 classes: use a larger"):
        build_loaders(cell, load("digits", NOWHERE), Layout())


def test_each_class_is_in_the_validation_part_as_often_as_in_the_training_part(make_cell: MakeCell) -> None:
    loaders = build_loaders(make_cell(), load("digits", NOWHERE), Layout())
    assert loaders.validation is not None
    counts = loaders.train.reader.labels.bincount()
    assert len(loaders.validation.reader.labels) == 144
    assert ((loaders.validation.reader.labels.bincount() - counts / 9).abs() < 1).all()


def test_the_recipes_mean_and_deviation_go_before_the_data_sets_own(make_cell: MakeCell) -> None:
    source = load("digits", NOWHERE)
    own = build_loaders(make_cell(), source, Layout()).train.normalization
    given = build_loaders(make_cell(data={"mean": [0.5], "std": [0.25]}), source, Layout()).train.normalization
    assert (given.mean.tolist(), given.std.tolist()) == ([0.5], [0.25])
    assert own.mean.item() == pytest.approx(0.29, abs=0.03)
    with pytest.raises(DataError, match=r"data\.mean has 3 channels, the images of digits 1$"):
        build_loaders(make_cell(data={"mean": [0.5] * 3, "std": [0.5] * 3}), source, Layout())


def test_published_weights_bring_what_their_images_were(make_cell: MakeCell) -> None:
    name = "vit_small_patch16_224.augreg_in21k_ft_in1k"
    part = Files(("a.jpg", "b.jpg"), torch.arange(2))
    source = Source(("a", "b"), part, part, 224, "")
    keys = {"dataset": "folder/photos", "model": name, "training__batch_size": 2}

    def made(**changes: object) -> tuple[list[float], str]:
        data = {"crop": "random_resized", "validation_fraction": 0.0, **changes}
        reader = (
            loader := build_loaders(make_cell(**keys, init="pretrained", data=data), source, Layout()).train
        ).reader
        assert isinstance(reader, FolderReader)
        return loader.normalization.mean.tolist(), reader.interpolation

    assert made() == ([0.5, 0.5, 0.5], "bicubic")
    assert made(mean=[0.25] * 3, std=[0.5] * 3, interpolation="area") == ([0.25] * 3, "area")
    scratch = build_loaders(make_cell(**keys, data={"validation_fraction": 0.0}), source, Layout()).train
    assert torch.equal(scratch.normalization.mean, IMAGENET.mean)
    assert isinstance(scratch.reader, FolderReader)
    assert scratch.reader.interpolation == "bilinear"


def test_a_recipe_may_hold_nothing_out(make_cell: MakeCell) -> None:
    loaders = build_loaders(make_cell(data__validation_fraction=0.0), load("digits", NOWHERE), Layout())
    assert loaders.validation is None
    assert loaders.num_train_images == 1438


class Two(Layout):
    """The second of two processes: receives a fixed value from the first, and records the order of events."""

    told: Source | None = None
    events: ClassVar[list[str]] = []

    def tell(self, value: T) -> T:
        del value
        self.events.append("told")
        return self.told  # type: ignore[return-value]

    def wait(self) -> None:
        self.events.append("waited")


@pytest.mark.parametrize("dataset", ["folder/lamps", "digits"])
def test_the_main_process_looks_at_data_first_and_alone_lists_folders(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    files = Files(("a.jpg", "b.jpg"), torch.arange(2))
    found = Source(("a", "b"), files, files, 224, "") if dataset == "folder/lamps" else load("digits", NOWHERE)
    monkeypatch.setattr(Two, "told", found if dataset == "folder/lamps" else None)
    monkeypatch.setattr(Two, "events", [])

    def look(*_: object, with_test: bool) -> Source:
        assert with_test
        Two.events.append("looked")
        return found

    monkeypatch.setattr("suite.data.datasets.load", look)
    assert load_source(make_cell(dataset=dataset), Two(0, 2), NOWHERE) is found
    assert load_source(make_cell(dataset=dataset), Two(1, 2), NOWHERE) is found
    assert Two.events == ["looked", "told", "told", *([] if dataset == "folder/lamps" else ["looked"])]


def test_the_main_process_downloads_weights_first(make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Two, "events", [])

    def look(*_: object) -> tuple[torch.nn.Module, str]:
        Two.events.append("looked")
        return torch.nn.Linear(1, 1), "0123"

    monkeypatch.setattr("suite.training.pretrained.pretrained", look)
    for rank in range(2):
        pretrained_weights(make_cell(init="pretrained"), load("digits", NOWHERE).description, Two(rank, 2), NOWHERE)
    assert Two.events == ["looked", "waited", "waited", "looked"]
