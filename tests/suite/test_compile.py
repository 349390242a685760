"""execution.compile: the network is compiled once, whatever changes between steps, and trains like an eager one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from suite.engines.process_group import EngineError, Layout
from suite.recipe.cell import Cell
from suite.recipe.settings import Execution
from suite.training.trainer import Trainer

NOWHERE = Path("no-data-needed")
BINARY_INPUTS: dict[str, Any] = {"model": "bireal_resnet20", "quantization__inputs": {"quantizer": "bnn"}}
RECIPES: dict[str, dict[str, Any]] = {
    "resnet8": {},
    "transformer": {"model": "vit_mini_patch2_8"},
    "with a scale": {"quantization__scale": "channel"},
    "binary inputs": {"task": "bwa", **BINARY_INPUTS},
    "sums of few bits": {"task": "bwaa", **BINARY_INPUTS, "quantization__accumulator": {"bits": 8}},
}


@pytest.fixture(autouse=True)
def _compiled_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traces and guards networks as usual, but runs the traces with torch's own kernels, so that losses are equal."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled(module, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_network_is_compiled_once_and_trains_to_the_bit_as_an_eager_one(
    make_cell: Callable[..., Cell], recipe: dict[str, Any]
) -> None:
    losses = []
    for compiled in (False, True):
        trainer = Trainer(make_cell(**recipe), Layout(), NOWHERE, None, Execution(compile=compiled))
        batches = trainer.loaders.train.epoch(0)
        losses.append([float(trainer._train_step(*next(batches))) for _ in range(4)])
    assert losses[0] == losses[1]
    assert counters["stats"]["unique_graphs"] == 1


def test_binary_inputs_whose_mu_moves_are_refused_and_a_constant_one_is_not(make_cell: Callable[..., Cell]) -> None:
    moving = {"quantizer": "bnn++", "sharpness": {"shape": "linear", "start": 1.0, "end": 50.0}}
    cell = make_cell(task="bwa", **BINARY_INPUTS | {"quantization__inputs": moving})
    with pytest.raises(EngineError, match=r"the mu of quantization\.inputs changes"):
        Trainer(cell, Layout(), NOWHERE, None, Execution(compile=True))
    constant = moving | {"sharpness": {"start": 50.0}}
    Trainer(
        make_cell(task="bwa", **BINARY_INPUTS | {"quantization__inputs": constant}),
        Layout(),
        NOWHERE,
        None,
        Execution(compile=True),
    )
