"""Each test is one small network with the wiring that its name describes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.wiring import layers_before_batch_norm, layers_that_see_no_sign


class Net(nn.Module):
    """A convolution and a batch norm of two channels, wired by `rule`."""

    def __init__(self, rule: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, x)


def found(rule: Callable[[Net, Tensor], Tensor]) -> bool:
    net = Net(rule)
    return layers_before_batch_norm(net, {"conv": net.conv}, torch.zeros(1, 2, 4, 4)) == {"conv"}


def two_calls(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.norm(net.conv(x)) + net.conv(x)
    return y


def shared_output(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    out: Tensor = net.norm(y) + y
    return out


def looked_at(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    assert y.shape[1] == y.size(1) == 2
    assert y.dtype is torch.float32
    out: Tensor = net.norm(y)
    return out


SCALE_FREE: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "norm directly behind": lambda net, x: net.norm(net.conv(x)),
    "the same layer normalised twice": lambda net, x: net.norm(net.conv(x)) + net.norm(net.conv(2 * x)),
    "its shape is looked at first": looked_at,
}
SCALED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "no norm": lambda net, x: net.conv(x),
    "norm in front": lambda net, x: net.conv(net.norm(x)),
    "activation in between": lambda net, x: net.norm(F.relu(net.conv(x))),
    "activation in place in between": lambda net, x: net.norm(F.relu_(net.conv(x))),
    "also used without the norm": shared_output,
    "concatenated, then normalised": lambda net, x: net.norm(torch.cat([net.conv(x), x], dim=2)),
    "only one of two calls normalised": two_calls,
    "layer norm": lambda net, x: F.layer_norm(net.conv(x), [4, 4]),
}
REFUSED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "weight is standardised": lambda net, x: F.conv2d(x, net.conv.weight - net.conv.weight.mean()) + net.conv(x),
    "weight is used behind the layer's back": lambda net, x: F.conv2d(x, net.conv.weight),
    "weight is not used": lambda net, x: net.norm(x),
}


@pytest.mark.parametrize("rule", SCALE_FREE.values(), ids=SCALE_FREE.keys())
def test_scale_is_immaterial(rule: Callable[[Net, Tensor], Tensor]) -> None:
    assert found(rule)


@pytest.mark.parametrize("rule", SCALED.values(), ids=SCALED.keys())
def test_scale_matters(rule: Callable[[Net, Tensor], Tensor]) -> None:
    assert not found(rule)


@pytest.mark.parametrize("rule", REFUSED.values(), ids=REFUSED.keys())
def test_a_weight_the_layer_does_not_own_alone_is_refused(rule: Callable[[Net, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^conv can't be binarized: "):
        found(rule)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_model_comes_back_as_it_was(*, is_frozen: bool) -> None:
    net = Net(SCALE_FREE["norm directly behind"])
    net.norm.train(not is_frozen)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    layers_before_batch_norm(net, {"conv": net.conv}, torch.ones(1, 2, 4, 4))
    assert net.training
    assert net.norm.training is not is_frozen
    assert not net.conv._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("rule", "constant"),
    [
        (lambda net, x: net.norm(net.conv(x)), False),
        (lambda net, x: net.norm(net.conv(F.gelu(x))), False),
        (lambda net, x: net.norm(net.conv(F.relu(x))), True),
        (lambda net, x: net.norm(net.conv(F.relu(x))) + net.conv(x), False),
        (lambda net, x: net.norm(net.conv(torch.sigmoid(x))), True),
    ],
    ids=["real", "behind a GELU", "behind a ReLU", "called twice, once behind a ReLU", "behind a sigmoid"],
)
def test_a_layer_sees_signs_unless_its_inputs_are_never_negative(
    rule: Callable[[Net, Tensor], Tensor], *, constant: bool
) -> None:
    net = Net(rule)
    noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert layers_that_see_no_sign(net, {"conv": net.conv}, noise) == (("conv",) if constant else ())
    assert net.training
    assert not net.conv._forward_pre_hooks
