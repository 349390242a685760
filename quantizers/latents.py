"""Latents w* in memory: the parameters of a group share flat tensors, so that a step takes few operations.

A quantizer is a scalar map, and most base optimizers are elementwise as well. So a `Block` holds the w* of several
parameters end to end in one tensor, and F, B and the base optimizer each work on that one tensor. A parameter's w* and
its tensors in the base's state are views of the block's tensors, with the values of a separately stepped parameter.
"""

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from quantizers.catalog import Map

ELEMENTWISE = (SGD, Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, Adadelta, RMSprop, Rprop, ASGD)
"""Base optimizers that update each element independently, so several parameters can be stepped as one tensor.

Exactly these classes: a subclass may depend on a parameter's shape. All of them evaluate a closure once, at the start.
"""
CPU_BLOCK = 2**20
"""Maximum size of a shared block on a CPU, so that temporaries stay in cache. On a GPU one block holds the group."""

States = MutableMapping[Tensor, dict[str, Any]]
"""A base optimizer's state."""


@dataclass(eq=False)
class Entry:
    """A quantized parameter, its latents, the block that holds them, and how the parameter was last written."""

    parameter: Tensor
    latent: Tensor
    block: "Block"
    mu: float = 1.0
    """The sharpness that the parameter's current w was written with."""
    is_hard: bool = False
    """Whether the last write was the deployed value, sign(w*)."""
    stamp: tuple[int, int] = (-1, 0)

    def alone(self) -> "Block":
        """A block of only this entry, sharing its memory."""
        return self.block if not self.block.is_flat else Block(self.latent, [self])

    def sign_off(self, mu: float | None = None, *, is_hard: bool = False) -> None:
        """Record that the parameter holds the value we wrote, and its mu if given."""
        self.stamp, self.is_hard = _stamp(self.parameter), is_hard
        if mu is not None:
            self.mu = mu

    @property
    def was_written_by_others(self) -> bool:
        """Whether torch counted a write to the parameter, or its memory was replaced, since we last wrote it."""
        return self.stamp != _stamp(self.parameter)

    def still_holds(self, f: Map, name: str) -> bool:
        """Whether the parameter holds f(w*; mu) up to rounding; if so, the value counts as written by us.

        RuntimeError, with the parameter's name, if its device or shape has changed.
        """
        p, latent = self.parameter, self.latent
        if p.device != latent.device or p.shape != latent.shape:
            raise RuntimeError(
                f"{name} is {tuple(p.shape)} on {p.device}, its latents are {tuple(latent.shape)} on {latent.device}: "
                "make the optimizer after moving or reshaping the model"
            )
        rounding = 16 * torch.finfo(p.dtype).eps  # F computed in two ways, each with about ten roundings
        w = f(_local(latent), self.mu).to(p.dtype)
        same = torch.allclose(_local(p), w, rtol=rounding, atol=rounding, equal_nan=True)
        if same:
            self.sign_off(is_hard=self.is_hard)
        return same


def _stamp(parameter: Tensor) -> tuple[int, int]:
    # `parameter.data = other` changes the address but not the version; a DTensor has no address of its own.
    return parameter._version, parameter.data_ptr() if _is_plain(parameter) else 0  # noqa: SLF001  (torch's counter)


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor unchanged."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta


@dataclass(frozen=True)
class _Gradient:
    """A gradient, and its version when B . grad was computed from it."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, parameter: Tensor) -> "_Gradient":
        assert parameter.grad is not None  # noqa: S101  (checked before)
        return cls(parameter.grad, parameter.grad._version)  # noqa: SLF001

    def still_is_of(self, parameter: Tensor) -> bool:
        return parameter.grad is self.tensor and self.tensor._version == self.version  # noqa: SLF001


@dataclass(eq=False)
class Block:
    """The latents of `entries`: several parameters' end to end in the 1-D `w_star`, or one's in its own shape."""

    w_star: Tensor
    entries: list[Entry] = field(default_factory=list)
    _scratch: Tensor | None = None
    _parts: list[Tensor] = field(default_factory=list)
    _buffers: dict[str, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)
    _shared: dict[str, list[tuple[Any, int]]] = field(default_factory=dict)
    _product_of: list[_Gradient] = field(default_factory=list)
    _product_at: int = -1
    scale: Tensor | None = None
    """Factor still to be applied to the kept product."""

    @property
    def is_flat(self) -> bool:
        """Whether several parameters share the block."""
        return len(self.entries) > 1

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each entry's part of a tensor like `w_star`, in its parameter's shape, and its strides if they are dense."""
        if not self.is_flat:
            return [flat]
        found, at = [], 0
        for entry in self.entries:
            p = entry.parameter
            part = flat[at : at + p.numel()]
            found.append(part.as_strided(p.size(), p.stride()) if _is_dense(p) else part.view(p.size()))
            at += p.numel()
        return found

    def scratch(self) -> tuple[Tensor, list[Tensor]]:
        """A reused tensor like `w_star`, for gradients and then for w, and its `views`."""
        if self._scratch is None:
            self._scratch = torch.zeros_like(self.w_star)
            self._parts = self.views(self._scratch)
        return self._scratch, self._parts

    def write(self, entries: Sequence[Entry], f: Map, mu: float | None, *, is_hard: bool = False) -> None:
        """Write f(w*; mu) into the entries' parameters; mu=None reuses the mu of each parameter's last write."""
        self.drop_product()
        by_mu: dict[float, list[Entry]] = {}
        for entry in entries:
            by_mu.setdefault(entry.mu if mu is None else mu, []).append(entry)
        for each, own in by_mu.items():
            if self.is_flat:
                scratch, parts = self.scratch()
                # The whole block even for some of its entries: torch's last bits depend on an element's position.
                scratch.copy_(f(self.w_star, each))
                part_of = dict(zip(self.entries, parts, strict=True))
                torch._foreach_copy_([entry.parameter for entry in own], [part_of[entry] for entry in own])
            else:
                own[0].parameter.copy_(f(self.w_star, each))
            for entry in own:
                entry.sign_off(each, is_hard=is_hard)

    # Gradients

    def take_product(self, backward: Map) -> Tensor:
        """B(w*) . grad of all entries, shaped like `w_star`; uses the kept product if it is still valid."""
        if self.has_product():
            product = self.scratch()[0]
            if self.scale is not None:
                product.mul_(self.scale)
            self.drop_product()
            return product
        self.drop_product()
        mu = self.entries[0].mu
        gradients = [entry.parameter.grad for entry in self.entries if entry.parameter.grad is not None]
        if not self.is_flat:
            return backward(self.w_star, mu) * gradients[0]
        product, parts = self.scratch()
        torch._foreach_copy_(parts, gradients)
        return product.mul_(backward(self.w_star, mu))

    def keep_product(self, product: Tensor, scale: Tensor) -> None:
        """Keep `product`, times `scale`, for the next step, unless a gradient or w* changes before it."""
        scratch, _ = self.scratch()
        if product is not scratch:
            if product.layout != torch.strided:
                return  # the step computes it again
            scratch.copy_(product)
        self.scale = scale
        self._product_of = [_Gradient.of(entry.parameter) for entry in self.entries]
        self._product_at = self.w_star._version  # noqa: SLF001  (shared with its views)

    def has_product(self) -> bool:
        """Whether the scratch holds B(w*) . grad of the current w* and gradients."""
        return (
            bool(self._product_of)
            and self._product_at == self.w_star._version  # noqa: SLF001
            and all(
                gradient.still_is_of(entry.parameter)
                for gradient, entry in zip(self._product_of, self.entries, strict=True)
            )
        )

    def drop_product(self) -> None:
        """Discard the kept product. Call before writing the scratch or the latents."""
        self._product_of, self.scale = [], None

    # The base's state

    def gathered(self, states: States) -> "list[Block]":
        """The blocks to step: this one, if its entries' state can be joined in `states`; else one block per entry.

        The entries' elementwise tensors become views of one tensor, without a copy if they already are. Their scalars
        (step counts) must be equal; they are not if the parameters were not always stepped together.
        """
        if not self.is_flat:
            return [self]
        found = [states.get(entry.latent) or {} for entry in self.entries]
        columns = {key: [state.get(key) for state in found] for key in found[0]}
        if any(state.keys() != columns.keys() for state in found) or not all(
            self._is_elementwise(column) or self._is_equal(key, column) for key, column in columns.items()
        ):
            return [entry.alone() for entry in self.entries]
        whole: dict[str, Any] = {}
        for key, column in columns.items():
            if self._is_elementwise(column):
                whole[key] = self._joined(key, column)
                self._give(found, key, self._buffers[key][1])
            else:
                whole[key] = column[0].clone() if isinstance(column[0], Tensor) else column[0]
        if whole:
            states[self.w_star] = whole
        return [self]

    def scatter(self, states: States) -> None:
        """Distribute the base's state of the block's tensor to the entries, as views and equal scalars."""
        if not self.is_flat:
            return
        whole = states.pop(self.w_star, {})
        found = [states[entry.latent] for entry in self.entries]
        for key in found[0].keys() - whole.keys():
            for state in found:
                del state[key]
        for key, value in whole.items():
            if not isinstance(value, Tensor):
                self._give(found, key, [value] * len(found))
            elif value.shape == self.w_star.shape:
                if key not in self._buffers or self._buffers[key][0] is not value:
                    self._buffers[key] = (value, self.views(value))
                self._give(found, key, self._buffers[key][1])
            else:
                column = [state[key] if key in state else torch.empty_like(value) for state in found]
                torch._foreach_copy_(column, [value] * len(column))
                self._give(found, key, column)
                self._shared[key] = [(each, each._version) for each in column]  # noqa: SLF001

    def forget(self, states: States) -> None:
        """After a failed step, remove the state that `gathered` added to the base's."""
        if self.is_flat:
            states.pop(self.w_star, None)

    @staticmethod
    def _give(states: Sequence[dict[str, Any]], key: str, column: Sequence[Any]) -> None:
        for state, value in zip(states, column, strict=True):
            state[key] = value

    def _is_elementwise(self, column: Sequence[Any]) -> bool:
        return all(
            isinstance(value, Tensor) and value.shape == entry.latent.shape and value.ndim > 0
            for value, entry in zip(column, self.entries, strict=True)
        )

    def _is_equal(self, key: str, column: Sequence[Any]) -> bool:
        if not isinstance(column[0], Tensor):
            return all(not isinstance(value, Tensor) and value == column[0] for value in column)
        if any(not isinstance(value, Tensor) or value.ndim for value in column):
            return False
        known = self._shared.get(key, [])
        # Unchanged since `scatter` made them equal, so there is no need to read values that may be on a GPU.
        if len(known) == len(column) and all(
            value is each and value._version == version  # noqa: SLF001
            for value, (each, version) in zip(column, known, strict=True)
        ):
            return True
        return len({value.item() for value in column}) == 1

    def _joined(self, key: str, column: Sequence[Any]) -> Tensor:
        buffer, views = self._buffers.get(key, (None, ()))
        if buffer is not None and all(value is view for value, view in zip(column, views, strict=True)):
            return buffer
        buffer = torch.empty_like(self.w_star, dtype=column[0].dtype)
        fresh = self.views(buffer)
        torch._foreach_copy_(fresh, list(column))
        self._buffers[key] = (buffer, fresh)
        return buffer


def by_block(entries: Iterable[Entry]) -> Iterator[tuple[Block, list[Entry]]]:
    """The blocks of the given entries, in the order of their first entries, each with its given entries."""
    found: dict[Block, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.block, []).append(entry)
    yield from found.items()


def with_gradients(entries: Iterable[Entry]) -> Iterator[Block]:
    """Blocks of the entries that have a gradient.

    A shared block if all its entries have dense gradients and the same mu; otherwise one block per entry.
    """
    for block, own in by_block(entries):
        moving = [entry for entry in own if entry.parameter.grad is not None]
        is_whole = (
            len(moving) == len(block.entries)
            and len({entry.mu for entry in moving}) == 1
            and all(g is not None and g.layout == torch.strided for g in (e.parameter.grad for e in moving))
        )
        yield from [block] if is_whole else [entry.alone() for entry in moving]


def entries_of(parameters: Iterable[Tensor], values: Iterable[Tensor], *, joined: bool) -> Iterator[Entry]:
    """Entries whose latents are copies of `values`, in float32 or better; several share a block if `joined`."""
    for block in _blocks(parameters, values, joined=joined):
        yield from block.entries


def _blocks(parameters: Iterable[Tensor], values: Iterable[Tensor], *, joined: bool) -> Iterator[Block]:
    open_blocks: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for p, value in zip(parameters, values, strict=True):
        dtype = torch.promote_types(value.dtype, torch.float32)
        if not joined or not _is_plain(p) or (p.is_cpu and p.numel() > CPU_BLOCK):
            yield _alone(p, value.detach().to(dtype, copy=True))
            continue
        waiting = open_blocks.setdefault((p.device, dtype), [])
        if p.is_cpu and sum(other.numel() for other, _ in waiting) + p.numel() > CPU_BLOCK:
            yield _together(waiting, dtype)
            waiting.clear()
        waiting.append((p, value))
    for (_, dtype), waiting in open_blocks.items():
        yield _together(waiting, dtype)


def _alone(p: Tensor, latent: Tensor) -> Block:
    block = Block(latent)
    block.entries.append(Entry(p, latent, block))
    return block


def _together(members: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Block:
    if len(members) == 1:
        ((p, value),) = members
        return _alone(p, value.detach().to(dtype, copy=True))
    block = Block(torch.empty(sum(p.numel() for p, _ in members), dtype=dtype, device=members[0][0].device))
    block.entries += [Entry(p, block.w_star, block) for p, _ in members]
    for entry, view, (_, value) in zip(block.entries, block.views(block.w_star), members, strict=True):
        entry.latent = view.copy_(value.detach())
    return block


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill memory without gaps or overlaps, in any order."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def is_elementwise(base: Optimizer) -> bool:
    """Whether `base` can step several parameters as one tensor."""
    return type(base) in ELEMENTWISE
