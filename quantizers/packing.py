"""Tensors of -1 and +1 as bits, eight to a byte.

    packed = pack(w)                              uint8 (ceil(n / 8),), n = w.numel()
    w = unpack(packed, w.shape, w.dtype)

Element i of the flattened tensor (C order: the last axis varies fastest) is bit i mod 8 of byte i // 8, bit 0 being the
least significant; a set bit is +1, a clear bit is -1. Unused bits of the last byte are zero.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BITS_PER_BYTE = 8


def pack(w: Tensor) -> Tensor:
    """The signs of `w`, a tensor of any shape, strides and signed dtype, on its device: uint8 (ceil(n / 8),).

    Raises:
        ValueError: an element is neither -1 nor +1 (0, NaN and latents are refused); names the first one in C order.
    """
    wrong = (w != 1) & (w != -1)
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{w[first].item()} at index {first} is neither -1 nor +1")
    flat = (w == 1).to(torch.uint8).flatten()  # in C order of the logical tensor, whatever its strides
    bits = torch.nn.functional.pad(flat, (0, -len(flat) % BITS_PER_BYTE))
    return (bits.view(-1, BITS_PER_BYTE) << _positions(w.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor of -1 and +1 that `pack` packed: `shape`, contiguous, signed `dtype`, on the device of `packed`.

    Raises:
        ValueError: `packed` is not uint8 (ceil(n / 8),) with zeros after its n-th bit.
    """
    num, num_bytes = math.prod(shape), math.ceil(math.prod(shape) / BITS_PER_BYTE)
    if packed.dtype != torch.uint8 or packed.shape != (num_bytes,):
        found = f"{str(packed.dtype).removeprefix('torch.')} {tuple(packed.shape)}"
        raise ValueError(f"{num} bits for shape {tuple(shape)} are uint8 ({num_bytes},), not {found}")
    bits = (packed[:, None] >> _positions(packed.device) & 1).flatten()
    if bits[num:].any():
        raise ValueError(f"the {len(bits) - num} bits after the last element of shape {tuple(shape)} are not all zero")
    return (2 * bits[:num].to(dtype) - 1).reshape(tuple(shape))


def _positions(device: torch.device) -> Tensor:
    """0 to 7: the bit position of each element in its byte, least significant first."""
    return torch.arange(BITS_PER_BYTE, dtype=torch.uint8, device=device)
