"""Parameter groups that name a quantizer, {"params": [...], "quantizer": "bnn++", "mu": 2.0}, and their saved state."""

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from quantizers.catalog import Quantizer, get
from quantizers.latents import Entry, States
from quantizers.scales import require_channels
from quantizers.sharpness import require_sharpness

Entries = Mapping[Tensor, Entry]
"""Quantized parameter -> its entry."""


def is_quantized(group: Mapping[str, Any]) -> bool:
    """Whether the group names a quantizer; other groups are left to the base optimizer."""
    return group.get("quantizer") is not None


def row_of(group: Mapping[str, Any]) -> Quantizer:
    """The row that the quantized group names, with its scale."""
    return get(group["quantizer"]).scaled(group.get("scale", "none"))


def require_trainable(group: Mapping[str, Any], *, clip_latents: bool = False) -> None:
    """Refuse a group that ProxConnect cannot train.

    Raises:
        ValueError: an unknown quantizer or scale; a mu that is negative or not finite; differentiable=True;
            clip_latents with a scale; scale "channel" for a parameter without channels; a scale for a DTensor, whose
            shards would each have their own.
        TypeError: a parameter is not of a real floating dtype.
    """
    if not is_quantized(group):
        return
    row = row_of(group)
    require_sharpness(group.get("mu", 1.0))
    if group.get("differentiable"):
        raise ValueError("differentiable=True: B . grad is not differentiated, so gradients through a step would stop")
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(f"a quantized parameter has a real floating dtype, not {p.dtype}")
        if row.scale != "none" and clip_latents:
            raise ValueError(
                f"clip_latents: latents with scale {row.scale!r} are in units of the weights; leave it out"
            )
        if row.scale != "none" and hasattr(p, "to_local"):
            raise ValueError(f"scale {row.scale!r}: not supported for DTensors (FSDP); use scale none")
        require_channels(p, row.scale)


def named(group: Mapping[str, Any], number: int) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) for each parameter of group `number`; a position serves as name if the group has no names."""
    names = group.get("param_names") or [
        f"parameter {index} of group {number}" for index in range(len(group["params"]))
    ]
    return zip(names, group["params"], strict=True)


@contextmanager
def listed(base: Optimizer, listing: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """Within this context, the base's groups list these tensors.

    Not p.data = w*: giving a bfloat16 parameter float32 data drops the gradient hooks that DDP put on it.
    """
    # In place: LBFGS keeps a reference to the list.
    lists = [group["params"] for group in base.param_groups]
    before = [list(tensors) for tensors in lists]
    for tensors, others in zip(lists, listing, strict=True):
        tensors[:] = others
    try:
        yield
    finally:
        for tensors, originals in zip(lists, before, strict=True):
            tensors[:] = originals


class StateByParameter(MutableMapping[Tensor, dict[str, Any]]):
    """A base optimizer's state keyed by parameters, although the base itself keys it by latents."""

    def __init__(self, states: States, entries: Entries) -> None:
        self._states, self._entries = states, entries

    def _key(self, parameter: Tensor) -> Tensor:
        return self._entries[parameter].latent if parameter in self._entries else parameter

    def __getitem__(self, parameter: Tensor) -> dict[str, Any]:
        """The base's own dictionary, which may be written to; created empty if missing, as in torch."""
        return self._states[self._key(parameter)]

    def __setitem__(self, parameter: Tensor, state: dict[str, Any]) -> None:
        self._states[self._key(parameter)] = state

    def __delitem__(self, parameter: Tensor) -> None:
        del self._states[self._key(parameter)]

    def __contains__(self, parameter: object) -> bool:
        return isinstance(parameter, Tensor) and self._key(parameter) in self._states

    def __iter__(self) -> Iterator[Tensor]:
        parameters = {entry.latent: parameter for parameter, entry in self._entries.items()}
        return iter([parameters.get(key, key) for key in self._states])

    def __len__(self) -> int:
        return len(self._states)


def saved(groups: Iterable[dict[str, Any]], state: StateByParameter, entries: Entries, update: str) -> dict[str, Any]:
    """The dictionary that `ProxConnect.state_dict` returns, before hooks."""
    parameters = dict.fromkeys(p for group in groups for p in group["params"])
    index_of = {p: index for index, p in enumerate(parameters)}
    states: dict[int, dict[str, Any]] = {}
    for p, index in index_of.items():
        own = {"w_star": entries[p].latent, "mu": entries[p].mu} if p in entries else {}
        if own or p in state:
            states[index] = {**own, **state[p]}
    packed = [
        {**group, "params": [index_of[p] for p in group["params"]]}
        | (
            {"quantizer": _written(group), "scale": row_of(group).scale, "update": update}
            if is_quantized(group)
            else {}
        )
        for group in groups
    ]
    return {"state": states, "param_groups": packed}


def require_same(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], entries: Entries, update: str) -> None:
    """ValueError unless the state matches these groups: their sizes, quantizers, scales, latent shapes and update."""
    if missing := sorted({"state", "param_groups"} - set(state)):
        raise ValueError(f"not a state of an optimizer: it has no {', '.join(missing)}")
    theirs: Sequence[Mapping[str, Any]] = state["param_groups"]
    latents = [
        [state["state"].get(index, {}).get("w_star") for index in group["params"]] if is_quantized(group) else []
        for group in theirs
    ]
    shapes = [[tuple(entries[p].latent.shape) for p in group["params"] if p in entries] for group in groups]
    updates = [group.get("update", update) for group in theirs if is_quantized(group)]
    scales = [
        [group.get("scale", "none") if is_quantized(group) else None for group in theirs],
        [row_of(group).scale if is_quantized(group) else None for group in groups],
    ]
    if any(latent is None for each in latents for latent in each):
        raise ValueError("the state is a plain torch optimizer's: it has no latents, w_star")
    for what, there, here in (
        ("quantizers of the groups", [_written(group) for group in theirs], [_written(group) for group in groups]),
        ("scales of the groups", *scales),
        ("updates", updates, [update] * len(updates)),
        ("parameters in the groups", [len(g["params"]) for g in theirs], [len(g["params"]) for g in groups]),
        ("latent shapes", [[tuple(latent.shape) for latent in each] for each in latents], shapes),
    ):
        if there != here:
            raise ValueError(f"the state is another optimizer's: {what}: {there} in the state, {here} here")


def split(
    state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], entries: Entries
) -> tuple[dict[str, Any], list[tuple[Entry, Tensor, float]]]:
    """Split a saved state into the base's own, with these groups' quantizers and scales, and each entry's w* and mu."""
    states = copy.deepcopy(dict(state["state"]))
    parameters = [p for group in groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    latents = [
        (entries[p], states[index].pop("w_star"), states[index].pop("mu"))
        for p, index in dict(zip(parameters, indices, strict=True)).items()
        if p in entries
    ]
    packed = [
        {key: value for key, value in theirs.items() if key != "update"}
        | ({"quantizer": ours["quantizer"], "scale": ours["scale"]} if is_quantized(ours) else {})
        for theirs, ours in zip(state["param_groups"], groups, strict=True)
    ]
    return {"state": states, "param_groups": packed}, latents


def cast(state: dict[str, Any], p: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The state with all tensors of the parameter's shape cast to `dtype`."""
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.shape == p.shape else value
        for key, value in state.items()
    }


def _written(group: Mapping[str, Any]) -> str | None:
    """The name that a saved state records for the group's quantizer."""
    quantizer = group.get("quantizer")
    return quantizer if quantizer is None or isinstance(quantizer, str) else str(quantizer.name)
