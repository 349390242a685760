"""Packing keeps every sign, in an order that is written down, and refuses whatever is not a sign."""

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantizers.packing import pack, unpack

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8]
few = settings(max_examples=40)
shapes = st.lists(st.integers(0, 7), max_size=5).map(tuple)


def _signs(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (2 * torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) - 1).to(dtype)


@few
@given(shapes, st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_unpacking_gives_back_what_was_packed(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    w = _signs(shape, dtype, seed)
    packed = pack(w)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(w.numel() / 8),)
    again = unpack(packed, w.shape, w.dtype)
    assert again.dtype == w.dtype
    assert torch.equal(again, w)


@few
@given(shapes, st.integers(0, 2**32), st.randoms())
def test_strides_do_not_matter(shape: tuple[int, ...], seed: int, random: Random) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)
    w = _signs(shape, torch.float32, seed).permute(order)
    assert torch.equal(pack(w), pack(w.contiguous()))
    assert torch.equal(unpack(pack(w), w.shape, w.dtype), w)


@few
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))
def test_channels_last_packs_as_the_logical_tensor(channels_out: int, channels_in: int, side: int, seed: int) -> None:
    w = _signs((channels_out, channels_in, side, side), torch.float32, seed)
    assert torch.equal(pack(w.to(memory_format=torch.channels_last)), pack(w))


def test_every_other_element_of_a_tensor_packs_as_itself() -> None:
    w = _signs((6, 9), torch.float32, 0)[:, ::2]
    assert torch.equal(unpack(pack(w), w.shape, w.dtype), w)


def test_the_first_element_is_the_least_significant_bit_and_the_last_byte_ends_in_zeros() -> None:
    w = -torch.ones(2, 5)
    w[0, 0] = w[0, 2] = w[1, 4] = 1  # elements 0, 2 and 9 in C order
    assert pack(w).tolist() == [0b00000101, 0b00000010]


def test_packing_agrees_with_a_loop_over_the_elements() -> None:
    w = _signs((3, 7, 5), torch.float32, 1)
    expected = [0] * math.ceil(w.numel() / 8)
    for i, value in enumerate(w.reshape(-1).tolist()):
        expected[i // 8] |= (value == 1) << i % 8
    assert pack(w).tolist() == expected


@few
@given(shapes.filter(lambda shape: 0 not in shape), st.sampled_from(DTYPES[:4]), st.data())
def test_a_value_that_is_no_sign_is_refused_by_its_value_and_place(
    shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject
) -> None:
    value = data.draw(st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 0.5, -0.75, 1.0078125, 2.0]))
    first = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    w = _signs(shape, dtype, 0)
    w[first] = value
    with pytest.raises(ValueError, match="is neither -1 nor \\+1") as refusal:
        pack(w)
    assert str(refusal.value).startswith(f"{value} at index {first} ")


def test_of_several_wrong_values_the_first_in_c_order_is_named() -> None:
    w = torch.ones(4, 3).t()
    w[2, 1], w[1, 3] = 0.25, 0.5
    with pytest.raises(ValueError, match=r"^0\.5 at index \(1, 3\) is neither -1 nor \+1$"):
        pack(w)


def test_a_tensor_that_requires_grad_packs_without_a_graph() -> None:
    assert not pack(torch.ones(9, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.zeros(1, dtype=torch.uint8), r"9 bits for shape \(3, 3\) are uint8 \(2,\), not uint8 \(1,\)"),
        (torch.zeros(3, dtype=torch.uint8), r"not uint8 \(3,\)"),
        (torch.zeros(2, 1, dtype=torch.uint8), r"not uint8 \(2, 1\)"),
        (torch.zeros(2), r"not float32 \(2,\)"),
        (
            torch.tensor([255, 3], dtype=torch.uint8),
            r"the 7 bits after the last element of shape \(3, 3\) are not all zero",
        ),
    ],
)
def test_bytes_that_no_tensor_of_the_shape_packs_to_are_refused(packed: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(packed, (3, 3), torch.float32)
