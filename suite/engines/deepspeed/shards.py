"""Locates each parameter's shards in ZeRO, and makes ZeRO use values written into them.

This file has all of the project's access to undocumented DeepSpeed internals; tested with version 0.19.8.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed


class Piece(NamedTuple):
    """This process's part of a parameter: flat[start : start + length] is shard[at : at + length]."""

    shard: Tensor
    at: int
    start: int
    length: int


class Shards(NamedTuple):
    """This process's shards by group, and its piece of each parameter by name (None if it has none)."""

    groups: list[list[Tensor]]
    pieces: dict[str, Piece | None]


def layout_of(
    engine: Any,  # noqa: ANN401  (deepspeed is untyped)
    stage: int,
    names: list[list[str]],
    parameters: Mapping[str, Tensor],
) -> Shards:
    """This process's shards and pieces at the given ZeRO stage."""
    zero = engine.optimizer
    if stage == 0:
        groups = [[parameters[name] for name in group] for group in names]
        return Shards(groups, {name: Piece(p, 0, 0, p.numel()) for name, p in parameters.items()})
    if stage == 3:  # noqa: PLR2004  (ZeRO's number)
        groups = [
            [
                shard
                for index, shard in enumerate(zero.fp32_partitioned_groups_flat)
                if zero.sub_group_to_group_id[index] == number
            ]
            for number in range(len(names))
        ]
        return Shards(groups, {name: _piece_of_three(zero, p) for name, p in parameters.items()})
    groups = [[shard] for shard in zero.single_partition_of_fp32_groups]
    number_of = {name: number for number, group in enumerate(names) for name in group}
    return Shards(groups, {name: _piece_of_two(p, groups[number_of[name]][0]) for name, p in parameters.items()})


def _piece_of_two(parameter: Any, shard: Tensor) -> Piece | None:  # noqa: ANN401  (attributes are ZeRO's)
    """Stages 1 and 2: a group's parameters are concatenated and cut into one equal part per process."""
    mapping = parameter._hp_mapping  # noqa: SLF001  (as deepspeed.utils.safe_get_full_fp32_param does)
    if mapping is None:
        return None
    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Piece(shard, there.start, here.start, there.numel)


def _piece_of_three(zero: Any, parameter: Any) -> Piece | None:  # noqa: ANN401  (attributes are ZeRO's)
    """Stage 3: each parameter is cut into equal parts, the last one padded."""
    index, at, length = zero.grad_position[zero.get_param_id(parameter)]
    start = length * distributed.get_rank()
    length = min(length, parameter.ds_numel - start)
    return Piece(zero.fp32_partitioned_groups_flat[index], at, start, length) if length > 0 else None


@torch.no_grad()
def spread(engine: Any, stage: int) -> None:  # noqa: ANN401  (deepspeed is untyped)
    """Copies values written into the shards to the model's parameters, on every process."""
    zero = engine.optimizer
    if stage in {1, 2}:
        zero.update_lp_params()
    elif stage == 3:  # noqa: PLR2004  (ZeRO's number)
        zero._partition_all_parameters()  # noqa: SLF001  (as its step() does first; no public way)
        for index in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(index)  # noqa: SLF001
        if zero.persistent_parameters:  # small parameters that every process keeps unsharded
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
