"""Low-bit sums wrap as integers do, are continuous at the seam, penalised beyond it, and exact in a network."""

import pytest
import torch
from torch import nn

import models
from models.accumulators import Accumulator, cyclic, num_inexact, wrap
from models.inputs import BinaryInput, InputQuantization
from models.layers import BinaryConv2d, BinaryLinear

EVERY_SUM = torch.arange(-(2**15), 2**15, dtype=torch.int64)


def _literal(z: int, bits: int, k: float) -> float:
    """The formulas one number at a time."""
    half: int = 2 ** (bits - 1)
    m = (z + half) % (2 * half) - half
    turn = k * half / (k + 1)
    if abs(m) <= turn:
        return float(m)
    return k * half - k * m if m > turn else -k * half - k * m


@pytest.mark.parametrize(("bits", "k"), [(8, 2.0), (8, 1.0), (5, 3.0), (16, 2.0)])
def test_the_activation_is_the_formula_over_all_sums_of_16_bits(bits: int, k: float) -> None:
    z = EVERY_SUM.float()
    found = Accumulator(bits, k)(z)
    expected = torch.tensor([_literal(each, bits, k) for each in EVERY_SUM.tolist()])
    assert torch.equal(found, expected)


def test_wrapping_is_what_integers_of_that_many_bits_do() -> None:
    z = EVERY_SUM.float()
    assert torch.equal(wrap(z, 8), EVERY_SUM.to(torch.int8).float())
    assert torch.equal(wrap(4 * z, 16), (4 * EVERY_SUM).to(torch.int16).float())
    for bits in (5, 8, 16):
        assert num_inexact(Accumulator(bits), z) == 0
    assert num_inexact(Accumulator(8), torch.tensor([1.0, 1.5, 300.0])) == 1


def test_the_activation_is_continuous_and_its_slopes_are_1_and_minus_k() -> None:
    z = torch.linspace(-300, 300, 60_001, dtype=torch.float64).requires_grad_()
    y = cyclic(wrap(z, 8), 8, 2.0)
    torch.autograd.backward(y.sum())
    assert z.grad is not None
    assert (y[1:] - y[:-1]).abs().max().item() <= 2 * 0.01 + 1e-9
    assert set(z.grad.round(decimals=9).tolist()) <= {1.0, -2.0}
    inside = z.detach().abs() <= 2 * 128 / 3
    assert set(z.grad[inside].tolist()) == {1.0}


def test_overflows_are_counted_and_penalised_from_the_first_sum_that_does_not_fit() -> None:
    accumulator = Accumulator(8)
    z = torch.tensor([-129.0, -128.0, 0.0, 127.0, 128.0, 130.0])
    accumulator(z)
    assert (int(accumulator.num_overflows), int(accumulator.num_sums)) == (3, 6)
    assert accumulator.penalty.item() == pytest.approx((1 + 2) / 6)
    accumulator(z)
    model = nn.Sequential(accumulator)
    assert models.overflows(model) == (6, 12)
    models.reset_overflows(model)
    assert models.overflows(model) == (0, 0)


def test_layers_wrap_their_integer_sums_before_gain_and_bias_whatever_the_precision() -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(300, 7), nn.Conv2d(40, 6, 3, padding=1)
    made = (
        (BinaryLinear.from_layer(linear, inputs=_signs(), accumulator=Accumulator(5)), torch.randn(9, 300)),
        (BinaryConv2d.from_layer(conv, inputs=_signs(), accumulator=Accumulator(5)), torch.randn(2, 40, 5, 5)),
    )
    for layer, x in made:
        with torch.no_grad():
            layer.weight.copy_(layer.weight.sign())
            signs = torch.where(x >= 0, 1.0, -1.0)
            is_linear = isinstance(layer, BinaryLinear)
            if is_linear:
                sums = nn.functional.linear(signs, layer.weight)
            else:
                sums = nn.functional.conv2d(signs, layer.weight, padding=1)
            assert bool((sums == sums.round()).all())
            assert bool((sums.abs() > 16).any()), "sums that do not fit"
            assert layer.gain is not None
            assert layer.bias is not None
            shape = (-1, *[1] * (x.ndim - 2))
            expected = Accumulator(5)(sums) * layer.gain.view(shape) + layer.bias.view(shape)
            assert torch.equal(layer(x), expected)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(layer(x), expected)


def _signs() -> BinaryInput:
    return BinaryInput(InputQuantization("bnn"))


def test_a_network_of_such_layers_draws_nothing_and_counts_all_its_sums() -> None:
    torch.manual_seed(0)
    model = models.create("bireal_resnet8", 10, 8, 1)
    state = torch.get_rng_state()
    models.binarize(model, ("ends",), InputQuantization("bnn"), "none", models.SumQuantization(8, 2.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(list(models.accumulators(model))) == 6
    model.eval()(torch.randn(2, 1, 8, 8))
    assert models.overflows(model)[1] == 2 * (2 * 16 * 64 + 2 * 32 * 16 + 2 * 64 * 4)
