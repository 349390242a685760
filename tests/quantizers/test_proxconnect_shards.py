"""Flat shards under ZeRO: ProxConnect treats them as parameters, whichever ones the groups list at the time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tanh_network import eager_and_fused, every_row
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from quantizers import ProxConnect

BASES: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "momentum": lambda groups: SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda groups: AdamW(groups, lr=0.02, weight_decay=0.1),
}
SIZES = [5, 4, 3]
NUM_STEPS = 6


def _numbers(seed: int) -> Tensor:
    return torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(seed))


def _mu(step: int) -> float:
    return 0.2 + 0.1 * step


def _whole(quantizer: str, base: str, *, fused: bool) -> tuple[Tensor, Tensor]:
    """(w, w*) after training in one piece, with prescribed gradients."""
    weight = torch.nn.Parameter(_numbers(0))
    optimizer = _around(quantizer, base, [weight], fused=fused)
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["mu"] = _mu(step)
        weight.grad = _numbers(1 + step)
        optimizer.step()
    return weight.detach(), optimizer.latent(weight)


def _around(quantizer: str, base: str, *groups: list[Any], fused: bool = False) -> ProxConnect:
    options = {"quantizer": quantizer, "mu": _mu(0)}
    return ProxConnect(BASES[base]([{"params": shards, **options} for shards in groups]), fused=fused)


def _give(shards: list[Tensor], step: int) -> None:
    for shard, gradient in zip(shards, torch.split(_numbers(1 + step), SIZES), strict=True):
        shard.grad = gradient.clone()


@eager_and_fused
@pytest.mark.parametrize("base", BASES)
@every_row
def test_a_group_that_lists_one_shard_at_a_time_trains_as_the_whole(quantizer: str, base: str, fused: bool) -> None:
    shards = list(torch.split(_numbers(0), SIZES))
    optimizer = _around(quantizer, base, shards, fused=fused)
    (group,) = optimizer.param_groups
    group["params"] = []
    for step in range(NUM_STEPS):
        group["mu"] = _mu(step)
        _give(shards, step)
        for shard in shards:
            group["params"] = [shard]
            optimizer.step()
            group["params"] = []
    _require_equal(optimizer, shards, *_whole(quantizer, base, fused=fused))
    before = torch.cat(shards)
    group["params"] = shards
    optimizer.harden()
    optimizer.soften()
    assert torch.equal(torch.cat(shards), before), "written one at a time and all at once"


@eager_and_fused
@pytest.mark.parametrize("quantizer", ["bc", "bnn++"])
def test_groups_that_are_listed_one_at_a_time_train_as_the_whole(quantizer: str, fused: bool) -> None:
    shards = list(torch.split(_numbers(0), SIZES))
    optimizer = _around(quantizer, "adamw", *([shard] for shard in shards), fused=fused)
    groups = optimizer.param_groups
    for step in range(NUM_STEPS):
        for group in groups:
            group["mu"] = _mu(step)
        _give(shards, step)
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
            optimizer.param_groups = groups
    _require_equal(optimizer, shards, *_whole(quantizer, "adamw", fused=fused))


def _require_equal(optimizer: ProxConnect, shards: list[Tensor], w: Tensor, w_star: Tensor) -> None:
    """Up to rounding: torch's last bits depend on an element's position in a tensor. Gradients do not depend on w."""
    rounding = NUM_STEPS * 16 * torch.finfo(torch.float32).eps * 10  # numbers and slopes here are below 10
    torch.testing.assert_close(torch.cat([optimizer.latent(s) for s in shards]), w_star, rtol=0, atol=rounding)
    torch.testing.assert_close(torch.cat(shards), w, rtol=0, atol=rounding)


@every_row
def test_padding_with_zeros_stays_where_it_is(quantizer: str) -> None:
    shard = torch.cat([_numbers(0), torch.zeros(4)])
    optimizer = _around(quantizer, "adamw", [shard])
    for step in range(NUM_STEPS):
        shard.grad = torch.cat([_numbers(1 + step), torch.zeros(4)])
        optimizer.step()
    assert torch.equal(optimizer.latent(shard)[-4:], torch.zeros(4))
    assert shard.isfinite().all()


@eager_and_fused
def test_the_clipped_norm_is_that_of_all_shards(fused: bool) -> None:
    shards = list(torch.split(_numbers(0), SIZES))
    optimizers = [_around("bnn++", "momentum", [shard], fused=fused) for shard in shards]
    _give(shards, 0)
    squares = [optimizer.clip_grad_norm_(1e9).square() for optimizer in optimizers]
    norms = [optimizer.clip_grad_norm_(0.1, lambda _own: torch.stack(squares).sum()) for optimizer in optimizers]
    weight = torch.nn.Parameter(_numbers(0))
    whole = _around("bnn++", "momentum", [weight], fused=fused)
    weight.grad = _numbers(1)
    norm = whole.clip_grad_norm_(0.1)
    assert all(torch.allclose(each, norm) for each in norms)
    assert torch.allclose(torch.cat([shard.grad for shard in shards if shard.grad is not None]), weight.grad)
    for optimizer in (*optimizers, whole):
        optimizer.step()
    torch.testing.assert_close(
        torch.cat([o.latent(s) for o, s in zip(optimizers, shards, strict=True)]), whole.latent(weight)
    )
