"""The plain engine: one process, or torch's DDP over several processes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import models
from quantizers import ProxConnect
from quantizers.groups import row_of
from suite.engines.clipping import clip_adaptively
from suite.engines.process_group import Layout
from suite.engines.protocol import Latent, copied, require_agreement, require_same_recipe
from suite.recipe.settings import Execution, Training

AUTOCAST = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PlainEngine:
    """Autocast, backward (DDP averages gradients over the processes), clipping, step.

    For any number of processes and micro-batches, this gives the gradient of the mean loss over the global batch: all
    processes have equal shares, and micro-batches are weighted by size.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: ProxConnect,
        criterion: nn.Module,
        layout: Layout,
        training: Training,
        execution: Execution,
        overflow_penalty: float = 0.0,
    ) -> None:
        self.overflow_penalty = overflow_penalty
        self.model, self.optimizer, self.criterion, self.layout = model, optimizer, criterion, layout
        require_agreement(self.optimizer, layout)
        self.training, self.micro_batch_size = training, execution.micro_batch_size
        self.dtype = AUTOCAST[training.precision]
        self.scaler = torch.amp.GradScaler(layout.device.type, enabled=self.dtype == torch.float16)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._names = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        if execution.compile:
            model.compile()  # in place: keeps names and addresses, and evaluation runs compiled, too
        self._replica = self._replicated(execution.determinism) if layout.world_size > 1 else model

    def _replicated(self, determinism: str) -> DistributedDataParallel:
        return DistributedDataParallel(
            self.model,
            device_ids=[self.layout.device] if self.layout.device.type == "cuda" else None,
            # No parameter is unused, but searching for them keeps DDP from regrouping gradients after the first step:
            # with three or more processes, a resumed run would then sum, and round, in another order.
            find_unused_parameters=determinism == "strict",
            gradient_as_bucket_view=determinism == "fast",
        )

    def train_step(self, images: Tensor, labels: Tensor, soft: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Engine.train_step` says."""
        self.optimizer.zero_grad()
        num_images = len(labels)
        size = self.micro_batch_size or num_images
        loss, logits = torch.zeros((), device=labels.device), []
        targets = (labels,) if soft is None else (labels, soft)
        parts = zip(*(torch.split(each, size) for each in (images, *targets)), strict=True)
        for part, (x, *y) in enumerate(parts, 1):
            with self._quiet() if part * size < num_images else nullcontext():
                part_loss, part_logits = self._forward(x, *y)
                part_loss = part_loss * (len(x) / num_images)
                torch.autograd.backward(self.scaler.scale(part_loss))
            loss += part_loss.detach()
            logits.append(part_logits.detach())
        self._clip()
        self.scaler.step(self.optimizer)  # if fp16 overflowed, skips the step: w, w* and mu are unchanged
        self.scaler.update()
        return loss, torch.cat(logits)

    def _clip(self) -> None:
        """Clips the gradients as the recipe requires."""
        norm, value, factor = (getattr(self.training, f"clip_grad_{by}") for by in ("norm", "value", "adaptive"))
        if norm is value is factor is None:
            return
        self.scaler.unscale_(self.optimizer)
        if norm is not None:
            self.optimizer.clip_grad_norm_(norm)
        if value is not None:
            torch.nn.utils.clip_grad_value_(self.model.parameters(), value)
        if factor is not None:
            clip_adaptively(self.optimizer, factor)

    def _forward(self, images: Tensor, *targets: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            logits = self._replica(images.contiguous(memory_format=torch.channels_last))
            loss = self.criterion(logits, *targets)
            if self.overflow_penalty:
                loss = loss + self.overflow_penalty * models.overflow_penalty(self.model)
            return loss, logits

    def _quiet(self) -> AbstractContextManager[None]:
        """Suppresses the gradient exchange between processes, for micro-batches before the last."""
        replica = self._replica
        return replica.no_sync() if isinstance(replica, DistributedDataParallel) else nullcontext()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Forward pass [B, C, H, W] -> [B, classes] in the recipe's precision, without gradients."""
        with self._autocast():
            logits: Tensor = self.model(images.contiguous(memory_format=torch.channels_last))
        return logits

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.layout.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def harden(self) -> None:
        """Puts the deployed weights into the model, exactly +-1 where they are binary."""
        self.layout.broadcast(self.model.buffers())
        self.optimizer.harden()

    def soften(self) -> None:
        """Restores w."""
        self.optimizer.soften()

    def latents(self) -> Iterator[Latent]:
        """The live latents."""
        for names, group in zip(self._names, self.optimizer.param_groups, strict=True):
            if group.get("quantizer") is not None:
                for name, p in zip(names, group["params"], strict=True):
                    yield Latent(name, self.optimizer.latent(p), row_of(group), group["mu"])

    def weights(self) -> dict[str, Tensor]:
        """The current network; live tensors."""
        self.layout.broadcast(self.model.buffers())  # norm statistics differ between processes
        return self.model.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The state described in `Engine.state_dict`; live tensors."""
        state = self.optimizer.state_dict()
        order = [name for names in self._names for name in names]
        return {
            "model": self.weights(),
            "optimizer": {
                "update": self.optimizer.update,
                "state": {order[index]: dict(values) for index, values in state["state"].items()},
                "param_groups": [
                    group | {"params": list(names)}
                    for group, names in zip(state["param_groups"], self._names, strict=True)
                ],
            },
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a state of any engine.

        Raises:
            ValueError: the state belongs to another recipe.
        """
        saved = state["optimizer"]
        require_same_recipe(saved, self.optimizer, self._names)
        order = {name: index for index, name in enumerate(name for names in self._names for name in names)}
        parameters = dict(self.model.named_parameters())
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(
            {
                "state": {
                    order[name]: {key: _laid_out_as(value, parameters[name]) for key, value in values.items()}
                    for name, values in saved["state"].items()
                },
                "param_groups": [
                    group | {"params": [order[name] for name in group["params"]]} for group in saved["param_groups"]
                ],
            }
        )
        if self.scaler.is_enabled() and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])


def _laid_out_as(value: Any, parameter: Tensor) -> Any:  # noqa: ANN401  (an entry of a base optimizer's state)
    """A copy; a tensor of the parameter's shape also gets its memory format, which makes base optimizers fast."""
    if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return copied(value)
