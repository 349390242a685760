"""If something besides the optimizer writes the parameters, nothing is lost silently."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm.utils
import torch
from literal_loop import (
    DTYPES,
    Batches,
    Network,
    adamw,
    assert_equal_weights,
    batches,
    criterion,
    eager_and_fused,
    ends_as_the_literal_loop,
    groups,
    literal,
    network,
    sgd,
    tolerance,
    train,
)
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel

from quantizers import ProxConnect, reference

NAMED_FIRST = r"parameter 0 of group 0 and 1 more.* no longer .*adopt\(\).*soften\(\)"
"""The error for a write to both quantized weights; the groups of these programs have no names."""


def step_once(model: nn.Module, optimizer: Optimizer, dtype: torch.dtype) -> None:
    train(model, optimizer, batches(dtype)[:1])


@eager_and_fused
def test_weights_loaded_after_the_optimizer_are_refused_then_adopted(fused: bool) -> None:
    dtype = DTYPES[fused]
    pretrained = network(dtype, seed=7).state_dict()
    model = network(dtype)
    optimizer = ProxConnect(sgd(model), fused=fused)
    model.load_state_dict(pretrained)
    with pytest.raises(RuntimeError, match=NAMED_FIRST):
        step_once(model, optimizer, dtype)
    optimizer.adopt()

    twin = network(seed=7)
    expected = train(twin, literal(sgd(twin)), batches())
    torch.testing.assert_close(train(model, optimizer, batches(dtype)), expected, rtol=0, atol=tolerance(dtype))
    assert_equal_weights(model, twin, tolerance(dtype))


@eager_and_fused
def test_weights_loaded_after_the_optimizer_are_refused_then_discarded(fused: bool) -> None:
    def with_a_load(model: Network, optimizer: ProxConnect, batches: Batches) -> list[float]:
        biases = [model.hidden.bias.detach().clone(), model.head.bias.detach().clone()]
        model.load_state_dict(network(seed=7).state_dict())
        with pytest.raises(RuntimeError, match=NAMED_FIRST):
            optimizer.quantize()
        optimizer.soften()
        with torch.no_grad():  # the optimizer does not restore the biases
            for bias, before in zip((model.hidden.bias, model.head.bias), biases, strict=True):
                bias.copy_(before)
        return train(model, optimizer, batches)

    ends_as_the_literal_loop(with_a_load, fused=fused, literal_train=train)


@eager_and_fused
def test_error_names_the_parameter_where_the_groups_have_names(fused: bool) -> None:
    model = network(DTYPES[fused])
    named = [("hidden.weight", model.hidden.weight), ("head.weight", model.head.weight)]
    optimizer = ProxConnect(SGD([{"params": named, "quantizer": "bc"}], lr=0.1), fused=fused)
    nn.init.normal_(model.head.weight)
    with pytest.raises(RuntimeError, match=r"head\.weight.* no longer "):
        step_once(model, optimizer, DTYPES[fused])


@eager_and_fused
def test_best_checkpoint_loaded_at_the_end_is_what_is_deployed(fused: bool) -> None:
    dtype = DTYPES[fused]
    model = network(dtype)
    optimizer = ProxConnect(sgd(model), fused=fused)
    train(model, optimizer, batches(dtype)[:4])
    best = copy.deepcopy(model.state_dict())
    signs = [torch.where(optimizer.latent(p) >= 0, 1.0, -1.0) for p in (model.hidden.weight, model.head.weight)]
    train(model, optimizer, batches(dtype)[4:])

    model.load_state_dict(best)
    with pytest.raises(RuntimeError, match=NAMED_FIRST):
        optimizer.harden()
    optimizer.adopt()
    optimizer.harden()
    assert torch.equal(model.hidden.weight, signs[0].to(dtype))
    assert torch.equal(model.head.weight, signs[1].to(dtype))


@eager_and_fused
def test_average_copied_back_is_refused_then_adopted(fused: bool) -> None:
    """Averages of w are not latents, so the literal loop also restarts from the averaged w."""

    def with_swa(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        average = AveragedModel(model)
        losses = []
        for batch in batches[:4]:
            losses += train(model, optimizer, [batch])
            average.update_parameters(model)
        model.load_state_dict(average.module.state_dict())
        if isinstance(optimizer, ProxConnect):
            with pytest.raises(RuntimeError, match=NAMED_FIRST):
                optimizer.step()
            optimizer.adopt()
            return losses + train(model, optimizer, batches[4:])
        fresh = sgd(model)
        for old, new in zip(optimizer.param_groups[1]["params"], fresh.param_groups[1]["params"], strict=True):
            fresh.state[new] = optimizer.state[old]
        for old, new in zip(optimizer.param_groups[0]["params"], fresh.param_groups[0]["params"], strict=True):
            fresh.state[new] = optimizer.state[old]
        return losses + train(model, literal(fresh), batches[4:])

    ends_as_the_literal_loop(with_swa, fused=fused)


@pytest.mark.parametrize(
    "average_of",
    [partial(AveragedModel, use_buffers=True), timm.utils.ModelEmaV3],
    ids=["torch", "timm"],
)
@eager_and_fused
def test_average_that_is_only_evaluated_leaves_training_alone(
    average_of: Callable[[nn.Module], Any], fused: bool
) -> None:
    def averaged(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        average = average_of(model)
        losses = []
        for batch in batches:
            losses += train(model, optimizer, [batch])
            update = getattr(average, "update_parameters", None) or average.update
            update(model)
            criterion(average(batch[0]), batch[1])
        return losses

    ends_as_the_literal_loop(averaged, fused=fused, literal_train=train)


@eager_and_fused
def test_layer_initialised_anew_in_the_middle(fused: bool) -> None:
    """adopt() takes every parameter: the head's latents become its w."""

    def ours(model: Network, optimizer: ProxConnect, batches: Batches) -> list[float]:
        losses = train(model, optimizer, batches[:4])
        nn.init.constant_(model.hidden.weight, 0.1)
        with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.* no longer"):
            optimizer.state_dict()
        optimizer.adopt()
        return losses + train(model, optimizer, batches[4:])

    def literally(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        losses = train(model, optimizer, batches[:4])
        hidden, head = optimizer.param_groups[0]["params"]
        with torch.no_grad():
            hidden.fill_(0.1)
            head.copy_(model.head.weight)
            f, _ = reference.PAIRS["bnn++"]
            for w, w_star in ((model.hidden.weight, hidden), (model.head.weight, head)):
                w.copy_(f(w_star, 2.0))
        return losses + train(model, optimizer, batches[4:])

    ends_as_the_literal_loop(ours, fused=fused, literal_train=literally)


@eager_and_fused
def test_data_attribute_replaced_is_noticed(fused: bool) -> None:
    model = network(DTYPES[fused])
    optimizer = ProxConnect(sgd(model), fused=fused)
    model.head.weight.data = torch.ones_like(model.head.weight)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.* no longer"):
        step_once(model, optimizer, DTYPES[fused])


@eager_and_fused
def test_write_past_the_version_counter_is_taken_by_adopt(fused: bool) -> None:
    dtype = DTYPES[fused]
    model, twin = network(dtype), network(seed=7)
    optimizer = ProxConnect(sgd(model), fused=fused)
    for p, value in zip(model.parameters(), twin.parameters(), strict=True):
        p.data.copy_(value)
    optimizer.adopt()
    expected = train(twin, literal(sgd(twin)), batches())
    torch.testing.assert_close(train(model, optimizer, batches(dtype)), expected, rtol=0, atol=tolerance(dtype))


@eager_and_fused
def test_model_made_bfloat16_after_the_optimizer_keeps_its_latents(fused: bool) -> None:
    """With bc, w is exact in bfloat16: both loops see the same gradients, and the latents stay float32 or better."""

    def cast(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        model.to(torch.bfloat16)
        return train(model, optimizer, [(x.bfloat16(), y) for x, y in batches])

    def base(model: nn.Module) -> Optimizer:
        return SGD(groups(model, "bc"), lr=0.05, momentum=0.9)

    ends_as_the_literal_loop(cast, base, fused=fused)


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 4)
        )


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions()


def channels_last(model: nn.Module, optimizer: Optimizer, batches: Batches) -> list[float]:
    model.to(memory_format=torch.channels_last)
    return train(model, optimizer, batches)


def test_memory_format_changed_after_the_optimizer() -> None:
    ends_as_the_literal_loop(channels_last, fused=False, make=convolutions)


def test_memory_format_changed_after_the_optimizer_cannot_be_fused() -> None:
    model = convolutions()
    optimizer = ProxConnect(adamw(model), fused=True)
    with pytest.raises(RuntimeError, match=r"fused=True: .* in another order than its latents'"):
        channels_last(model, optimizer, batches(torch.float32))


def test_parameter_given_another_shape_is_refused() -> None:
    model = network()
    optimizer = ProxConnect(sgd(model))
    model.hidden.weight.data = torch.ones(3, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 is \(3, 8\) .*, its latents are \(16, 8\)"):
        optimizer.step()


def test_wrapper_that_delegates_hardens_the_optimizer_itself() -> None:
    """Like Lightning's: an instance of a subclass that has no attributes of its own and looks up all of them."""

    class Wrapper(ProxConnect):
        def __init__(self, inner: ProxConnect) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    model = network()
    optimizer = ProxConnect(sgd(model))
    Wrapper(optimizer).harden()
    assert optimizer.hardened
    with pytest.raises(RuntimeError, match=r"call soften\(\) first"):
        optimizer.step()
