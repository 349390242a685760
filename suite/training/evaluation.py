"""Accuracy of a network, and the health of its latents."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import models
from quantizers.packing import pack, unpack
from suite.data.loader import Loader
from suite.engines.process_group import Layout
from suite.engines.protocol import Engine, Latent
from suite.errors import DataError
from suite.run.failures import DivergedError

NUM_FIRST_CLASSES = 10
"""Top-5 is meaningful only with more classes than this."""
MASKED = 1e-3
"""A weight with |B| below this share of |B(0)| counts as masked: almost no gradient reaches its latent."""


@dataclass(frozen=True)
class Evaluation:
    """A network's results on a part of a data set; `right`: bool [N] on the CPU, in sample order.

    `loss` is the mean cross-entropy with unsmoothed labels; `top5` is the fraction of samples whose label is among the
    five largest logits, None for ten classes or fewer; `overflow_share` is the fraction of sums that did not fit in
    their accumulator of few bits, None for a network without such accumulators.
    """

    top1: float
    loss: float
    top5: float | None
    right: Tensor
    overflow_share: float | None = None

    def metrics(self, part: str, suffix: str = "") -> dict[str, float]:
        """{"val/top1": ..., "val/loss": ...} for part "val"; `suffix` is appended to each name."""
        found = {"top1": self.top1, "loss": self.loss}
        optional = {"top5": self.top5, "overflow_share": self.overflow_share}
        found |= {name: value for name, value in optional.items() if value is not None}
        return {f"{part}/{name}{suffix}": value for name, value in found.items()}


def evaluate(engine: Engine, loader: Loader, layout: Layout, micro_batch_size: int | None = None) -> Evaluation:
    """Evaluates on every sample of the loader's part, each once over all processes.

    All processes make the same number of forward passes, because some engines exchange parameters during them.

    Raises:
        DataError: there are no samples.
    """
    num_samples = len(loader.reader.labels)
    if not num_samples:
        raise DataError("cannot compute accuracy: the part has no images")
    engine.model.eval()
    models.reset_overflows(engine.model)
    num_mine = len(range(layout.rank, num_samples, layout.world_size))
    right = torch.zeros(-(-num_samples // layout.world_size), dtype=torch.uint8, device=layout.device)
    sums = torch.zeros(2, dtype=torch.float64, device=layout.device)  # of losses, of labels among the top five
    start, has_many_classes = 0, False
    for images, labels in loader.evaluation(micro_batch_size):
        num = min(len(labels), num_mine - start)  # without a repeated last sample, which fills the shares
        if num <= 0:
            engine.logits(images)
            continue
        logits, truth = engine.logits(images)[:num].float(), labels[:num]
        right[start : start + num] = logits.argmax(1) == truth
        sums[0] += functional.cross_entropy(logits, truth, reduction="sum")
        has_many_classes = logits.shape[1] > NUM_FIRST_CLASSES
        if has_many_classes:
            sums[1] += (logits.topk(5).indices == truth[:, None]).sum()
        start += num
    over = layout.sum(torch.tensor(models.overflows(engine.model), dtype=torch.float64, device=layout.device)).tolist()
    every = layout.gather(right).T.flatten()[:num_samples].bool().cpu()
    loss, num_in_five = layout.sum(sums).tolist()
    top5 = num_in_five / num_samples if has_many_classes else None
    overflow_share = over[0] / over[1] if over[1] else None
    return Evaluation(int(every.sum()) / num_samples, loss / num_samples, top5, every, overflow_share)


class Health:
    """Indicators of a stuck or noisy binarization, over all quantized weights, once per epoch.

    flip_rate: share of weights whose sign differs from the last call's.
    latent_gap: mean |w* - sign(w*)|; with a scale s, |w* - s sign(w*)|.
    masked_share: share of weights with |B(w*; mu)| < 1e-3 |B(0; mu)|.

    `latents` iterates over them one at a time, like `Engine.latents`, so they need not fit in memory together.
    """

    def __init__(self, latents: Callable[[], Iterator[Latent]]) -> None:
        self.latents = latents
        self._signs = {latent.name: latent.w_star >= 0 for latent in latents()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The three numbers as `health/...`; empty if nothing is quantized.

        Raises:
            DivergedError: a latent is NaN or infinite. The sign would hide this, and the loss would stay finite.
        """
        if not self._signs:
            return {}
        flipped = gap = masked = 0.0
        for name, w_star, row, mu in self.latents():
            if num_bad := int((~w_star.isfinite()).sum()):
                raise DivergedError(f"{num_bad} of the {w_star.numel()} latents of {name} are NaN or infinite")
            positive = w_star >= 0
            flipped += float((positive != self._signs[name]).sum())
            gap += float((w_star - row.deployed(w_star, mu)).abs().sum())
            at_zero = row.backward(torch.zeros(1, 1), mu).abs().item()
            masked += float((row.backward(w_star, mu).abs() < MASKED * at_zero).sum())
            self._signs[name] = positive
        num = sum(signs.numel() for signs in self._signs.values())
        return {
            "health/flip_rate": flipped / num,
            "health/latent_gap": gap / num,
            "health/masked_share": masked / num,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The signs that the next call compares with, by parameter, packed eight to a byte."""
        return {name: pack(torch.where(signs, 1, -1).to(torch.int8)) for name, signs in self._signs.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Makes the next call compare with the signs in `state`."""
        self._signs = {
            name: (unpack(state[name], signs.shape, torch.int8) > 0).to(signs.device)
            for name, signs in self._signs.items()
        }
