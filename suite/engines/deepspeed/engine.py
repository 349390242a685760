"""DeepSpeed ZeRO over the processes: sharded latents, optimizer state, gradients and parameters. Imports deepspeed.

ZeRO flattens each parameter group and gives every process a part of it, as float32 shards in the optimizer's groups.
Quantizers are scalar maps, so ProxConnect treats a shard like a parameter: it is created after ZeRO, reads w* from
the shards and writes w into them, and ZeRO distributes w like any weights (docs/decisions/006).

`settings` holds the configuration; `shards` reads ZeRO's undocumented internals.
"""

import json
import logging
import os
import sys
import warnings
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
from quantizers.groups import row_of
from suite.engines.deepspeed.settings import configuration
from suite.engines.deepspeed.shards import layout_of, spread
from suite.engines.process_group import Layout
from suite.engines.protocol import Latent, copied, require_agreement, require_same_recipe
from suite.recipe.settings import Execution, Training

log = logging.getLogger(__name__)


class DeepSpeedEngine:
    """The engine over `deepspeed.initialize`, with ProxConnect as its optimizer.

    Same numerics as the plain engine: float32 parameters and gradients, autocast for bf16, gradients averaged over
    processes and micro-batches. With gradient clipping, ProxConnect steps after DeepSpeed's own step, because the norm
    of B . grad needs all shards, which are complete only then; this costs one more gather of the weights per step.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        wrap: Callable[[Optimizer], ProxConnect],
        criterion: nn.Module,
        layout: Layout,
        training: Training,
        execution: Execution,
    ) -> None:
        """The quantized parameters of `base` hold w*. `wrap` makes ProxConnect from `base` once that lists shards."""
        self.model, self.criterion, self.layout = model, criterion, layout
        self.clip_grad_norm, self.bf16 = training.clip_grad_norm, training.precision == "bf16"
        parameters = dict(model.named_parameters())
        names = {parameter: name for name, parameter in parameters.items()}
        self._names = [[names[p] for p in group["params"]] for group in base.param_groups]
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        settings = configuration(training, execution, layout, sum(p.numel() for p in parameters.values()))
        self._micro_batch_size: int = settings["train_micro_batch_size_per_gpu"]
        self._stage: int = settings["zero_optimization"]["stage"]
        if layout.is_main:
            log.info("deepspeed configuration: %s", json.dumps(settings))
        _join(layout)
        self._base, self._stand_in = base, _StandIn(base)
        self._zero, *_ = deepspeed.initialize(model=model, optimizer=self._stand_in, config=settings)
        self._shards = layout_of(self._zero, self._stage, self._names, parameters)
        self._order = [shard for shards in self._shards.groups for shard in shards]
        with self._in_groups():
            self.optimizer = wrap(base)
        require_agreement(self.optimizer, layout)
        # ZeRO has the gradients in shards during the step of its optimizer.
        self._stand_in.step_shards = None if self.clip_grad_norm is not None else self.optimizer.step
        spread(self._zero, self._stage)

    def train_step(self, images: Tensor, labels: Tensor, soft: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Engine.train_step`."""
        size, num_images = self._micro_batch_size, len(labels)
        loss, logits = torch.zeros((), device=labels.device), []
        targets = (labels,) if soft is None else (labels, soft)
        for x, *y in zip(*(torch.split(each, size) for each in (images, *targets)), strict=True):
            with self._autocast():
                part_logits = self._zero(x)
                part_loss = self.criterion(part_logits, *y)
            self._zero.backward(part_loss)
            self._zero.step()
            loss += part_loss.detach() * (len(x) / num_images)
            logits.append(part_logits.detach())
        if self.clip_grad_norm is not None:
            self._clipped_step(self.clip_grad_norm)
        return loss, torch.cat(logits)

    @torch.no_grad()
    def _clipped_step(self, max_norm: float) -> None:
        gradients = self._stand_in.take()
        with self._in_groups():
            for shard, gradient in gradients.items():
                shard.grad = gradient
            self.optimizer.clip_grad_norm_(max_norm, self._sum if self._stage else None)
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
        """Puts the deployed weights into the model, exactly +-1 where they are binary."""
        self.layout.broadcast(self.model.buffers())
        with self._in_groups():
            self.optimizer.harden()
        spread(self._zero, self._stage)

    def soften(self) -> None:
        """Restores w."""
        with self._in_groups():
            self.optimizer.soften()
        spread(self._zero, self._stage)

    def latents(self) -> Iterator[Latent]:
        """The latents, each gathered on demand from its shards."""
        for names, group in zip(self._names, self.optimizer.param_groups, strict=True):
            if group.get("quantizer") is not None:
                for name in names:
                    yield Latent(name, self._whole(name, self.optimizer.latent), row_of(group), group["mu"])

    # State

    def weights(self) -> dict[str, Tensor]:
        """The current network, gathered parameter by parameter into the CPU's memory."""
        self.layout.broadcast(self.model.buffers())  # norm statistics differ between processes
        return {
            name: self._whole(name, lambda shard: shard).cpu() if name in self._shapes else value.detach()
            for name, value in self.model.state_dict().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The state described in `Engine.state_dict`, gathered parameter by parameter into the CPU's memory."""
        with self._in_groups():
            own = self.optimizer.state_dict()
        groups = [
            group | {"params": list(names)} for group, names in zip(own["param_groups"], self._names, strict=True)
        ]
        return {
            "model": self.weights(),
            "optimizer": {
                "update": self.optimizer.update,
                "state": self._gathered({s: own["state"].get(i, {}) for i, s in enumerate(self._order)}),
                "param_groups": groups,
            },
            "scaler": None,
        }

    def _gathered(self, states: Mapping[Tensor, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter: gathers entries as long as a shard, copies others unchanged."""
        gathered: dict[str, dict[str, Any]] = {}
        for names, shards in zip(self._names, self._shards.groups, strict=True):
            for name in names:
                piece = self._shards.pieces[name]
                # A process without a piece of the parameter joins the gather: its shards have the same keys.
                near = shards[0] if piece is None else piece.shard
                values = {
                    key: self._whole(name, partial(_entry, states, key)).cpu()
                    if _is_as_long(value, near.numel())
                    else value
                    for key, value in states[near].items()
                }
                if values:
                    gathered[name] = values
        return gathered

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a state of any engine.

        Raises:
            ValueError: the state belongs to another recipe.
        """
        saved, weights = state["optimizer"], state["model"]
        require_same_recipe(saved, self.optimizer, self._names)
        states: dict[int, dict[str, Any]] = {}
        for names, shards in zip(self._names, self._shards.groups, strict=True):
            for name in names:
                self._put(name, weights[name], lambda shard: shard)
            for shard in shards:
                if own := self._own_state(shard, names, saved["state"]):
                    states[_index_of(shard, self._order)] = own
        indices = iter(range(len(self._order)))
        groups = [
            group | {"params": [next(indices) for _ in shards]}
            for group, shards in zip(saved["param_groups"], self._shards.groups, strict=True)
        ]
        for name, buffer in self.model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        with self._in_groups():
            self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        spread(self._zero, self._stage)

    def _own_state(self, shard: Tensor, names: list[str], saved: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """A shard's part of the optimizer state, for the parameters it holds pieces of."""
        here = [name for name in names if (piece := self._shards.pieces[name]) is not None and piece.shard is shard]
        # A shard that is all padding takes its unsharded state (the step count) from any parameter of the group.
        example = next((name for name in here or names if name in saved), None)
        if example is None:
            return {}
        own = {
            key: torch.zeros_like(shard) if _is_as_long(value, self._shapes[example].numel()) else copied(value)
            for key, value in saved[example].items()
        }
        for name in here:
            for key, value in saved.get(name, {}).items():
                if _is_as_long(value, self._shapes[name].numel()):
                    self._put(name, value, partial(_entry, {shard: own}, key))
        return own

    def _whole(self, name: str, of: Callable[[Tensor], Tensor]) -> Tensor:
        """`of` applied to a parameter's shards, gathered to the parameter's shape. Bit-exact; collective."""
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
        """Makes the groups list all shards inside the block; ZeRO stage 3 lists one at a time, only during its step."""
        before = [group["params"] for group in self._base.param_groups]
        for group, shards in zip(self._base.param_groups, self._shards.groups, strict=True):
            group["params"] = shards
        try:
            yield
        finally:
            # Look the groups up again: loading a state replaces them.
            for group, parameters in zip(self._base.param_groups, before, strict=True):
                group["params"] = parameters


class _StandIn(Optimizer):
    """The optimizer that DeepSpeed steps: it steps ProxConnect, or copies each shard's gradient for a later step."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        super().__setstate__({})
        self.step_shards: Callable[[], Any] | None = None
        self._gradients: dict[Tensor, Tensor] = {}

    # The base's own groups, so that ProxConnect sees DeepSpeed's changes to them.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]  # noqa: ANN401  (torch's defaultdict)
        """The base's state."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's defaults."""
        return self.base.defaults

    def step(self, _closure: object = None) -> None:  # type: ignore[override]
        """Steps the shards that the groups currently list, or keeps copies of their gradients."""
        if self.step_shards is not None:
            self.step_shards()
            return
        for group in self.param_groups:
            self._gradients |= {p: p.grad.clone() for p in group["params"] if p.grad is not None}

    def take(self) -> dict[Tensor, Tensor]:
        """This step's gradients by shard; clears them."""
        gradients, self._gradients = self._gradients, {}
        return gradients


def _join(layout: Layout) -> None:
    """Creates the process group that DeepSpeed needs even for a single process."""
    # On a CPU, its first use builds a kernel with ninja, which is in the same folder as python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.setdefault("LOCAL_RANK", "0")  # needed even without torchrun
    if not distributed.is_initialized():
        backend = "nccl" if layout.device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.*_tensor` is deprecated", FutureWarning)  # one per call


def _is_as_long(value: Any, length: int) -> bool:  # noqa: ANN401  (an entry of a base optimizer's state)
    """Whether `value` is a tensor with one element for each of `length` weights."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.numel() == length


def _entry(states: Mapping[Tensor, Mapping[str, Any]], key: str, shard: Tensor) -> Tensor:
    entry: Tensor = states[shard][key]
    return entry


def _index_of(shard: Tensor, order: list[Tensor]) -> int:
    return next(index for index, each in enumerate(order) if each is shard)
