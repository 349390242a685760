"""Claims about every base optimizer that a recipe may name (timm's, and torch's through timm), for every row."""

import copy
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from quantizers import QUANTIZERS, ProxConnect, get
from quantizers.scales import Scale
from suite.recipe.optimizers import COMMON, names, traits

NUM_STEPS = 4
every_base = pytest.mark.parametrize("base", names())


class Network(nn.Module):
    """A convolution and a linear layer on fixed data, small enough to be stepped hundreds of times a second."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator) * 2 - 1

        self.conv, self.linear, self.bias = (nn.Parameter(uniform(*s)) for s in ((4, 2, 3, 3), (3, 16), (3,)))
        self.x, self.y = uniform(8, 2, 4, 4), torch.arange(8) % 3

    def loss(self) -> Tensor:
        features = nn.functional.conv2d(self.x, self.conv).flatten(1).tanh()
        return nn.functional.cross_entropy(nn.functional.linear(features, self.linear, self.bias), self.y)

    def quantized(self) -> list[nn.Parameter]:
        return [self.conv, self.linear]


def wrapped(
    model: Network, base: str, quantizer: str, scale: Scale = "none", *, fused: bool | None = None
) -> ProxConnect:
    groups = [
        {"params": model.quantized(), "quantizer": quantizer, "mu": 1.5, "scale": scale, "weight_decay": 0.01},
        {"params": [model.bias], "weight_decay": 0.0},
    ]
    return ProxConnect(create_optimizer_v2(groups, base, lr=0.01), fused=fused)


def train(model: Network, optimizer: torch.optim.Optimizer, num_steps: int = NUM_STEPS) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        torch.autograd.backward(model.loss())
        optimizer.step()


@every_base
def test_every_optimizer_moves_the_latents_of_every_row(base: str) -> None:
    for quantizer, row in QUANTIZERS.items():
        model = Network()
        optimizer = wrapped(model, base, quantizer)
        start = [optimizer.latent(p).clone() for p in model.quantized()]
        train(model, optimizer)
        for p, before in zip(model.quantized(), start, strict=True):
            latent = optimizer.latent(p)
            assert bool(latent.isfinite().all()), quantizer
            assert not torch.equal(latent, before), quantizer
            torch.testing.assert_close(p.detach(), get(quantizer).forward(latent, 1.5), rtol=1e-5, atol=1e-6)
        optimizer.harden()
        assert not row.binary or all(bool((p.abs() == 1).all()) for p in model.quantized())


@every_base
def test_full_precision_through_proxconnect_is_the_optimizer_alone(base: str) -> None:
    through, alone = Network(), Network()
    train(through, wrapped(through, base, "fp"))
    groups = [{"params": alone.quantized(), "weight_decay": 0.01}, {"params": [alone.bias], "weight_decay": 0.0}]
    train(alone, create_optimizer_v2(groups, base, lr=0.01))
    assert all(torch.equal(p, q) for p, q in zip(through.parameters(), alone.parameters(), strict=True))


@every_base
@pytest.mark.parametrize("scale", ["none", "channel"])
def test_every_optimizer_goes_on_from_a_state_to_the_bit(base: str, scale: Scale) -> None:
    straight, stopped, resumed = Network(), Network(), Network()
    train(straight, wrapped(straight, base, "bnn++", scale), 5)
    first = wrapped(stopped, base, "bnn++", scale)
    train(stopped, first, 2)
    second = wrapped(resumed, base, "bnn++", scale)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.bias.data.copy_(stopped.bias)
    train(resumed, second, 3)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("base", ["sgd", "momentum", "nesterov", "adamw"])
def test_torchs_optimizers_are_fused_through_timm_as_well(base: str) -> None:
    optimizer = wrapped(Network(), base, "bnn++", fused=True)
    assert optimizer.is_fused


def test_other_optimizers_say_that_they_are_not_fused() -> None:
    with pytest.raises(ValueError, match="fused=True: the base is Lamb, not exactly torch's SGD or AdamW"):
        wrapped(Network(), "lamb", "bnn++", fused=True)


@pytest.mark.parametrize("name", COMMON)
def test_the_traits_that_spare_an_import_are_timms(name: str) -> None:
    from timm.optim import get_optimizer_info

    info = get_optimizer_info(name)
    assert traits(name) == (info.has_momentum, info.num_betas if info.has_betas else 0, info.has_eps)


@every_base
def test_every_optimizer_takes_the_settings_that_its_traits_name(base: str) -> None:
    known, settings = traits(base), dict[str, Any]()
    if known.has_momentum:
        settings["momentum"] = 0.8
    if known.num_betas:
        settings["betas"] = (0.8, 0.9, 0.95)[: known.num_betas]
    if known.has_eps:
        settings["eps"] = 1e-7
    made = create_optimizer_v2([{"params": [nn.Parameter(torch.ones(2, 2))]}], base, lr=0.1, **settings)
    for key, value in settings.items():
        assert made.defaults.get(key, value) == value
        assert key in made.defaults or made.defaults["beta1"] == settings["betas"][0]  # Adafactor uses only the first
