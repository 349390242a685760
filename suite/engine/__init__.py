"""How a training step runs on the hardware at hand, behind one small protocol.

`plain` is one process or DDP; others join here.
"""

from typing import Protocol

from torch import Tensor, nn


class Engine(Protocol):
    """Forward, backward and optimizer step of one global batch."""

    model: nn.Module

    def train_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step on this process's share [B, C, H, W]; (mean loss [], logits [B, classes]), both detached."""

    def logits(self, images: Tensor) -> Tensor:
        """Forward pass [B, C, H, W] -> [B, classes] in the recipe's precision, without gradients."""
