"""One pass of pc++ over w*, the gradient, the base's state and w, in place of the dozen that torch's operations make.

    v <- base(w*, B(w*; written mu) . grad),  w* <- v (or clip(v)),  w <- F(w*; mu)        each element read once

For SGD with momentum 24 bytes of each float32 element have to move (w*, gradient and momentum in; w*, momentum and w
out), and 24 do. The arithmetic is in maps.h and fused.h; here are the rule when it is used and the state that it needs,
which is the base optimizer's own: the same keys, dtypes and layouts, so that either way of stepping goes on from
what the other has left.

The rule. `ProxConnect(fused=True)` and `fused=False` are what they say. By itself (None) a ProxConnect is fused if its
latents are on the CPU and have at least MIN_ELEMENTS elements together: sizes decide and never a clock, so that a
resumed run steps as it did. A GPU waits for fused=True until somebody has run `tests/quantizers/test_fused_on_gpu.py`
on one, which nobody has. In either case these alone are fused, and all else is stepped by torch's operations:

    - update pc++, a step without a closure, a base of exactly torch's SGD or AdamW without hooks on its steps;
    - options that are numbers, without dampening, maximize, differentiable, amsgrad or capturable;
    - on a GPU, AdamW without its own `fused`, which counts steps in the GPU's memory;
    - maps that maps.h has (all of the catalogue);
    - float32 latents, a group's all on the CPU or on one GPU; float32 or bfloat16 parameters beside them with dense
      gradients of their dtype.

F of maps.h and F of torch's operations differ in last bits: so where the maps and the tensors are as the rule says,
whatever writes w writes it with maps.h, be it a step, a state that is loaded, or a hardened model that is softened.

Where g++ or, for a GPU, NVRTC is missing or fails there is one warning, and torch's operations step.
"""

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import optimizer as hooks

from quantizers import maps
from quantizers.fused import native, passes
from quantizers.catalog import Map
from quantizers.groups import Entry

MIN_ELEMENTS = 2**16

_BASES: dict[type[Optimizer], str] = {SGD: "sgd", AdamW: "adamw"}
_NUMBERS = {"sgd": ("lr", "momentum", "weight_decay"), "adamw": ("lr", "weight_decay", "eps")}
_MUST_BE_OFF = {
    "sgd": ("dampening", "maximize", "differentiable"),
    "adamw": ("amsgrad", "maximize", "differentiable", "capturable"),
}


_States = MutableMapping[Tensor, dict[str, Any]]


def is_wanted(fused: bool | None, base: Optimizer, latents: Mapping[Tensor, Tensor]) -> bool:
    """The rule's first part: a base that can be fused, and the switch, or by itself latents that are many enough."""
    if fused is None:
        num_elements = sum(latent.numel() for latent in latents.values())
        fused = num_elements >= MIN_ELEMENTS and all(latent.is_cpu for latent in latents.values())
    return type(base) in _BASES and fused


def pair_of(entry: Entry) -> passes.Pair | None:
    """What writes the parameter's w, whichever way it is stepped; None where torch's operations do."""
    parameter, latent = entry.parameter, entry.latent
    forward, backward = _name(entry.quantizer.forward), _name(entry.quantizer.backward)
    fits = (
        latent.dtype == torch.float32
        and parameter.dtype in passes.DTYPES
        and parameter.device == latent.device
        # A latent is without gaps, being our own: so is what has its strides.
        and parameter.stride() == latent.stride()
        and {forward, backward} <= passes.maps()
    )
    return native.pair(forward, backward) if fits and latent.is_cpu else None


def _name(each: Map) -> str:
    """The name of one of `maps`, "" for any other map."""
    name = getattr(each, "__name__", "")
    return name if getattr(maps, name, None) is each else ""


def has_plain_steps(base: Optimizer) -> bool:
    """Whether nobody watches the base's steps."""
    watched = (
        base._optimizer_step_pre_hooks,  # noqa: SLF001  (torch has no question that asks for them)
        base._optimizer_step_post_hooks,  # noqa: SLF001
        hooks._global_optimizer_pre_hooks,  # noqa: SLF001
        hooks._global_optimizer_post_hooks,  # noqa: SLF001
    )
    return not any(watched)


def steps(base: Optimizer, group: Mapping[str, Any], entries: Sequence[Entry]) -> bool:
    """Whether the group is stepped in one pass, `is_wanted` and `has_plain_steps` given."""
    gradients = [entry.parameter.grad for entry in entries]
    dtypes = {gradient.dtype for gradient in gradients if gradient is not None}
    devices = {entry.latent.device for entry in entries}
    name = _BASES[type(base)]
    numbers = [group[key] for key in _NUMBERS[name]] + list(group.get("betas", ()))
    return (
        len(dtypes) == len(devices) == 1
        and all(gradient is None or _is_dense_on(gradient, devices) for gradient in gradients)
        and all(isinstance(number, int | float) for number in numbers)
        and not any(group.get(key) for key in _MUST_BE_OFF[name])
        and not (name == "adamw" and group.get("fused") and entries[0].latent.is_cuda)
        and all(entry.parameter.dtype in dtypes and pair_of(entry) is not None for entry in entries)
    )


def _is_dense_on(gradient: Tensor, devices: Collection[torch.device]) -> bool:
    return gradient.device in devices and gradient.layout == torch.strided


def write(entry: Entry, mu: float) -> None:
    """Write w = F(w*; mu) with the entry's pair."""
    pair = pair_of(entry)
    assert pair is not None  # noqa: S101  (asked before)
    pair.write(entry.latent, entry.parameter, mu)


def step(base: Optimizer, group: Mapping[str, Any], entries: Sequence[Entry], *, clip_latents: bool) -> None:
    """Step the group: w*, the base's state and w of parameters with a gradient; w of those without one."""
    moving = [entry for entry in entries if entry.parameter.grad is not None]
    for entry in entries:
        if entry.parameter.grad is None:
            write(entry, group["mu"])
    latents = [entry.latent for entry in moving]
    batch = passes.Batch(
        w_star=latents,
        gradients=[_laid_out_as(entry.latent, _gradient(entry)) for entry in moving],
        weights=[entry.parameter for entry in moving],
        written_mus=[entry.mu for entry in moving],
        mu=group["mu"],
        clip_latents=clip_latents and moving[0].quantizer.binary,
    )
    pair = pair_of(moving[0])
    assert pair is not None  # noqa: S101  (asked before)
    move = _sgd if type(base) is SGD else _adamw
    pair.step(batch, move(group, base.state, latents))


def _sgd(group: Mapping[str, Any], states: _States, latents: Sequence[Tensor]) -> passes.Move:
    if not group["momentum"]:
        return passes.Move("sgd", group["lr"], group["weight_decay"])
    return passes.Move(
        "nesterov" if group["nesterov"] else "momentum",
        group["lr"],
        group["weight_decay"],
        # torch's first buffer is the first direction: so is momentum . 0 + that.
        first=[_state(states[latent], "momentum_buffer", latent) for latent in latents],
        momentum=group["momentum"],
    )


def _adamw(group: Mapping[str, Any], states: _States, latents: Sequence[Tensor]) -> passes.Move:
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
    """The base's tensor of that name, made of zeros if there is none yet, with its elements in the latent's order."""
    value = state.get(name)
    state[name] = torch.zeros_like(latent) if value is None else _laid_out_as(latent, value)
    laid_out: Tensor = state[name]
    return laid_out


def _gradient(entry: Entry) -> Tensor:
    assert entry.parameter.grad is not None  # noqa: S101  (those without are not moved)
    return entry.parameter.grad


def _laid_out_as(latent: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it in the order of the latent's elements."""
    if tensor.stride() == latent.stride():
        return tensor
    return torch.empty_like(latent, dtype=tensor.dtype).copy_(tensor)


@contextmanager
def set_aside(groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Inside, the groups list no parameters."""
    before = [list(group["params"]) for group in groups]
    for group in groups:
        group["params"][:] = []
    try:
        yield
    finally:
        for group, parameters in zip(groups, before, strict=True):
            group["params"][:] = parameters
