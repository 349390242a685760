"""The plain engine: the step does not depend on micro-batches; its state is by name and bit-exact."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantizers import ProxConnect
from suite.data import datasets
from suite.engines.ddp import PlainEngine
from suite.engines.deepspeed.settings import configuration
from suite.engines.process_group import EngineError, Layout
from suite.engines.protocol import Engine
from suite.recipe.cell import Cell
from suite.recipe.settings import AS_IS, Execution
from suite.training.build import build_base, build_engine, build_loaders, build_model, wrap
from suite.training.losses import build_criterion

MakeCell = Callable[..., Cell]
BATCH_SIZE = 24


def _cell(make_cell: MakeCell, **changes: object) -> Cell:
    """The transformer, which has no batch norm, with plain gradient descent."""
    recipe = {"batch_size": BATCH_SIZE, "optimizer": "sgd", "learning_rate": 0.1}
    training = {f"training__{key}": value for key, value in recipe.items()}
    return make_cell(**{"model": "vit_mini_patch2_8", "data__crop": "none", **training, **changes})


def _engine(cell: Cell, execution: Execution = AS_IS) -> PlainEngine:
    model, split = build_model(cell, datasets.load("digits", Path("none")).description, None)
    engine = build_engine(cell, model, split, Layout(), execution)
    assert isinstance(engine, PlainEngine)
    return engine


def _batches(cell: Cell, num: int) -> list[tuple[Tensor, Tensor]]:
    batches = build_loaders(cell, datasets.load("digits", Path("none")), Layout()).train.epoch(0)
    return [batch for _, batch in zip(range(num), batches, strict=False)]


def _run(engine: Engine, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [engine.train_step(*batch)[0].item() for batch in batches]


def _latents(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: own["w_star"] for name, own in state["optimizer"]["state"].items() if "w_star" in own}


def _bits(state: Any) -> Any:  # noqa: ANN401  (a state's parts)
    """The state with tensors replaced by lists of numbers, which compare by value."""
    if isinstance(state, Tensor):
        return (str(state.dtype), tuple(state.shape), state.flatten().tolist())
    if isinstance(state, dict):
        return {key: _bits(value) for key, value in state.items()}
    return state


@pytest.mark.parametrize("size", [5, 6, 24, 100])
def test_micro_batches_of_any_size_make_up_the_batch(make_cell: MakeCell, size: int) -> None:
    cell = _cell(make_cell)
    whole = _engine(cell)
    model, split = build_model(cell, datasets.load("digits", Path("none")).description, None)
    execution = Execution(micro_batch_size=size)
    parts = PlainEngine(
        model,
        wrap(cell, build_base(cell, model, split)),
        build_criterion(cell),
        Layout(),
        cell.training,
        execution,
    )
    for images, labels in _batches(cell, 3):
        loss, logits = whole.train_step(images, labels)
        part_loss, part_logits = parts.train_step(images, labels)
        assert part_logits.shape == logits.shape
        assert part_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    latents = {latent.name: latent.w_star for latent in whole.latents()}
    assert list(latents) == list(split.binary)
    for latent in parts.latents():
        assert torch.allclose(latent.w_star, latents[latent.name], atol=1e-5)


def test_a_micro_batch_of_the_whole_share_or_more_changes_no_bit(make_cell: MakeCell) -> None:
    cell = _cell(make_cell)
    batches = _batches(cell, 3)
    losses = [_run(_engine(cell, Execution(micro_batch_size=size)), batches) for size in (None, BATCH_SIZE, 1000)]
    assert losses[0] == losses[1] == losses[2]


def test_a_micro_batch_that_does_not_divide_the_share_is_refused_with_one_that_does(make_cell: MakeCell) -> None:
    cell = _cell(make_cell)
    with pytest.raises(EngineError, match=r"micro_batch_size 7 does not divide the 24 images of a step .*: take 6"):
        _engine(cell, Execution(micro_batch_size=7))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_an_engine_goes_on_from_anothers_state_to_the_bit(make_cell: MakeCell, precision: str, optimizer: str) -> None:
    cell = _cell(make_cell, training__precision=precision, training__optimizer=optimizer, training__clip_grad_norm=0.5)
    batches = _batches(cell, 4)
    straight, resumed = _engine(cell), _engine(cell)
    _run(straight, batches[:2])
    _run(resumed, batches[2:])
    resumed.load_state_dict(straight.state_dict())
    assert _run(resumed, batches[2:]) == _run(straight, batches[2:])
    assert _bits(resumed.state_dict()) == _bits(straight.state_dict())


def test_a_state_names_what_it_holds(make_cell: MakeCell) -> None:
    cell = make_cell()
    engine = _engine(cell)
    _run(engine, _batches(cell, 1))
    state = engine.state_dict()
    names = {name for name, _ in engine.model.named_parameters()}
    optimizer = state["optimizer"]
    assert set(optimizer["state"]) == names
    assert {name for group in optimizer["param_groups"] for name in group["params"]} == names
    latents = _latents(state)
    assert set(latents) == {latent.name for latent in engine.latents()}
    assert all(w_star.dtype == torch.float32 for w_star in latents.values())
    assert state["scaler"] is None
    assert set(state["model"]) == set(engine.model.state_dict())


def test_a_state_of_another_recipe_or_model_is_refused(make_cell: MakeCell) -> None:
    engine = _engine(make_cell())
    with pytest.raises(ValueError, match=r"another recipe: quantizers: .*'bc'\] in the state, .*'bnn\+\+'\] here"):
        engine.load_state_dict(_engine(make_cell(quantizer="bc")).state_dict())
    with pytest.raises(ValueError, match=r"another recipe: update: pq in the state, pc\+\+ here"):
        engine.load_state_dict(_engine(make_cell(quantization__update="pq")).state_dict())
    with pytest.raises(ValueError, match="another recipe: numbers of parameters"):
        engine.load_state_dict(_engine(make_cell(model="resnet20")).state_dict())
    state = engine.state_dict()
    state["optimizer"]["param_groups"][0]["params"][0] = "stem.weight"
    with pytest.raises(ValueError, match=r"another model: not in both: conv1\.weight, stem\.weight"):
        engine.load_state_dict(state)


def test_a_step_that_overflowed_in_fp16_is_not_taken(make_cell: MakeCell) -> None:
    cell = _cell(make_cell, training__precision="fp16", training__clip_grad_norm=1.0)
    engine = _engine(cell)
    batches = _batches(cell, 4)
    _run(engine, batches[:1])
    for group in engine.optimizer.param_groups:
        if "quantizer" in group:
            group["mu"] = 3.0  # as if a schedule had advanced
    before = engine.state_dict()
    before = {"model": _bits(before["model"]), "latents": _bits(_latents(before))}
    engine.scaler.load_state_dict(engine.scaler.state_dict() | {"scale": 1e30})
    _run(engine, batches[1:2])
    after = engine.state_dict()
    assert {"model": _bits(after["model"]), "latents": _bits(_latents(after))} == before
    assert after["scaler"]["scale"] == pytest.approx(5e29)
    written = {own["mu"] for own in after["optimizer"]["state"].values() if "mu" in own}
    assert written == {2.0}, "the mu that w was written with"
    engine.scaler.load_state_dict(engine.scaler.state_dict() | {"scale": 1024.0})
    _run(engine, batches[2:3])
    assert _bits(_latents(engine.state_dict())) != before["latents"]
    written = {own["mu"] for own in engine.state_dict()["optimizer"]["state"].values() if "mu" in own}
    assert written == {3.0}


def test_fp16_and_bf16_compute_in_16_bits_and_train_as_float32_does(make_cell: MakeCell) -> None:
    losses = {}
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        cell = _cell(make_cell, training__precision=precision)
        engine = _engine(cell)
        batches = _batches(cell, 5)
        assert engine.train_step(*batches[0])[1].dtype == dtype
        assert {parameter.dtype for parameter in engine.model.parameters()} == {torch.float32}
        losses[precision] = _run(engine, batches[1:])
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["fp16"] == pytest.approx(losses["float32"], rel=0.01)


@pytest.mark.long
def test_compiled_training_and_evaluation_are_the_same_up_to_rounding(make_cell: MakeCell) -> None:
    cell = _cell(make_cell)
    batches = _batches(cell, 4)
    engines = []
    for execution in (Execution(), Execution(compile=True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        matrix, *others = model.parameters()
        groups: list[dict[str, Any]] = [{"params": [matrix], "quantizer": "bnn++", "mu": 2.0}, {"params": others}]
        optimizer = ProxConnect(torch.optim.SGD(groups, lr=0.1))
        engine = PlainEngine(model, optimizer, nn.CrossEntropyLoss(), Layout(), cell.training, execution)
        losses = _run(engine, batches)  # each step uses the w written by the previous one
        model.eval()
        engines.append((losses, engine.logits(batches[0][0]), list(engine.state_dict()["model"])))
    (eager_losses, eager_logits, eager_names), (losses, logits, names) = engines
    assert losses == pytest.approx(eager_losses, rel=1e-5)
    assert losses[0] != losses[-1]
    assert torch.allclose(logits, eager_logits, atol=1e-5)
    assert names == eager_names


# DeepSpeed, as far as testable without it; tests/suite/test_layouts.py has the rest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__precision": "fp16"}, "precision: fp16 is for execution.engine: plain"),
        ({"training__ema_decay": 0.9}, "ema_decay: deepspeed has the latents in shards"),
        ({"training__reestimate_norm": True}, "reestimate_norm: not at execution.zero_stage 3"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_in_one_line(
    make_cell: MakeCell, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        _engine(make_cell(**changes), Execution(engine="deepspeed", zero_stage=3))


def test_without_deepspeed_the_error_says_what_to_install(make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # makes the import fail
    monkeypatch.delitem(sys.modules, "suite.engines.deepspeed.engine", raising=False)
    with pytest.raises(EngineError, match=r"not installed: pip install proxbench\[deepspeed\]$"):
        _engine(make_cell(), Execution(engine="deepspeed"))


def _configuration(make_cell: MakeCell, world_size: int = 2, **execution: object) -> dict[str, Any]:
    cell = make_cell(training__batch_size=48)
    how = Execution.model_validate({"engine": "deepspeed", "zero_stage": 2, **execution})
    return configuration(cell.training, how, Layout(0, world_size), num_parameters=101)


def test_the_configuration_holds_the_recipes_batch_on_any_number_of_processes(make_cell: MakeCell) -> None:
    for world_size, size, micro, num in ((1, None, 48, 1), (2, None, 24, 1), (2, 12, 12, 2), (4, 24, 12, 1)):
        settings = _configuration(make_cell, world_size, micro_batch_size=size)
        assert settings["train_batch_size"] == 48
        assert settings["train_micro_batch_size_per_gpu"] == micro
        assert settings["gradient_accumulation_steps"] == num
    assert settings["gradient_clipping"] == 0.0
    assert settings["zero_optimization"]["stage"] == 2


def test_overrides_are_laid_over_the_configuration_but_not_over_the_recipe(make_cell: MakeCell) -> None:
    override = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    settings = _configuration(make_cell, deepspeed=override)
    assert settings["wall_clock_breakdown"] is True
    assert settings["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 102,
        "memory_efficient_linear": False,
        "overlap_comm": True,
    }
    with pytest.raises(EngineError, match=r"execution.deepspeed.bf16: take training.precision: bf16"):
        _configuration(make_cell, deepspeed={"bf16": {"enabled": True}})
    with pytest.raises(EngineError, match=r"zero_optimization.stage: take execution.zero_stage"):
        _configuration(make_cell, deepspeed={"zero_optimization": {"stage": 3}})
