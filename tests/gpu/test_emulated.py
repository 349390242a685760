"""What of a GPU can be told without one: on which device every operand lies, and how many kernels a step launches."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pretend_gpu import GPU, OnGpu, PretendGpu
from tiny_cells import tiny_cell
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from quantizers import QUANTIZERS, ProxConnect, latents
from suite.data.augmentation import IMAGENET
from suite.data.loader import Loader
from suite.data.readers.memory import MemoryReader
from suite.data.source import Description, Pixels
from suite.engines.ddp import PlainEngine
from suite.engines.process_group import Layout
from suite.recipe.cell import Cell
from suite.recipe.settings import Data
from suite.training.build import build_engine, build_model

NUM_LAUNCHES = 48
"""Operations, each of them a kernel or more, that a step of one quantized group may take. dsq++ takes most."""
DESCRIPTION = Description(tuple("0123456789"), 32, 3)
LAYOUT = Layout(device=GPU)
BINARY_INPUTS: dict[str, Any] = {"model": "bireal_resnet20", "quantization__inputs": {"quantizer": "bnn"}}
RECIPES: dict[str, dict[str, Any]] = {
    "resnet20": {"model": "resnet20"},
    "transformer": {"model": "vit_mini_patch4_32"},
    "from timm": {"model": "mobilenetv3_small_050", "training__optimizer": "lamb"},
    "clipped by norm": {"training__clip_grad_norm": 1.0},
    "clipped adaptively": {"training__clip_grad_adaptive": 0.1},
    "with a scale": {"quantization__scale": "channel"},
    "smoothed labels": {"training__label_smoothing": 0.1},
    "binary inputs": {"task": "bwa", **BINARY_INPUTS},
    "sums of few bits": {"task": "bwaa", **BINARY_INPUTS, "quantization__accumulator": {"bits": 8}},
}


def _put_on_fake_gpu(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=GPU))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)


def _engine(cell: Cell, model: nn.Module, split: models.Split, monkeypatch: pytest.MonkeyPatch) -> PlainEngine:
    """Call it inside a FakeTensorMode. `to` does nothing meanwhile: the model is on the fake GPU already."""
    _put_on_fake_gpu(model)
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)
    engine = build_engine(cell, model, split, LAYOUT)
    assert isinstance(engine, PlainEngine)
    return engine


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_forward_pass_and_a_step_have_all_operands_on_the_gpu(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = tiny_cell(**recipe)
    model, split = build_model(cell, DESCRIPTION, None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = _engine(cell, model, split, monkeypatch)
        labels = torch.zeros(8, dtype=torch.int64, device=GPU)
        loss, logits = engine._forward(torch.empty(8, 3, 32, 32, device=GPU), labels)
        assert loss.device == logits.device == GPU
        for p in model.parameters():  # torch's backward pass wants a driver
            p.grad = torch.empty_like(p)
        engine._clip()
        engine.optimizer.step()
        engine.harden()
        assert engine.logits(torch.empty(8, 3, 32, 32, device=GPU)).device == GPU


def test_an_operand_left_on_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = tiny_cell()
    model, split = build_model(cell, DESCRIPTION, None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = _engine(cell, model, split, monkeypatch)
        norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        norm.running_mean = torch.zeros(norm.num_features)
        with pytest.raises(RuntimeError, match="same device"):
            engine.logits(torch.empty(8, 3, 32, 32, device=GPU))


@pytest.fixture
def _flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts pretended tensors as plain ones, so that a group's latents share one tensor, as they do on a GPU."""
    monkeypatch.setattr(latents, "_is_plain", lambda _: True)


@pytest.mark.usefixtures("_flat")
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_an_optimizers_steps_on_the_gpu_are_the_cpus_and_wait_for_nothing(name: str, base: str) -> None:
    here = _stepped(_parameters(2), name, base)
    with PretendGpu() as gpu:
        there = _stepped(_on_gpu(_parameters(2)), name, base)
        assert gpu.waits == []
    for p, q in zip(here, there, strict=True):
        assert isinstance(q.data, OnGpu)
        assert torch.equal(p.detach(), q.data.held)


@pytest.mark.usefixtures("_flat")
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_the_number_of_kernels_of_a_step_does_not_grow_with_the_number_of_parameters(name: str, base: str) -> None:
    counts = []
    for number in (2, 20):
        parameters = _on_gpu(_parameters(number))
        with PretendGpu() as gpu:
            _stepped(parameters, name, base, num_steps=4)
            four = gpu.num_launches
        with PretendGpu() as gpu:
            _stepped(parameters, name, base, num_steps=3)
            counts.append(four - gpu.num_launches - number)  # the gradients are copies, made outside the step
    assert counts[0] == counts[1] <= NUM_LAUNCHES


def _parameters(number: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 5), (3, 2, 3, 3)] * (number // 2)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def _on_gpu(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(OnGpu(p.detach())) for p in parameters]


def _stepped(parameters: list[nn.Parameter], quantizer: str, base: str, num_steps: int = 3) -> list[nn.Parameter]:
    """The parameters after some steps with gradients that are their own values."""
    group: dict[str, Any] = {"params": parameters, "quantizer": quantizer, "mu": 2.0}
    made: torch.optim.Optimizer = (
        torch.optim.SGD([group], 0.1, momentum=0.9, weight_decay=0.01, foreach=True)
        if base == "sgd"
        else torch.optim.AdamW([group], 0.1, foreach=True)
    )
    optimizer = ProxConnect(made, fused=False)
    for _ in range(num_steps):
        for p in parameters:
            p.grad = p.detach().clone()
        optimizer.step()
    return parameters


@pytest.mark.parametrize("settings", [Data(), Data(crop="padded", crop_padding=4, horizontal_flip=True)])
@pytest.mark.parametrize("erasing", [0.0, 0.5])
def test_a_loaders_batches_on_the_gpu_are_the_cpus(settings: Data, erasing: float) -> None:
    settings = settings.model_copy(update={"random_erasing": erasing})
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = Pixels(images, torch.arange(24) % 10)

    def batches(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        reader = MemoryReader(data, device)
        loader = Loader(reader, settings, 32, IMAGENET, 6, 0, Layout(device=device))
        yield from loader.epoch(1)
        yield from loader.evaluation()

    here = list(batches(torch.device("cpu")))
    with PretendGpu() as gpu:
        there = list(batches(GPU))
        assert gpu.waits.count("a value is read") == gpu.waits.count("a tensor is brought back") == 0
    for (x, y), (x_there, y_there) in zip(here, there, strict=True):
        assert isinstance(x_there, OnGpu)
        assert isinstance(y_there, OnGpu)
        assert torch.equal(x, x_there.held)
        assert torch.equal(y, y_there.held)


def test_a_pretended_gpu_refuses_operands_of_two_devices_and_counts_what_a_real_one_would_wait_for() -> None:
    with PretendGpu() as gpu:
        x = torch.ones(3, device=GPU)
        with pytest.raises(RuntimeError, match="on the GPU and on the CPU"):
            _ = x + torch.ones(3)
        assert (x + 1).device == GPU
        assert float(x.sum()) == 3.0
        assert x.to("cpu").device.type == "cpu"
        assert gpu.waits == ["a value is read", "a tensor is brought back"]
