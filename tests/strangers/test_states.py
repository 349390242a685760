"""Saving, loading, copying and inspecting the state, as training scripts do."""

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from literal_loop import (
    DTYPES,
    Batches,
    Network,
    adamw,
    batches,
    eager_and_fused,
    ends_as_the_literal_loop,
    literal,
    network,
    sgd,
    tolerance,
    train,
)
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import Optimizer

from quantizers import ProxConnect


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("order", [["model", "optimizer"], ["optimizer", "model"], ["optimizer"]], ids=" then ".join)
@eager_and_fused
def test_resumed_from_a_file(order: list[str], fused: bool) -> None:
    def interrupted(model: Network, optimizer: ProxConnect, batches: Batches) -> list[float]:
        losses = train(model, optimizer, batches[:4])
        state = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        biases = [model.hidden.bias, model.head.bias]
        resumed = network(DTYPES[fused], seed=3)
        resumed.hidden.bias, resumed.head.bias = biases  # for the order that loads only the optimizer
        again = ProxConnect(adamw(resumed), fused=fused)
        for what in order:
            (resumed if what == "model" else again).load_state_dict(state[what])
        losses += train(resumed, again, batches[4:])
        model.load_state_dict(resumed.state_dict())
        return losses

    ends_as_the_literal_loop(interrupted, adamw, fused=fused, literal_train=train)


@eager_and_fused
def test_checkpoint_by_parameter_names(fused: bool) -> None:
    """torch.distributed.checkpoint rebuilds the optimizer's state by name, and initialises an empty one with a step."""

    def interrupted(model: Network, optimizer: ProxConnect, batches: Batches) -> list[float]:
        losses = train(model, optimizer, batches[:4])
        of_model, of_optimizer = dcp.get_state_dict(model, optimizer)
        resumed = network(DTYPES[fused], seed=3)
        again = ProxConnect(adamw(resumed), fused=fused)
        dcp.set_state_dict(resumed, again, model_state_dict=of_model, optim_state_dict=copy.deepcopy(of_optimizer))
        losses += train(resumed, again, batches[4:])
        model.load_state_dict(resumed.state_dict())
        return losses

    ends_as_the_literal_loop(interrupted, adamw, fused=fused, literal_train=train)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))],  # noqa: S301  (our own bytes)
    ids=["deepcopy", "pickle"],
)
@eager_and_fused
def test_model_and_optimizer_copied_together(duplicate: Callable[[Any], Any], fused: bool) -> None:
    def copied(model: Network, optimizer: ProxConnect, batches: Batches) -> list[float]:
        losses = train(model, optimizer, batches[:4])
        model_copy, optimizer_copy = duplicate((model, optimizer))
        losses += train(model_copy, optimizer_copy, batches[4:])
        train(model, optimizer, batches[4:])
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model_copy.parameters(), strict=True))
        return losses

    ends_as_the_literal_loop(copied, fused=fused, literal_train=train)


@eager_and_fused
def test_all_four_state_dict_hooks_are_called(fused: bool) -> None:
    model = network(DTYPES[fused])
    optimizer = ProxConnect(sgd(model), fused=fused)
    called = []

    def note(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        called.append("after saving")
        return {**state, "note": "of ours"}

    optimizer.register_state_dict_pre_hook(lambda _: called.append("before saving"))
    optimizer.register_state_dict_post_hook(note)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: called.append(f"before loading {state['note']}"))
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["before saving", "after saving", "before loading of ours", "after loading"]


@eager_and_fused
def test_momentum_is_read_by_parameter(fused: bool) -> None:
    dtype = DTYPES[fused]
    model, twin = network(dtype), network()
    optimizer, base = ProxConnect(sgd(model), fused=fused), literal(sgd(twin))
    train(model, optimizer, batches(dtype))
    train(twin, base, batches())
    found = [optimizer.state[p]["momentum_buffer"] for group in optimizer.param_groups for p in group["params"]]
    expected = [base.state[p]["momentum_buffer"] for group in base.param_groups for p in group["params"]]
    torch.testing.assert_close([m.double() for m in found], expected, rtol=0, atol=tolerance(dtype))
    optimizer.state_dict()  # reading has added nothing to the state


def _cleared(optimizer: Optimizer) -> None:
    optimizer.state.clear()


def _replaced(optimizer: Optimizer) -> None:
    optimizer.state = defaultdict(dict)


@pytest.mark.parametrize("reset", [_cleared, _replaced])
@pytest.mark.parametrize("base", [sgd, adamw])
@eager_and_fused
def test_momentum_reset_in_the_middle(
    reset: Callable[[Optimizer], None], base: Callable[[nn.Module], Optimizer], fused: bool
) -> None:
    def with_a_reset(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        losses = train(model, optimizer, batches[:4])
        reset(optimizer)
        return losses + train(model, optimizer, batches[4:])

    ends_as_the_literal_loop(with_a_reset, base, fused=fused)


def test_state_of_a_plain_torch_optimizer_is_refused() -> None:
    model = network()
    optimizer = ProxConnect(sgd(model))
    with pytest.raises(ValueError, match="the state is "):
        optimizer.load_state_dict(sgd(model).state_dict())
