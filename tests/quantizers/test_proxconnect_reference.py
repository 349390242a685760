"""The oracle: ProxConnect around torch's optimizers steps as `reference.py` does, every row, every update."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tanh_network import TanhNetwork
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from quantizers import QUANTIZERS, Linear, ProxConnect, SharpnessSchedule, reference

NUM_STEPS = 200
SHARPNESS = Linear(0.5, 4.0)

# The learning rates keep every trajectory out of chaos: at lr = 0.05, SGD with bnn+ makes 2e-10 of a last bit's 1e-16.
BASES: dict[str, tuple[Callable[..., Optimizer], Callable[..., reference.Move], dict[str, Any]]] = {
    "sgd": (SGD, reference.sgd, {"lr": 0.02, "weight_decay": 0.01}),
    "momentum": (SGD, reference.sgd, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (SGD, reference.sgd, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adamw": (AdamW, reference.adamw, {"lr": 0.01, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("update", reference.ITERATIONS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_200_steps_equal_the_literal_iteration(quantizer: str, base: str, update: str) -> None:
    torch_base, literal_base, options = BASES[base]
    model = TanhNetwork()
    start = model.bits()

    optimizer = ProxConnect(torch_base(model.groups(quantizer), **options), update=update)
    schedule = SharpnessSchedule(optimizer, SHARPNESS, NUM_STEPS)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        model().backward()
        schedule.step()
        optimizer.step()

    def gradient(w: list[Tensor]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in w]
        return list(torch.autograd.grad(model.loss_at(*leaves), leaves))

    expected = reference.ITERATIONS[update](
        start,
        gradient,
        (quantizer, quantizer, "fp"),
        [SHARPNESS(t / NUM_STEPS) for t in range(NUM_STEPS)],
        literal_base(**options),
    )
    actual = [optimizer.latent(model.u), optimizer.latent(model.v), model.c.detach()]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert max((a - b).abs().max().item() for a, b in zip(actual, start, strict=True)) > 0.1
