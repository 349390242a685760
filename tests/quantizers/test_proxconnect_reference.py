"""The oracle: ProxConnect around torch's optimizers steps as `reference.py` does, every row, every update."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tanh_network import TanhNetwork
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from quantizers import QUANTIZERS, Linear, ProxConnect, SharpnessSchedule, reference
from quantizers.scales import SCALES, Scale

NUM_STEPS = 20
SHARPNESS = Linear(0.5, 4.0)

BASES: dict[str, tuple[Callable[..., Optimizer], Callable[..., reference.Move], dict[str, Any]]] = {
    "sgd": (SGD, reference.sgd, {"lr": 0.02, "weight_decay": 0.01}),
    "momentum": (SGD, reference.sgd, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (SGD, reference.sgd, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adamw": (AdamW, reference.adamw, {"lr": 0.01, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("update", reference.ITERATIONS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("quantizer", "scale"),
    [(row.name, scale) for row in QUANTIZERS.values() for scale in SCALES if row.binary or scale == "none"],
)
def test_each_step_equals_the_literal_iterations(quantizer: str, scale: Scale, base: str, update: str) -> None:
    """Step by step from the same w*: over many steps a sign with a steep B is chaotic; a last bit grows to 1e-5."""
    torch_base, literal_base, options = BASES[base]
    model = TanhNetwork()
    start = model.bits()

    def gradient(w: list[Tensor]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in w]
        return list(torch.autograd.grad(model.loss_at(*leaves), leaves))

    groups = model.groups(quantizer)
    groups[0]["scale"] = scale
    row = quantizer if scale == "none" else f"{quantizer} x {scale}"
    optimizer = ProxConnect(torch_base(groups, **options), update=update)
    schedule = SharpnessSchedule(optimizer, SHARPNESS, NUM_STEPS)
    literal_step, move = reference.ITERATIONS[update], literal_base(**options)
    states: list[dict[str, Any]] = [{}, {}, {}]
    for t in range(NUM_STEPS):
        before = [tensor.clone() for tensor in (*_latents(optimizer, model), model.c.detach())]
        optimizer.zero_grad()
        model().backward()
        schedule.step()
        optimizer.step()
        mus = [SHARPNESS(t / NUM_STEPS)]
        expected = literal_step(before, gradient, (row, row, "fp"), mus, move, states)
        actual = [*_latents(optimizer, model), model.c.detach()]
        # Weights, gradients and moments here are below 4, and a step rounds some twenty times: 20 * 4 * 2^-53 < 1e-14.
        # A scale's mean of 24 magnitudes adds fewer than five roundings, since torch adds them in pairs or vectors.
        assert _distance(actual, expected) <= 1e-14, f"at step {t}"
    assert _distance(actual, start) > 0.01


def _latents(optimizer: ProxConnect, model: TanhNetwork) -> list[Tensor]:
    return [optimizer.latent(model.u), optimizer.latent(model.v)]


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    return float(torch.cat([a.flatten() - b.flatten() for a, b in zip(one, other, strict=True)]).abs().max())
