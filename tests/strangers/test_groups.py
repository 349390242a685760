"""Parameters frozen, tied, added and left without gradients; options that a group cannot have."""

import math
from typing import Any

import pytest
import torch
from literal_loop import (
    DTYPES,
    Batches,
    Network,
    batches,
    criterion,
    eager_and_fused,
    ends_as_the_literal_loop,
    groups,
    literal,
    network,
    sgd,
    train,
)
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from quantizers import ProxConnect


@eager_and_fused
def test_layer_frozen_and_thawed(fused: bool) -> None:
    def frozen(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        losses = train(model, optimizer, batches[:2])
        optimizer.zero_grad()
        model.hidden.requires_grad_(False)
        losses += train(model, optimizer, batches[2:5])
        model.hidden.requires_grad_(True)
        return losses + train(model, optimizer, batches[5:])

    ends_as_the_literal_loop(frozen, fused=fused)


@eager_and_fused
def test_branch_that_takes_part_in_every_other_step(fused: bool) -> None:
    """Its Adam step count is lower than the other parameters', which share a block of latents with it."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            h = self.always(x) + self.sometimes(x) if both else self.always(x)
            logits: Tensor = self.head(torch.tanh(h))
            return logits

    def train(model: nn.Module, optimizer: Optimizer, batches: Batches) -> list[float]:
        losses = []
        for i, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            loss = criterion(model(x, both=i % 2 == 1), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Branches()

    def base(model: nn.Module) -> Optimizer:
        return torch.optim.AdamW(groups(model), lr=0.01, eps=0.01)

    ends_as_the_literal_loop(train, base, fused=fused, make=make)


@eager_and_fused
def test_group_added_in_the_middle(fused: bool) -> None:
    def base(model: Network) -> Optimizer:
        return SGD([{"params": [model.head.weight], "quantizer": "bnn++", "mu": 2.0}], lr=0.05, momentum=0.9)

    def new_group(model: Network) -> dict[str, Any]:
        return {"params": [model.hidden.weight], "quantizer": "bc", "mu": 1.0, "lr": 0.02}

    def ours(model: Network, optimizer: ProxConnect, batches: Batches) -> list[float]:
        losses = train(model, optimizer, batches[:4])
        optimizer.add_param_group(new_group(model))
        return losses + train(model, optimizer, batches[4:])

    def literally(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        losses = train(model, optimizer, batches[:4])
        model.zero_grad()
        second = literal(SGD([new_group(model)], momentum=0.9))
        optimizer.register_step_pre_hook(lambda *_: second.step())
        optimizer.register_step_post_hook(lambda *_: second.zero_grad())
        return losses + train(model, optimizer, batches[4:])

    ends_as_the_literal_loop(ours, base, fused=fused, literal_train=literally)


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder transposed, and one layer listed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle = nn.Linear(8, 4), nn.Linear(4, 4, bias=False)
        self.again = self.middle

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.again(torch.tanh(self.middle(torch.tanh(self.encoder(x)))))
        return logits + nn.functional.linear(x @ self.encoder.weight.T, self.middle.weight)


@eager_and_fused
def test_tied_parameters(fused: bool) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Tied()

    ends_as_the_literal_loop(train, fused=fused, make=make)


def test_sparse_gradients_of_an_embedding() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(32, 6, sparse=True), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            words = (x.abs() * 10).long().clamp(max=31)
            logits: Tensor = self.head(self.table(words).mean(1))
            return logits

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Bag()

    ends_as_the_literal_loop(train, lambda model: SGD(groups(model), lr=0.05), fused=False, make=make)


@pytest.mark.parametrize("mu", [math.nan, math.inf, -1.0])
@eager_and_fused
def test_impossible_mu_is_refused_at_the_step_before_anything_changes(mu: float, fused: bool) -> None:
    dtype = DTYPES[fused]
    model = network(dtype)
    optimizer = ProxConnect(sgd(model), fused=fused)
    (x, y), *_ = batches(dtype)
    criterion(model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["mu"] = mu
    with pytest.raises(ValueError, match=f"mu={mu}: a sharpness is finite and not negative"):
        optimizer.step()
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
    assert not optimizer.state
    optimizer.param_groups[0]["mu"] = 2.0
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"differentiable": True}, "differentiable=True: B . grad is not differentiated"),
        ({"mu": math.nan}, "mu=nan: a sharpness is finite"),
        ({"quantizer": "bnnpp"}, r"unknown quantizer 'bnnpp'; did you mean 'bnn\+\+'\?"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_group_that_cannot_be_trained_is_refused(options: dict[str, Any], message: str) -> None:
    group = {"params": [nn.Parameter(torch.ones(3))], "quantizer": "bc", **options}
    with pytest.raises(ValueError, match=message):
        ProxConnect(SGD([group], lr=0.1))


def test_integer_and_complex_parameters_are_refused() -> None:
    for dtype in (torch.int8, torch.complex64):
        p = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        with pytest.raises(TypeError, match=f"real floating dtype, not {dtype}"):
            ProxConnect(SGD([{"params": [p], "quantizer": "bc"}], lr=0.1))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"dampening": 0.1, "momentum": 0.9}, "dampening=0.1"), ({"lr": torch.tensor(0.1)}, "lr is not a Python number")],
    ids=["dampening", "tensor lr"],
)
def test_fused_step_that_cannot_be_had_is_refused_with_its_reason(options: dict[str, Any], reason: str) -> None:
    model = network(torch.float32)
    with pytest.raises(ValueError, match=f"fused=True: .*{reason}"):
        ProxConnect(SGD(groups(model), **{"lr": 0.1, **options}), fused=True)
