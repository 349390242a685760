"""Accumulation, clipping, scaling and closures behave as with the base optimizer."""

from typing import Any

import pytest
import torch
from tanh_network import TanhNetwork, equal, grad, train
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from quantizers import QUANTIZERS, ProxConnect, get

UPDATES = ("pc++", "pq", "rpc")
BASES = [(SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}), (AdamW, {"lr": 0.02, "weight_decay": 0.1})]


def test_two_half_losses_accumulate_to_one() -> None:
    whole, halves = TanhNetwork(), TanhNetwork()
    train(whole, ProxConnect(SGD(whole.groups("bnn++"), lr=0.1)), num_steps=1)
    optimizer = ProxConnect(SGD(halves.groups("bnn++"), lr=0.1))
    for _ in range(2):
        (0.5 * halves()).backward()
    optimizer.step()
    assert equal(whole.bits(), halves.bits())


def test_zero_grad_is_the_bases() -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bc"), lr=0.1))
    model().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# Clipping


def test_clipping_is_on_the_gradient_the_base_sees() -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bnn++", mu=2.0), lr=0.1))
    model().backward()
    backward = get("bnn++").backward
    raw = [grad(p).clone() for p in model.parameters()]
    seen = [backward(optimizer.latent(p), 2.0) * grad(p) for p in (model.u, model.v)] + [grad(model.c)]
    norm = torch.cat([g.flatten() for g in seen]).norm()
    returned = optimizer.clip_grad_norm_(norm.item() / 4)
    torch.testing.assert_close(returned, norm)
    torch.testing.assert_close([grad(p) for p in model.parameters()], [g / 4 for g in raw], rtol=1e-5, atol=0)
    torch.testing.assert_close(optimizer.clip_grad_norm_(1e9), norm / 4, rtol=1e-5, atol=0)


def test_clipping_full_precision_is_torchs() -> None:
    ours, torchs = TanhNetwork(), TanhNetwork()
    optimizer = ProxConnect(SGD(ours.groups("fp"), lr=0.1))
    for model in (ours, torchs):
        model().backward()
    norm = nn.utils.clip_grad_norm_(torchs.parameters(), 0.01)
    torch.testing.assert_close(optimizer.clip_grad_norm_(0.01), norm, rtol=1e-14, atol=0)
    torch.testing.assert_close([grad(p) for p in ours.parameters()], [grad(p) for p in torchs.parameters()])


def test_clipping_a_bfloat16_model_gives_a_float32_norm() -> None:
    model = TanhNetwork(torch.bfloat16)
    optimizer = ProxConnect(SGD(model.groups("bnn++"), lr=0.1))
    model().backward()
    assert optimizer.clip_grad_norm_(1.0).dtype == torch.float32


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_clipped_latents_stay_within_one_if_binary(quantizer: str) -> None:
    free, clipped = TanhNetwork(), TanhNetwork()
    for model, clip_latents in ((free, False), (clipped, True)):
        optimizer = ProxConnect(SGD(model.groups(quantizer), lr=3.0), clip_latents=clip_latents)
        train(model, optimizer, num_steps=2)
        w_star = optimizer.latent(model.u)
        assert bool(w_star.abs().max() <= 1) == (clip_latents and get(quantizer).binary)


# Scaling


def test_gradient_scaler_changes_nothing_but_skips_infinities() -> None:
    plain, scaled = TanhNetwork(torch.float32), TanhNetwork(torch.float32)
    train(plain, ProxConnect(SGD(plain.groups("bnn++"), lr=0.1, momentum=0.9)), num_steps=3)

    optimizer = ProxConnect(SGD(scaled.groups("bnn++"), lr=0.1, momentum=0.9))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for poisoned in (False, True, False, False):
        optimizer.zero_grad()
        scaler.scale(scaled()).backward()
        scaler.unscale_(optimizer)
        if poisoned:
            before = scaled.bits()
            optimizer.zero_grad()
            scaler.update()
            scaler.scale(scaled() * torch.inf).backward()
        scaler.step(optimizer)
        scaler.update()
        if poisoned:
            assert equal(scaled.bits(), before)
            assert scaler.get_scale() == 2.0**9
    assert equal(plain.bits(), scaled.bits())


# Closures


@pytest.mark.parametrize("quantizer", ["fp", "pc", "bnn++"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("base", "options"), BASES)
def test_closure_steps_as_a_backward_before_the_step(
    base: type[Optimizer], options: dict[str, Any], update: str, quantizer: str
) -> None:
    before, within = TanhNetwork(), TanhNetwork()
    train(before, ProxConnect(base(before.groups(quantizer), **options), update=update))

    optimizer = ProxConnect(base(within.groups(quantizer), **options), update=update)
    for _ in range(10):
        loss = optimizer.step(closure(within, optimizer))
        assert isinstance(loss, Tensor)
    assert equal(before.bits(), within.bits())


def test_lbfgs_through_full_precision_is_lbfgs() -> None:
    alone, wrapped = TanhNetwork(), TanhNetwork()
    base: Optimizer = LBFGS([{"params": list(alone.parameters())}], line_search_fn="strong_wolfe")
    optimizer = ProxConnect(
        LBFGS([{"params": list(wrapped.parameters()), "quantizer": "fp"}], line_search_fn="strong_wolfe")
    )
    for _ in range(3):
        base.step(closure(alone, base))
        optimizer.step(closure(wrapped, optimizer))
    assert equal(alone.bits(), wrapped.bits())


@pytest.mark.parametrize("update", UPDATES)
def test_lbfgs_lowers_the_loss_of_quantized_weights(update: str) -> None:
    model = TanhNetwork()
    groups = [{"params": list(model.parameters()), "quantizer": "bnn++", "mu": 1.0}]
    optimizer = ProxConnect(LBFGS(groups, lr=0.1, max_iter=5), update=update)
    first = model().item()
    for _ in range(10):
        optimizer.step(closure(model, optimizer))
    assert model().item() < first


def test_further_evaluations_in_a_step_do_not_move_the_latents() -> None:
    """With lr = 0, LBFGS evaluates twice at its starting point, which for pq is w, and must end there."""
    model = TanhNetwork()
    groups = [{"params": list(model.parameters()), "quantizer": "bnn++", "mu": 1.0}]
    optimizer = ProxConnect(LBFGS(groups, lr=0.0), update="pq")
    w, evaluate = model.u.detach().clone(), closure(model, optimizer)
    losses: list[float] = []

    def recorded() -> float:
        losses.append(evaluate().item())
        return losses[-1]

    optimizer.step(recorded)
    assert len(losses) == 2
    assert torch.equal(optimizer.latent(model.u), w)


def closure(model: TanhNetwork, optimizer: Optimizer) -> Any:  # noqa: ANN401  (torch asks for a float, gets a tensor)
    def evaluate() -> Any:  # noqa: ANN401
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    return evaluate
