"""One process, or DDP over several: the model in torch's own hands."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from quantizers import ProxConnect
from suite.distributed import Layout


class PlainEngine:
    """Autocast, backward (DDP averages gradients over the processes), clipping, step."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: ProxConnect,
        criterion: nn.Module,
        layout: Layout,
        *,
        bf16: bool,
        clip_grad_norm: float | None,
    ) -> None:
        self.model, self.optimizer, self.criterion, self.layout = model, optimizer, criterion, layout
        self.bf16, self.clip_grad_norm = bf16, clip_grad_norm
        self._replica = model if layout.world_size == 1 else DistributedDataParallel(model)

    def train_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step on this process's share [B, C, H, W]; (mean loss [], logits [B, classes]), both detached."""
        with self._autocast():
            logits = self._replica(images.contiguous(memory_format=torch.channels_last))
            loss = self.criterion(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip_grad_norm is not None:
            self.optimizer.clip_grad_norm_(self.clip_grad_norm)
        self.optimizer.step()
        return loss.detach(), logits.detach()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Forward pass [B, C, H, W] -> [B, classes] in the recipe's precision, without gradients."""
        with self._autocast():
            logits: Tensor = self.model(images.contiguous(memory_format=torch.channels_last))
        return logits

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.layout.device.type, dtype=torch.bfloat16, enabled=self.bf16)
