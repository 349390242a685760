"""The theorem, executed: PC++ with F = T o P, B = T' o P is ProxConnect with P on the loss l(T(.)), step by step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tanh_network import TanhNetwork
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from quantizers import Linear, ProxConnect, Quantizer, SharpnessSchedule, maps, synthesize
from quantizers.catalog import Map

NUM_STEPS = 20
SHARPNESS = Linear(0.5, 3.0)
BASES: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.05, "weight_decay": 0.01}),
    "momentum": (SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


def soft_threshold(w: Tensor, mu: float) -> Tensor:
    return w.sign() * (w.abs() - 0.1 / mu).clamp(min=0)


def rounding(w: Tensor, _mu: float) -> Tensor:
    return (4 * w).round() / 4


def wave(u: Tensor, mu: float) -> Tensor:
    """Not monotone for mu > 1."""
    return u + torch.sin(2 * mu * u) / 2


def steep(u: Tensor, mu: float) -> Tensor:
    return torch.tanh(mu * u)


PAIRS: dict[str, tuple[Map, Map]] = {
    "sign, identity": (maps.hard_sign, maps.identity),
    "L, identity": (maps.piecewise_linear, maps.identity),
    "outward, H": (maps.outward, maps.clip),
    "identity, SS": (maps.identity, maps.sign_swish),
    "identity, tanh": (maps.identity, steep),
    "L, tanh": (maps.piecewise_linear, steep),
    "soft threshold, SS": (soft_threshold, maps.sign_swish),
    "soft threshold, wave": (soft_threshold, wave),
    "rounding, tanh": (rounding, steep),
    "hard tanh, cubic": (maps.clip, lambda u, mu: u + mu * u**3),
}


class Reparametrised(TanhNetwork):
    """The loss l(T(u), T(v), c) of the same network, which ProxConnect minimises."""

    def __init__(self, transform: Map) -> None:
        super().__init__()
        self.transform, self.mu = transform, SHARPNESS(0.0)

    def forward(self) -> Tensor:
        return self.loss_at(self.transform(self.u, self.mu), self.transform(self.v, self.mu), self.c)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PAIRS)
def test_pc_plus_plus_is_proxconnect_on_the_reparametrised_loss(name: str, base: str) -> None:
    prox, transform = PAIRS[name]
    composed = synthesize(prox, transform)
    proxconnects = Quantizer("P", prox, maps.ones, prox, maps.identity, "ProxConnect's")
    torch_base, options = BASES[base]

    def training(model: TanhNetwork, quantizer: Quantizer) -> tuple[ProxConnect, SharpnessSchedule]:
        groups = model.groups("bc")
        groups[0]["quantizer"] = quantizer
        optimizer = ProxConnect(torch_base(groups, **options))
        return optimizer, SharpnessSchedule(optimizer, SHARPNESS, NUM_STEPS)

    model, reparametrised = TanhNetwork(), Reparametrised(transform)
    start = model.bits()
    ours, theirs = training(model, composed), training(reparametrised, proxconnects)
    for _ in range(NUM_STEPS):
        reparametrised.mu = theirs[0].state_dict()["state"][0]["mu"]
        for net, (optimizer, schedule) in ((model, ours), (reparametrised, theirs)):
            optimizer.zero_grad()
            net().backward()
            optimizer.step()
            schedule.step()
        latents = [
            [optimizer.latent(net.u), optimizer.latent(net.v), net.c.detach()]
            for net, (optimizer, _) in ((model, ours), (reparametrised, theirs))
        ]
        torch.testing.assert_close(*latents, rtol=0, atol=1e-12)
    assert max((a - b).abs().max().item() for a, b in zip(latents[0], start, strict=True)) > 0.05
