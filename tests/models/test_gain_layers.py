import pytest
import torch
from torch import Tensor, nn

from models.inputs import BinaryInput, InputQuantization
from models.layers import BinaryConv2d, BinaryLinear, channel_mean_abs

LAYERS = [
    nn.Linear(3, 5),
    nn.Linear(3, 5, bias=False),
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 4, 3, groups=4, bias=False),
    nn.Conv2d(4, 8, (1, 3), dilation=2, padding="same", padding_mode="circular"),
]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)


def with_gain(layer: nn.Linear | nn.Conv2d) -> BinaryLinear | BinaryConv2d:
    return BinaryLinear.from_layer(layer) if isinstance(layer, nn.Linear) else BinaryConv2d.from_layer(layer)


def gain_of(layer: BinaryLinear | BinaryConv2d) -> nn.Parameter:
    assert layer.gain is not None
    return layer.gain


def example_input(layer: nn.Linear | nn.Conv2d) -> Tensor:
    return torch.randn(5, 7, 3) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 9, 9)


def per_channel(vector: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """A vector of one number per output channel, shaped to broadcast with the layer's output."""
    return vector if isinstance(layer, nn.Linear) else vector[:, None, None]


@every_layer
def test_output_is_gain_times_product_plus_bias(layer: nn.Linear | nn.Conv2d) -> None:
    x, new = example_input(layer), with_gain(layer)
    nn.init.normal_(gain_of(new))
    bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
    product = layer(x) - per_channel(bias, layer)
    torch.testing.assert_close(new(x), per_channel(gain_of(new), layer) * product + per_channel(bias, layer))


@every_layer
def test_weight_and_bias_are_the_same_parameters_and_no_random_number_is_drawn(layer: nn.Linear | nn.Conv2d) -> None:
    before = torch.get_rng_state()
    new = with_gain(layer)
    assert torch.equal(torch.get_rng_state(), before)
    assert new.weight is layer.weight
    assert new.bias is layer.bias
    assert {name for name, _ in new.named_parameters()} == {name for name, _ in layer.named_parameters()} | {"gain"}


@every_layer
def test_signs_times_the_first_gain_are_the_best_binary_weights(layer: nn.Linear | nn.Conv2d) -> None:
    weight = layer.weight.detach().flatten(1)
    gain = gain_of(with_gain(layer)).detach()[:, None]
    assert torch.allclose(gain, weight.abs().mean(dim=1, keepdim=True))

    def error(g: Tensor) -> Tensor:
        return (weight - g * weight.sign()).square().sum(dim=1)

    assert (error(gain) <= error(gain * 1.01)).all()
    assert (error(gain) <= error(gain * 0.99)).all()
    assert (error(gain) < weight.square().sum(dim=1)).all()  # better than no weights at all


@every_layer
def test_a_layer_that_is_binary_already_is_kept_exactly(layer: nn.Linear | nn.Conv2d) -> None:
    x = example_input(layer)
    with torch.no_grad():
        layer.weight.copy_(0.25 * layer.weight.sign())
    expected = layer(x)
    new = with_gain(layer)
    with torch.no_grad():
        new.weight.sign_()
    torch.testing.assert_close(new(x), expected)


@every_layer
def test_every_parameter_gets_a_gradient(layer: nn.Linear | nn.Conv2d) -> None:
    new = with_gain(layer)
    new.zero_grad()
    new(example_input(layer)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in new.parameters())


@every_layer
def test_without_gain_and_inputs_it_is_the_layer_itself(layer: nn.Linear | nn.Conv2d) -> None:
    x = example_input(layer)
    new: BinaryLinear | BinaryConv2d
    if isinstance(layer, nn.Linear):
        new = BinaryLinear.from_layer(layer, with_gain=False)
    else:
        new = BinaryConv2d.from_layer(layer, with_gain=False)
    assert new.state_dict().keys() == layer.state_dict().keys()
    assert torch.equal(new(x), layer(x))


@every_layer
def test_binary_inputs_are_what_is_multiplied(layer: nn.Linear | nn.Conv2d) -> None:
    x, inputs = example_input(layer), BinaryInput(InputQuantization())
    new: BinaryLinear | BinaryConv2d
    if isinstance(layer, nn.Linear):
        new = BinaryLinear.from_layer(layer, with_gain=False, inputs=inputs)
    else:
        new = BinaryConv2d.from_layer(layer, with_gain=False, inputs=inputs)
    assert torch.equal(new(x), layer(torch.where(x >= 0, 1.0, -1.0)))


def test_zero_padding_pads_binary_inputs_with_zeros() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(layer.weight)
    new = BinaryConv2d.from_layer(layer, with_gain=False, inputs=BinaryInput(InputQuantization()))
    corner, edge, middle = new(torch.ones(1, 1, 3, 3))[0, 0].flatten()[[0, 1, 4]].tolist()
    assert (corner, edge, middle) == (4.0, 6.0, 9.0)


def test_channel_mean_abs_averages_over_everything_but_the_first_axis() -> None:
    weight = torch.tensor([[[[1.0, -3.0]]], [[[0.0, 2.0]]]])
    assert channel_mean_abs(weight).tolist() == [2.0, 1.0]


def test_output_keeps_the_dtype_of_autocast() -> None:
    layer = BinaryLinear.from_layer(nn.Linear(3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 3)).dtype is torch.bfloat16
