"""The fused PC++ step: one pass of compiled C++ over w*, the gradient, the base's state and w. Start here.

    v <- base(w*, B(w*; written mu) . grad),  w* <- v (or clip(v)),  w <- F(w*; mu)        each element read once

For SGD with momentum, a step must move at least 24 bytes per float32 element (w*, gradient and momentum in; w*,
momentum and w out), and this one moves 24. `maps.h` and `fused.h` contain the arithmetic, `native` compiles it, and
`passes` packs a group's tensors for it. This file decides which groups are fused. It keeps the base optimizer's state
under torch's own keys, in its dtypes and layouts, so that fused and eager steps can continue from each other.

`ProxConnect(fused=None)` fuses on the CPU from MIN_ELEMENTS latents up. The choice depends on sizes, never on timing,
so a resumed run makes the same choice. `fused=True` raises, with the reason given by `obstacle`, if the fused step is
unavailable; `fused=False` uses the eager step. The fused step runs on a CPU and requires:

    - update pc++, around exactly torch's SGD or AdamW, without step hooks on the base;
    - options that this file knows, as numbers, without dampening, maximize, differentiable, amsgrad or capturable;
    - maps that maps.h implements (all of the catalogue's);
    - float32 latents, with float32 or bfloat16 parameters and dense gradients of the parameter's dtype.

The F of maps.h and the F of torch's operations differ in the last bits. So if a parameter can be fused, every write of
its w uses maps.h: after a step, when a state is loaded, and when a hardened model is softened.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import optimizer as hooks

from quantizers import maps
from quantizers.catalog import Map, Quantizer
from quantizers.fused import native, passes
from quantizers.latents import Block, Entry, States, by_block

MIN_ELEMENTS = 2**16

_BASES: dict[type[Optimizer], str] = {SGD: "sgd", AdamW: "adamw"}
_NUMBERS = {"sgd": ("lr", "momentum", "weight_decay"), "adamw": ("lr", "weight_decay", "eps")}
_MUST_BE_OFF = {
    "sgd": ("dampening", "maximize", "differentiable"),
    "adamw": ("amsgrad", "maximize", "differentiable", "capturable"),
}
_IMMATERIAL = {"nesterov", "betas", "foreach", "fused", "decoupled_weight_decay"}
"""Options that the fused step reads elsewhere, or may ignore because they only select torch's implementation."""


def is_wanted(fused: bool | None, base: Optimizer, latents: Iterable[Tensor]) -> bool:
    """Whether to fuse: the base can be fused, and `fused` is True, or None with enough latents, all on the CPU."""
    if type(base) not in _BASES:
        return False
    if fused is None:
        listed = list(latents)
        return sum(latent.numel() for latent in listed) >= MIN_ELEMENTS and all(latent.is_cpu for latent in listed)
    return fused


def obstacle(
    base: Optimizer, update: str, group: Mapping[str, Any], quantizer: Quantizer, entries: Sequence[Entry]
) -> str | None:
    """Why the group cannot be fused with its current options and gradients, in one sentence; None if it can."""
    if type(base) not in _BASES:
        return f"the base is {type(base).__name__}, not exactly torch's SGD or AdamW"
    if update != "pc++":
        return f"the update is {update}, not pc++"
    if _has_step_hooks(base):
        return "a step hook is registered on the base optimizer"
    reasons = (_obstacle_of(quantizer, entry) for entry in entries)
    return _obstacle_in(base, group) or next((reason for reason in reasons if reason), None)


def _obstacle_in(base: Optimizer, group: Mapping[str, Any]) -> str | None:
    name = _BASES[type(base)]
    known = {*_NUMBERS[name], *_MUST_BE_OFF[name], *_IMMATERIAL}
    if new := sorted(base.defaults.keys() - known):
        return f"this version of torch has options that the fused step does not know: {', '.join(new)}"
    if on := [key for key in _MUST_BE_OFF[name] if group.get(key)]:
        return f"{on[0]}={group[on[0]]} is not supported"
    options = {key: group[key] for key in _NUMBERS[name]} | dict(enumerate(group.get("betas", ())))
    if odd := [key for key, value in options.items() if not isinstance(value, int | float)]:
        return f"{odd[0]} is not a Python number"
    return None


def _obstacle_of(quantizer: Quantizer, entry: Entry) -> str | None:
    gradient, dtype = entry.parameter.grad, entry.parameter.dtype
    if misfit := _misfit(quantizer, entry):
        return misfit
    if pair_of(quantizer, entry) is None:
        return native.failure()
    if gradient is not None and (gradient.layout != torch.strided or gradient.dtype != dtype):
        return f"a gradient is {gradient.layout} {gradient.dtype}, not dense {dtype}"
    return None


def _misfit(quantizer: Quantizer, entry: Entry) -> str | None:
    """Why no pass can write the parameter, in words; None if one can (once compiled)."""
    parameter, latent = entry.parameter, entry.latent
    if quantizer.scale != "none":
        return f"scale {quantizer.scale!r} takes the mean of a parameter's latents before the first of them is written"
    if not {_name(quantizer.forward), _name(quantizer.backward)} <= passes.MAP_NAMES:
        return f"the maps of {quantizer.name} are not in maps.h"
    if type(latent) is not Tensor or not latent.is_cpu or parameter.device != latent.device:
        return f"a parameter is a {type(parameter).__name__} on {parameter.device}, not a plain tensor on a CPU"
    if latent.dtype != torch.float32 or parameter.dtype not in passes.DTYPES:
        return f"a parameter is {parameter.dtype}, not float32 or bfloat16"
    # Latents have no gaps in memory, so a parameter with the same strides has none either.
    if parameter.stride() != latent.stride():
        return "a parameter's memory has gaps, or is in another order than its latents'"
    return None


def pair_of(quantizer: Quantizer, entry: Entry) -> passes.Pair | None:
    """The compiled maps that write the parameter's w, however it is stepped; None if torch's operations write it."""
    if _misfit(quantizer, entry) is not None:
        return None
    return native.pair(_name(quantizer.forward), _name(quantizer.backward))


def _name(each: Map) -> str:
    """The name of a map defined in `maps`; "" for any other map."""
    name = getattr(each, "__name__", "")
    return name if getattr(maps, name, None) is each else ""


def _has_step_hooks(base: Optimizer) -> bool:
    watched = (
        base._optimizer_step_pre_hooks,  # noqa: SLF001  (torch has no public accessor)
        base._optimizer_step_post_hooks,  # noqa: SLF001
        hooks._global_optimizer_pre_hooks,  # noqa: SLF001
        hooks._global_optimizer_post_hooks,  # noqa: SLF001
    )
    return any(watched)


def write(quantizer: Quantizer, entries: Sequence[Entry], mu: float | None) -> None:
    """Write w = F(w*; mu) into the entries' parameters; mu=None reuses the mu of each parameter's last write."""
    for entry in entries:
        entry.block.drop_product()
        written = entry.mu if mu is None else mu
        _pair(quantizer, entry).run(
            passes.Batch([entry.latent], weights=[entry.parameter], mu=written), passes.Move("write")
        )
        entry.sign_off(written)


def take_product(quantizer: Quantizer, block: Block) -> Tensor:
    """B(w*) . grad of a block whose entries all have gradients, computed in the block's scratch."""
    product, parts = block.scratch()
    latents = [entry.latent for entry in block.entries]
    batch = passes.Batch(
        latents,
        gradients=[_gradient(entry) for entry in block.entries],
        weights=[entry.parameter for entry in block.entries],
        products=parts,
        written_mus=[entry.mu for entry in block.entries],
    )
    _pair(quantizer, block.entries[0]).run(batch, passes.Move("product"))
    return product


def step(
    base: Optimizer,
    group: Mapping[str, Any],
    quantizer: Quantizer,
    entries: Sequence[Entry],
    *,
    clip_latents: bool,
) -> None:
    """Step the group: update w*, the base's state and w of parameters with a gradient; rewrite w of the others."""
    write(quantizer, [entry for entry in entries if entry.parameter.grad is None], group["mu"])
    moving = [entry for entry in entries if entry.parameter.grad is not None]
    move = _sgd if type(base) is SGD else _adamw
    for block, with_product in _by_product(moving):
        latents = [entry.latent for entry in with_product]
        batch = passes.Batch(
            latents,
            gradients=[] if block else [_gradient(entry) for entry in with_product],
            weights=[entry.parameter for entry in with_product],
            products=block.scratch()[1] if block else [],
            written_mus=[entry.mu for entry in with_product],
            mu=group["mu"],
            scale=1.0 if block is None or block.scale is None else block.scale.item(),
            clip_latents=clip_latents and quantizer.binary,
        )
        _pair(quantizer, with_product[0]).run(batch, move(group, base.state, latents))
        if block:
            block.drop_product()
    for entry in moving:
        entry.sign_off(group["mu"])


def _by_product(moving: Sequence[Entry]) -> list[tuple[Block | None, list[Entry]]]:
    """The blocks that keep B . grad of the current gradients, with their entries; then all other entries together."""
    whole = [block for block, own in by_block(moving) if len(own) == len(block.entries)]
    kept = [block for block in whole if block.has_product()]
    others = [entry for entry in moving if entry.block not in kept]
    found: list[tuple[Block | None, list[Entry]]] = [(block, block.entries) for block in kept]
    return found + ([(None, others)] if others else [])


def _sgd(group: Mapping[str, Any], states: States, latents: Sequence[Tensor]) -> passes.Move:
    if not group["momentum"]:
        return passes.Move("sgd", group["lr"], group["weight_decay"])
    return passes.Move(
        "nesterov" if group["nesterov"] else "momentum",
        group["lr"],
        group["weight_decay"],
        # torch's first buffer is the first direction, which momentum . 0 + direction equals.
        first=[_state(states[latent], "momentum_buffer", latent) for latent in latents],
        momentum=group["momentum"],
    )


def _adamw(group: Mapping[str, Any], states: States, latents: Sequence[Tensor]) -> passes.Move:
    beta1, beta2 = group["betas"]
    steps = []
    for latent in latents:
        state = states[latent]
        if not state:
            state["step"] = torch.tensor(0.0)
        state["step"] += 1
        steps.append(state["step"].item())
    return passes.Move(
        "adamw",
        group["lr"],
        group["weight_decay"],
        first=[_state(states[latent], "exp_avg", latent) for latent in latents],
        second=[_state(states[latent], "exp_avg_sq", latent) for latent in latents],
        step_sizes=[group["lr"] / (1 - beta1**step) for step in steps],
        root_corrections=[(1 - beta2**step) ** 0.5 for step in steps],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
    )


def _state(state: dict[str, Any], name: str, latent: Tensor) -> Tensor:
    """The base's tensor of that name, created as zeros if missing, with its elements in the latent's order."""
    value = state.get(name)
    state[name] = torch.zeros_like(latent) if value is None else _laid_out_as(latent, value)
    laid_out: Tensor = state[name]
    return laid_out


def _gradient(entry: Entry) -> Tensor:
    assert entry.parameter.grad is not None  # noqa: S101  (entries without one are not stepped)
    return _laid_out_as(entry.latent, entry.parameter.grad)


def _laid_out_as(latent: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose elements are in the latent's order."""
    if tensor.stride() == latent.stride():
        return tensor
    return torch.empty_like(latent, dtype=tensor.dtype).copy_(tensor)


def _pair(quantizer: Quantizer, entry: Entry) -> passes.Pair:
    pair = pair_of(quantizer, entry)
    assert pair is not None  # noqa: S101  (checked before)
    return pair
