"""Teachers: trained networks whose outputs a distilled cell learns from. They run forward only, once per batch."""

from pathlib import Path

import torch
from torch import Tensor, nn

from suite.data.augmentation import Normalization
from suite.data.source import Description
from suite.engines.ddp import AUTOCAST
from suite.engines.process_group import Layout
from suite.recipe.cell import Cell
from suite.training.pretrained import PretrainedError, preprocessing, pretrained


class Teacher:
    """A network in evaluation mode, under the recipe's autocast, without gradients.

    Args:
        model: the network, on the images' device.
        precision: the recipe's.
        seen: normalisation of the images that the network was trained on; None: the same as `shown`.
        shown: normalisation of the images passed to `logits`.
    """

    def __init__(
        self, model: nn.Module, precision: str, seen: Normalization | None = None, shown: Normalization | None = None
    ) -> None:
        self.model = model.requires_grad_(requires_grad=False).eval().to(memory_format=torch.channels_last)
        self._dtype = AUTOCAST[precision]
        self._change: tuple[Tensor, Tensor] | None = None
        if seen is not None and shown is not None:
            device = next(model.parameters()).device
            factor, shift = shown.std / seen.std, (shown.mean - seen.mean) / seen.std
            self._change = factor.view(-1, 1, 1).to(device), shift.view(-1, 1, 1).to(device)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits, float32 [B, classes], of images [B, C, H, W]."""
        self.model.eval()
        if self._change is not None:
            factor, shift = self._change
            images = images * factor + shift
        with torch.autocast(images.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            logits: Tensor = self.model(images.contiguous(memory_format=torch.channels_last))
        return logits.float()


def published(
    cell: Cell, description: Description, layout: Layout, data_dir: Path, shown: Normalization
) -> tuple[Teacher, str]:
    """The teacher named by the cell's distillation, and the SHA-256 of its weights file.

    If it must be downloaded, the main process does so before the others read it.

    Raises:
        PretrainedError: the weights do not exist, or have other classes.
    """
    assert cell.distillation is not None  # noqa: S101  (the caller has checked)
    name, size = cell.distillation.weights or "", cell.data.image_size or description.image_size

    def load() -> tuple[nn.Module, str]:
        with torch.random.fork_rng(devices=[]):
            model, checksum = pretrained(
                name, len(description.classes), size, description.in_chans, data_dir, own_classes=True
            )
        return model, checksum

    found = load() if layout.is_main else None
    layout.wait()
    model, checksum = found or load()
    own = preprocessing(name)
    if len(own.mean) != description.in_chans:
        raise PretrainedError(
            f"distillation.weights: {name} is for {len(own.mean)} channels, not {description.in_chans}"
        )
    seen = Normalization(torch.tensor(own.mean), torch.tensor(own.std))
    return Teacher(model.to(layout.device), cell.training.precision, seen, shown), checksum
