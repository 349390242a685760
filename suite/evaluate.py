"""Accuracy of a network, and the health of its latents."""

from collections.abc import Iterable

import torch
from torch import Tensor

from quantizers import ProxConnect, get
from suite.distributed import Layout
from suite.engine import Engine

MASKED = 1e-3
"""A weight whose B is below this share of B(0) counts as masked: its gradient hardly reaches its latent."""


def top1(engine: Engine, batches: Iterable[tuple[Tensor, Tensor]], layout: Layout) -> float:
    """Share of samples whose largest logit is the label's, in [0, 1]; each sample counts once over all processes.

    Raises:
        ValueError: there are no samples.
    """
    engine.model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=layout.device)
    for images, labels in batches:
        counts[0] += (engine.logits(images).argmax(1) == labels).sum()
        counts[1] += len(labels)
    num_correct, num_samples = layout.sum(counts).tolist()
    if not num_samples:
        raise ValueError("accuracy of no samples")
    return float(num_correct / num_samples)


class Health:
    """What tells a stuck or noisy binarization, over all quantized weights of an optimizer, once an epoch.

    flip_rate: share of weights whose sign differs from the last call's.
    latent_gap: mean |w* - sign(w*)|.
    masked_share: share of weights with |B(w*; mu)| < 1e-3 |B(0; mu)|.
    """

    def __init__(self, optimizer: ProxConnect) -> None:
        self.optimizer = optimizer
        self._signs = [w_star >= 0 for w_star, _, _ in self._latents()]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The three numbers as `health/...`; nothing where nothing is quantized."""
        if not self._signs:
            return {}
        flipped = gap = masked = 0.0
        for index, (w_star, quantizer, mu) in enumerate(self._latents()):
            positive = w_star >= 0
            flipped += float((positive != self._signs[index]).sum())
            gap += float((w_star - torch.where(positive, 1.0, -1.0)).abs().sum())
            scale = get(quantizer).backward(torch.zeros(1), mu).abs().item()
            masked += float((get(quantizer).backward(w_star, mu).abs() < MASKED * scale).sum())
            self._signs[index] = positive
        num = sum(signs.numel() for signs in self._signs)
        return {
            "health/flip_rate": flipped / num,
            "health/latent_gap": gap / num,
            "health/masked_share": masked / num,
        }

    def _latents(self) -> list[tuple[Tensor, str, float]]:
        return [
            (self.optimizer.latent(parameter), group["quantizer"], group["mu"])
            for group in self.optimizer.param_groups
            if "quantizer" in group
            for parameter in group["params"]
        ]
