"""Parameters cut into flat shards that are stepped a few at a time, as DeepSpeed ZeRO does, train as they do whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from quantizers import QUANTIZERS, ProxConnect

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


def _whole(quantizer: str, base: str) -> tuple[Tensor, Tensor]:
    """(w, w*) after training in one piece, the gradients being given numbers."""
    weight = torch.nn.Parameter(_numbers(0))
    optimizer = ProxConnect(BASES[base]([{"params": [weight], "quantizer": quantizer, "mu": _mu(0)}]))
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["mu"] = _mu(step)
        weight.grad = _numbers(1 + step)
        optimizer.step()
    return weight.detach(), optimizer.latent(weight)


def _deferred(quantizer: str, base: str, *groups: list[Tensor]) -> ProxConnect:
    options = {"quantizer": quantizer, "mu": _mu(0)}
    return ProxConnect(BASES[base]([{"params": shards, **options} for shards in groups]), defer=True)


def _give(shards: list[Tensor], step: int) -> None:
    for shard, gradient in zip(shards, torch.split(_numbers(1 + step), SIZES), strict=True):
        shard.grad = gradient.clone()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_group_that_lists_one_shard_at_a_time_trains_as_the_whole(quantizer: str, base: str) -> None:
    shards = list(torch.split(_numbers(0), SIZES))
    optimizer = _deferred(quantizer, base, shards)
    optimizer.adopt()
    (group,) = optimizer.param_groups
    group["params"] = []
    for step in range(NUM_STEPS):
        group["mu"] = _mu(step)
        _give(shards, step)
        for shard in shards:
            group["params"] = [shard]
            optimizer.step()
            group["params"] = []
    w, w_star = _whole(quantizer, base)
    assert torch.equal(torch.cat([optimizer.trained(shard) for shard in shards]), w_star)
    assert torch.equal(torch.cat(shards), w)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_groups_that_are_listed_one_at_a_time_train_as_the_whole(quantizer: str) -> None:
    shards = list(torch.split(_numbers(0), SIZES))
    optimizer = _deferred(quantizer, "adamw", *([shard] for shard in shards))
    optimizer.adopt()
    groups = optimizer.param_groups
    for step in range(NUM_STEPS):
        for group in groups:
            group["mu"] = _mu(step)
        _give(shards, step)
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
            optimizer.param_groups = groups
    w, w_star = _whole(quantizer, "adamw")
    assert torch.equal(torch.cat([optimizer.trained(shard) for shard in shards]), w_star)
    assert torch.equal(torch.cat(shards), w)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_padding_with_zeros_stays_where_it_is(quantizer: str) -> None:
    shard = torch.cat([_numbers(0), torch.zeros(4)])
    optimizer = _deferred(quantizer, "adamw", [shard])
    optimizer.adopt()
    for step in range(NUM_STEPS):
        shard.grad = torch.cat([_numbers(1 + step), torch.zeros(4)])
        optimizer.step()
    assert torch.equal(optimizer.latent(shard)[-4:], torch.zeros(4))
    assert shard.isfinite().all()


def test_latents_are_taken_from_what_stands_in_the_groups_at_adoption() -> None:
    whole = _numbers(0)
    optimizer = _deferred("bc", "momentum", [whole])
    assert torch.equal(whole, _numbers(0)), "nothing is written before"
    with pytest.raises(ValueError, match=r"deferred: call adopt\(\)"):
        optimizer.latent(whole)
    whole.grad = _numbers(1)
    with pytest.raises(ValueError, match=r"deferred: call adopt\(\)"):
        optimizer.step()
    shard = whole[:5].clone()
    optimizer.param_groups[0]["params"] = [shard]
    optimizer.adopt()
    assert torch.equal(optimizer.latent(shard), whole[:5])
    assert torch.equal(shard, torch.where(whole[:5] >= 0, 1.0, -1.0))
    optimizer.adopt()
    assert torch.equal(optimizer.latent(shard), whole[:5]), "w is not taken for w*"


def test_the_clipped_norm_is_that_of_all_shards() -> None:
    shards = list(torch.split(_numbers(0), SIZES))
    optimizers = [_deferred("bnn++", "momentum", [shard]) for shard in shards]
    for optimizer in optimizers:
        optimizer.adopt()
    _give(shards, 0)
    squares = [optimizer.clip_grad_norm_(1e9).square() for optimizer in optimizers]
    norms = [optimizer.clip_grad_norm_(0.1, lambda _own: torch.stack(squares).sum()) for optimizer in optimizers]
    weight = torch.nn.Parameter(_numbers(0))
    whole = ProxConnect(SGD([{"params": [weight], "quantizer": "bnn++", "mu": _mu(0)}], lr=0.05))
    weight.grad = _numbers(1)
    norm = whole.clip_grad_norm_(0.1)
    assert all(torch.allclose(each, norm) for each in norms)
    assert torch.allclose(torch.cat([shard.grad for shard in shards if shard.grad is not None]), weight.grad)


def test_what_was_filled_in_place_is_restored() -> None:
    saved, filled = (_deferred("bnn++", "momentum", [_numbers(0)]) for _ in range(2))
    for optimizer in (saved, filled):
        optimizer.adopt()
    (group,) = saved.param_groups
    (shard,) = group["params"]
    shard.grad = _numbers(1)
    group["mu"] = 7.0
    saved.step()
    group["mu"] = 8.0
    (other,) = filled.param_groups[0]["params"]
    filled.latent(other).copy_(saved.latent(shard))
    filled.param_groups[0].update({"mu": 8.0, "written_mu": group["written_mu"]})
    filled.harden()
    filled.restore()
    assert torch.equal(other, shard)
    assert group["written_mu"] == 7.0
    assert not filled.hardened
