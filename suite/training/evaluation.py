"""Accuracy of a network, and the health of its latents."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from quantizers import get
from quantizers.packing import pack, unpack
from suite.engines.process_group import Layout
from suite.engines.protocol import Engine, Latent

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
    """What tells a stuck or noisy binarization, over all quantized weights, once an epoch.

    flip_rate: share of weights whose sign differs from the last call's.
    latent_gap: mean |w* - sign(w*)|.
    masked_share: share of weights with |B(w*; mu)| < 1e-3 |B(0; mu)|.

    `latents` goes through them one at a time, as `Engine.latents` does: they need not fit in memory together.
    """

    def __init__(self, latents: Callable[[], Iterator[Latent]]) -> None:
        self.latents = latents
        self._signs = {latent.name: latent.w_star >= 0 for latent in latents()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The three numbers as `health/...`; nothing where nothing is quantized."""
        if not self._signs:
            return {}
        flipped = gap = masked = 0.0
        for name, w_star, quantizer, mu in self.latents():
            positive = w_star >= 0
            flipped += float((positive != self._signs[name]).sum())
            gap += float((w_star - torch.where(positive, 1.0, -1.0)).abs().sum())
            scale = get(quantizer).backward(torch.zeros(1), mu).abs().item()
            masked += float((get(quantizer).backward(w_star, mu).abs() < MASKED * scale).sum())
            self._signs[name] = positive
        num = sum(signs.numel() for signs in self._signs.values())
        return {
            "health/flip_rate": flipped / num,
            "health/latent_gap": gap / num,
            "health/masked_share": masked / num,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The signs that the next call compares with, by parameter, eight to a byte."""
        return {name: pack(torch.where(signs, 1, -1).to(torch.int8)) for name, signs in self._signs.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Compares with those of `state` next."""
        self._signs = {name: unpack(state[name], signs.shape, torch.int8) > 0 for name, signs in self._signs.items()}
