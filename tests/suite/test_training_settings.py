"""Keys of `training` and `quantization` that change the optimizer, the loss, the average or the network."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_cells import tiny_cell
from torch import nn
from torch.optim import SGD, AdamW

from quantizers import ProxConnect, get
from suite.data.source import Description
from suite.engines.clipping import clip_adaptively
from suite.engines.process_group import EngineError, Layout
from suite.recipe.cell import Cell
from suite.recipe.settings import Execution
from suite.training.build import build_base, build_engine, build_lr_schedule, build_model
from suite.training.ema import MovingAverage
from suite.training.losses import build_criterion
from suite.training.seeds import stream

DIGITS = Description(tuple("0123456789"), 8, 1)
VIT = {"model": "vit_mini_patch2_8"}


def _base(**changes: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    cell = tiny_cell(**changes)
    model, split = build_model(cell, DIGITS, None)
    return model, build_base(cell, model, split)


def _engine(changes: dict[str, Any] | None = None, execution: Execution | None = None) -> Any:  # noqa: ANN401  (a plain engine)
    cell = tiny_cell(**(changes or {}))
    model, split = build_model(cell, DIGITS, None)
    return build_engine(cell, model, split, Layout(), execution or Execution())


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 1, 8, 8, generator=generator), torch.randint(0, 10, (64,), generator=generator)


def test_sgd_and_adamw_are_torchs_with_the_recipes_settings() -> None:
    _, sgd = _base(training__optimizer="sgd", training__momentum=0.8)
    assert type(sgd) is SGD
    assert {(group["momentum"], group["nesterov"]) for group in sgd.param_groups} == {(0.8, False)}
    _, adamw = _base(training__betas=[0.8, 0.95], training__eps=1e-6, training__weight_decay=0.05)
    assert type(adamw) is AdamW
    assert {(group["betas"], group["eps"]) for group in adamw.param_groups} == {((0.8, 0.95), 1e-6)}
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.05, 0.0, 0.05]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__optimizer": "lamp"}, "unknown optimizer 'lamp'; did you mean 'lamb'? (sgd, adam, adamw, lamb, "),
        ({"training__optimizer": "adahessian"}, "unknown optimizer 'adahessian'"),
        ({"training__momentum": 0.9}, "changes nothing: adamw has no momentum"),
        ({"training__optimizer": "lion", "training__eps": 1e-8}, "changes nothing: lion has no eps"),
        ({"training__optimizer": "sgd", "training__betas": [0.9, 0.9]}, "changes nothing: sgd has no betas"),
        ({"training__betas": [0.9]}, "[0.9]: adamw has 2"),
        ({"training__clip_grad_norm": 1, "training__clip_grad_value": 1}, "only one clipping method is allowed"),
        ({"training__clip_grad_value": 1, "training__clip_grad_adaptive": 1}, "only one clipping method is allowed"),
        ({"training__ema_warmup": True}, "true needs an ema_decay"),
        ({"training__min_learning_rate": 0.1}, "0.1 is above learning_rate 0.003"),
        ({"training__cooldown_epochs": 2}, "2 of 2 epochs: with warm-up, none remain for the decay"),
        (
            {"training__schedule": "constant", "training__min_learning_rate": 0.1},
            "changes nothing: only with schedule: cosine or linear, here it is constant",
        ),
        ({"training__drop_path": 0.1}, "resnet8 has no drop_path_rate"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        tiny_cell(**changes)


def test_layer_decay_scales_the_learning_rate_of_each_layer_by_its_depth() -> None:
    """The mini ViT's layers, as numbered by timm, are the embedding, two blocks, and the norm with the head."""
    model, base = _base(**VIT, training__layer_decay=0.5)
    scale_of = {p: group["lr_scale"] for group in base.param_groups for p in group["params"]}
    scales = {name: scale_of[p] for name, p in model.named_parameters()}
    assert scales["head.weight"] == 1.0
    assert scales["blocks.1.mlp.fc1.weight"] == scales["blocks.1.mlp.fc1.gain"] == 0.5
    assert scales["blocks.0.attn.qkv.weight"] == 0.25
    assert scales["patch_embed.proj.weight"] == scales["pos_embed"] == 0.125
    quantized = [group for group in base.param_groups if group.get("quantizer")]
    assert {group["lr_scale"] for group in quantized} == {0.5, 0.25}


def test_scheduled_learning_rates_keep_their_layers_share() -> None:
    engine = _engine({**VIT, "training__layer_decay": 0.5})
    build_lr_schedule(tiny_cell().training, engine.optimizer, 4).step_update(3)
    rates = {(group["lr_scale"], group["lr"] / group["lr_scale"]) for group in engine.optimizer.param_groups}
    assert len({rate for _, rate in rates}) == 1
    assert len(rates) > 1


def _rates(**changes: object) -> list[float]:
    training = tiny_cell(**{f"training__{key}": value for key, value in changes.items()}).training
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    schedule = build_lr_schedule(training, optimizer, 10)  # type: ignore[arg-type]
    rates = []
    for step in range(10 * training.epochs):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_falling_schedules_end_at_their_least_rate_and_stay_there(schedule: str) -> None:
    rates = _rates(
        schedule=schedule, epochs=10, learning_rate=1.0, min_learning_rate=0.25, warmup_epochs=2, cooldown_epochs=3
    )
    assert rates[:20] == pytest.approx([step / 20 for step in range(20)])
    assert rates[20] == pytest.approx(1.0)
    assert rates[45] == pytest.approx(0.625)  # half-way through the 50 steps between
    assert set(rates[70:]) == {0.25}
    assert all(later < earlier for earlier, later in pairwise(rates[20:71]))


def test_bce_is_the_mean_over_images_and_classes_with_smoothed_labels() -> None:
    criterion = build_criterion(tiny_cell(training__loss="bce", training__label_smoothing=0.1))
    logits = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    # Labels 0.95 and 0.05; -log s(x) = log(1 + e^-x).
    by_hand = [0.95 * 0.126928011 + 0.05 * 2.126928011, 0.05 * 1.313261688 + 0.95 * 0.313261688]
    assert criterion(logits, torch.tensor([0])).item() == pytest.approx(sum(by_hand) / 2, rel=1e-8)


def test_an_average_that_warms_up_forgets_its_start() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = ProxConnect(SGD([{"params": list(model.parameters())}], lr=0.1))
    model.weight.data.fill_(0)
    average = MovingAverage(model, optimizer, frozenset(), 0.5, warmup=True)
    model.weight.data.fill_(1)
    expected = 0.0
    for step in range(20):
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
        assert average.averages["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_adaptive_clipping_measures_b_grad_by_the_latents() -> None:
    """Afterwards, rows of B . grad are at most 0.1 |row of w*| long; shorter ones are unchanged."""
    latents = torch.tensor([[0.3, -0.4], [0.6, 0.8], [0.0, 0.0]])
    weight, bias = nn.Parameter(latents.clone()), nn.Parameter(torch.tensor([3.0, 4.0]))
    groups: list[dict[str, Any]] = [{"params": [weight], "quantizer": "bnn++", "mu": 2.0}, {"params": [bias]}]
    optimizer = ProxConnect(SGD(groups, lr=0.1))
    weight.grad, bias.grad = torch.tensor([[1.0, 2.0], [0.01, 0.0], [1.0, 0.0]]), torch.tensor([30.0, 40.0])
    clip_adaptively(optimizer, 0.1)
    product = get("bnn++").backward(latents, 2.0) * weight.grad
    assert product[0].norm().item() == pytest.approx(0.1 * 0.5, rel=1e-5)
    assert weight.grad[1].tolist() == pytest.approx([0.01, 0.0])
    assert product[2].norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-5)
    assert bias.grad.tolist() == pytest.approx([0.3, 0.4], rel=1e-5)


@pytest.mark.parametrize("key", ["clip_grad_value", "clip_grad_adaptive"])
def test_clipping_bounds_the_step(key: str) -> None:
    images, labels = _batch()
    moved = []
    for bound in (1e-4, None):
        engine = _engine({"training__optimizer": "sgd", "training__learning_rate": 1.0, f"training__{key}": bound})
        before = [p.detach().clone() for p in engine.model.parameters()]
        engine.train_step(images, labels)
        if key == "clip_grad_value" and bound:
            assert max(float(p.grad.abs().max()) for p in engine.model.parameters()) <= bound
        moved.append(
            sum(float((p.detach() - b).norm()) for p, b in zip(engine.model.parameters(), before, strict=True))
        )
    assert moved[0] < moved[1]


def test_recomputed_activations_give_the_same_step_to_the_bit() -> None:
    states = []
    for execution in (Execution(), Execution(checkpoint_activations=True)):
        engine = _engine({**VIT, "training__drop_path": 0.5, "training__dropout": 0.3}, execution)
        engine.model.train()
        for step in range(2):
            torch.manual_seed(stream(0, "dropout", step))
            engine.train_step(*_batch())
        states.append(engine.weights())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(("model", "reason"), [("resnet8", "has batch norms"), ("vit_mini_patch2_8", None)])
def test_activations_are_not_recomputed_through_batch_norms(model: str, reason: str | None) -> None:
    if reason is None:
        assert _engine({"model": model}, Execution(checkpoint_activations=True))
        return
    with pytest.raises(EngineError, match=f"execution.checkpoint_activations: {model} {reason}"):
        _engine({"model": model}, Execution(checkpoint_activations=True))


def test_overflow_penalties_are_not_lost_to_recomputed_activations() -> None:
    few_bits = {**VIT, "task": "bwaa", "quantization__inputs": {}, "quantization__accumulator": {}}
    with pytest.raises(EngineError, match="task bwaa's overflow penalty has no gradient then"):
        _engine(few_bits, Execution(checkpoint_activations=True))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"quantization__scale": "tensor"}, "quantization.scale"),
        ({"training__clip_grad_value": 0.1}, "training.clip_grad_value"),
        ({"training__clip_grad_adaptive": 0.1}, "training.clip_grad_adaptive"),
    ],
)
def test_what_needs_whole_parameters_is_refused_by_deepspeed(changes: dict[str, object], key: str) -> None:
    with pytest.raises(EngineError, match=f"{key}.*take execution.engine: plain"):
        _engine(changes, Execution(engine="deepspeed"))


def test_drop_path_grows_with_depth() -> None:
    model, _ = build_model(tiny_cell(**VIT, training__drop_path=0.2), DIGITS, None)
    rates = [model.get_submodule(f"blocks.{i}.drop_path1") for i in range(2)]
    assert [getattr(rate, "drop_prob", 0.0) for rate in rates] == [0.0, pytest.approx(0.2)]


def test_ids_know_the_new_keys(make_cell: Callable[..., Cell]) -> None:
    changes: list[dict[str, Any]] = [
        {"training__betas": [0.8, 0.99]},
        {"training__eps": 1e-6},
        {"training__layer_decay": 0.7},
        {"training__loss": "bce"},
        {"training__clip_grad_value": 1.0},
        {"training__clip_grad_adaptive": 0.01},
        {"training__optimizer": "lamb"},
    ]
    assert len({make_cell().id, *(make_cell(**change).id for change in changes)}) == len(changes) + 1
