"""DeepSpeed ZeRO over the processes: latents, optimizer state, gradients and parameters in shards. Imports deepspeed.

ZeRO flattens each parameter group and gives every process a part of it, as float32 shards that stand in the groups
while ProxConnect steps. Quantizers are scalar maps, so a shard is as good as a parameter: w* is adopted from it, and w
is written into it, which ZeRO then spreads as it spreads any weights. docs/decisions/006 has what that took.

`settings` has the configuration, `shards` what is read of ZeRO beyond its documented interface.
"""

import json
import logging
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from quantizers import ProxConnect
from suite.config import Execution, Training
from suite.distributed import Layout
from suite.engine import Latent, copied, require_same_recipe
from suite.engine.settings import configuration
from suite.engine.shards import layout_of, spread

log = logging.getLogger(__name__)


class DeepSpeedEngine:
    """The protocol over `deepspeed.initialize`, with ProxConnect as its optimizer.

    Numerics are those of the plain engine: float32 parameters and gradients, autocast for bf16, gradients averaged over
    processes and micro-batches. With gradient clipping the step is taken after DeepSpeed's own, for the norm is of
    B . grad over all shards, which only then are there: one more gathering of the weights per step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: ProxConnect,
        criterion: nn.Module,
        layout: Layout,
        training: Training,
        execution: Execution,
    ) -> None:
        """`optimizer` is deferred: its parameters hold w*, and latents are taken from the shards."""
        self.model, self.optimizer, self.criterion, self.layout = model, optimizer, criterion, layout
        self.clip_grad_norm, self.bf16 = training.clip_grad_norm, training.precision == "bf16"
        parameters = dict(model.named_parameters())
        names = {parameter: name for name, parameter in parameters.items()}
        self._names = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        settings = configuration(training, execution, layout, sum(p.numel() for p in parameters.values()))
        self._micro_batch_size: int = settings["train_micro_batch_size_per_gpu"]
        self._stage: int = settings["zero_optimization"]["stage"]
        if layout.is_main:
            log.info("deepspeed configuration: %s", json.dumps(settings))
        _join(layout)
        # Its optimizer's step is where ZeRO has the gradients in shards.
        self._collected = None if self.clip_grad_norm is None else _Collected(optimizer.param_groups)
        self._zero, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer if self._collected is None else self._collected, config=settings
        )
        self._shards = layout_of(self._zero, self._stage, self._names, parameters)
        with self._in_groups():
            optimizer.adopt()
        spread(self._zero, self._stage)

    def train_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step on this process's share [B, C, H, W]; (mean loss [], logits [B, classes]), both detached."""
        size, num_images = self._micro_batch_size, len(labels)
        loss, logits = torch.zeros((), device=labels.device), []
        for x, y in zip(torch.split(images, size), torch.split(labels, size), strict=True):
            with self._autocast():
                part_logits = self._zero(x)
                part_loss = self.criterion(part_logits, y)
            self._zero.backward(part_loss)
            self._zero.step()
            loss += part_loss.detach() * (len(y) / num_images)
            logits.append(part_logits.detach())
        if self._collected is not None:
            self._clipped_step(self._collected)
        return loss, torch.cat(logits)

    @torch.no_grad()
    def _clipped_step(self, collected: "_Collected") -> None:
        gradients = collected.take()
        with self._in_groups():
            for shard, gradient in gradients.items():
                shard.grad = gradient
            self.optimizer.clip_grad_norm_(self.clip_grad_norm or 0.0, self._sum if self._stage else None)
            self.optimizer.step()
        for shard in gradients:
            shard.grad = None
        spread(self._zero, self._stage)

    def _sum(self, value: Tensor) -> Tensor:
        return self.layout.sum(value.to(self.layout.device)).to(value.device)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Forward pass [B, C, H, W] -> [B, classes] in the recipe's precision, without gradients."""
        with self._autocast():
            logits: Tensor = self.model(images)
        return logits

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.layout.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def harden(self) -> None:
        """The model holds the deployed weights, exactly +-1 where they are binary."""
        self.layout.broadcast(self.model.buffers())
        with self._in_groups():
            self.optimizer.harden()
        spread(self._zero, self._stage)

    def soften(self) -> None:
        """The model holds w again."""
        with self._in_groups():
            self.optimizer.soften()
        spread(self._zero, self._stage)

    def latents(self) -> Iterator[Latent]:
        """The latents, each gathered from its shards when it is asked for."""
        for names, group in zip(self._names, self.optimizer.param_groups, strict=True):
            if group.get("quantizer") is not None:
                for name in names:
                    yield Latent(name, self._whole(name, self._latent_of), group["quantizer"], group["mu"])

    # State

    def state_dict(self) -> dict[str, Any]:
        """The state as `Engine.state_dict` has it, gathered parameter by parameter into the CPU's memory."""
        self.layout.broadcast(self.model.buffers())  # each process has gathered norm statistics of its own
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": list(names)}
            for group, names in zip(self.optimizer.param_groups, self._names, strict=True)
        ]
        return {
            "model": {
                name: self._whole(name, lambda shard: shard).cpu() if name in self._shapes else value.detach()
                for name, value in self.model.state_dict().items()
            },
            "optimizer": {
                "update": self.optimizer.update,
                "base": {"state": self._base_state(), "param_groups": groups},
                "latents": {latent.name: latent.w_star.cpu() for latent in self.latents()},
            },
            "scaler": None,
        }

    def _base_state(self) -> dict[str, dict[str, Any]]:
        """The base optimizer's state by name: entries as long as a shard are gathered, others taken as they are."""
        gathered: dict[str, dict[str, Any]] = {}
        for names, shards in zip(self._names, self._shards.groups, strict=True):
            for name in names:
                piece = self._shards.pieces[name]
                # A process that has nothing of the parameter gathers along: its shards have the same keys.
                near = shards[0] if piece is None else piece.shard
                state = self._state_of(near)
                values = {
                    key: self._whole(name, partial(self._entry, key)).cpu()
                    if _is_as_long(value, near.numel())
                    else value
                    for key, value in state.items()
                }
                if values:
                    gathered[name] = values
        return gathered

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state of any engine.

        Raises:
            ValueError: it is a state of another recipe.
        """
        saved, weights = state["optimizer"], state["model"]
        require_same_recipe(saved, self.optimizer, self._names)
        groups = self.optimizer.param_groups
        for group, theirs in zip(groups, saved["base"]["param_groups"], strict=True):
            group.update({key: value for key, value in theirs.items() if key != "params"})
        for names, shards in zip(self._names, self._shards.groups, strict=True):
            for name in names:
                self._put(name, saved["latents"].get(name, weights[name]), self._latent_of)
            for shard in shards:
                self._load_base(shard, names, saved["base"]["state"])
        for name, buffer in self.model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        with self._in_groups():
            self.optimizer.restore()
        spread(self._zero, self._stage)

    def _load_base(self, shard: Tensor, names: list[str], saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Gives a shard the base optimizer's state of the parameters that it has pieces of."""
        here = [name for name in names if (piece := self._shards.pieces[name]) is not None and piece.shard is shard]
        latent, state = self._latent_of(shard), self.optimizer.base.state
        state.pop(latent, None)
        # Of a shard that is all padding, any parameter of the group tells what is not spread: the number of steps.
        example = next((name for name in here or names if name in saved), None)
        if example is None:
            return
        state[latent] = {
            key: torch.zeros_like(latent) if _is_as_long(value, self._shapes[example].numel()) else copied(value)
            for key, value in saved[example].items()
        }
        for name in here:
            for key, value in saved.get(name, {}).items():
                if _is_as_long(value, self._shapes[name].numel()):
                    self._put(name, value, partial(self._entry, key))

    def _latent_of(self, shard: Tensor) -> Tensor:
        """What is trained for a shard: its latents, or itself where nothing is quantized."""
        return self.optimizer.trained(shard)

    def _state_of(self, shard: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.base.state.get(self._latent_of(shard), {})
        return state

    def _entry(self, key: str, shard: Tensor) -> Tensor:
        entry: Tensor = self._state_of(shard)[key]
        return entry

    def _whole(self, name: str, of: Callable[[Tensor], Tensor]) -> Tensor:
        """What `of` gives for the shards of a parameter, gathered to the parameter's shape. To the bit; collective."""
        shape, piece = self._shapes[name], self._shards.pieces[name]
        whole = torch.zeros(shape.numel(), device=self.layout.device)
        if piece is not None:
            part = of(piece.shard).detach().reshape(-1)[piece.at : piece.at + piece.length]
            whole[piece.start : piece.start + piece.length] = part
        if self._stage and self.layout.world_size > 1:
            distributed.all_reduce(whole.view(torch.int32))  # as integers: -0.0 + 0.0 would be 0.0
        return whole.view(shape)

    def _put(self, name: str, value: Tensor, of: Callable[[Tensor], Tensor]) -> None:
        """The inverse of `_whole`, for this process's piece."""
        piece = self._shards.pieces[name]
        if piece is not None:
            part = value.reshape(-1)[piece.start : piece.start + piece.length]
            of(piece.shard).detach().view(-1)[piece.at : piece.at + piece.length] = part.to(piece.shard.device)

    # Shards

    @contextmanager
    def _in_groups(self) -> Iterator[None]:
        """Inside, the groups list all shards, which stage 3 puts there one at a time, and only while it steps."""
        groups = self.optimizer.param_groups
        before = [group["params"] for group in groups]
        for group, shards in zip(groups, self._shards.groups, strict=True):
            group["params"] = shards
        try:
            yield
        finally:
            for group, parameters in zip(groups, before, strict=True):
                group["params"] = parameters


class _Collected(Optimizer):
    """Stands where DeepSpeed steps, and keeps a copy of each shard's gradient instead."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups, self.defaults, self.state = groups, {}, defaultdict(dict)
        super().__setstate__({})
        self._gradients: dict[Tensor, Tensor] = {}

    def step(self, _closure: object = None) -> None:  # type: ignore[override]
        """Keeps the gradients of the shards that the groups list now."""
        for group in self.param_groups:
            self._gradients |= {p: p.grad.clone() for p in group["params"] if p.grad is not None}

    def take(self) -> dict[Tensor, Tensor]:
        """Shard -> gradient, of this step."""
        gradients, self._gradients = self._gradients, {}
        return gradients


def _join(layout: Layout) -> None:
    """The process group that DeepSpeed wants, of one process, too."""
    # On a CPU its first use builds a kernel, with the ninja that lies beside python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.setdefault("LOCAL_RANK", "0")  # it asks for torchrun's, of a process on its own, too
    if not distributed.is_initialized():
        backend = "nccl" if layout.device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.*_tensor` is deprecated", FutureWarning)  # each time it does


def _is_as_long(value: Any, length: int) -> bool:  # noqa: ANN401  (an entry of a base optimizer's state)
    """Whether it goes along with `length` weights, number by number."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.numel() == length
