"""Binarizing once per step in the optimizer, against a sign in each forward pass: images per second of whole steps.

    python benchmarks/peer_layers.py
    python benchmarks/peer_layers.py --models resnet18@64 --batch-size 16

The peers keep full-precision weights v and binarize them inside each layer, by an autograd function whose backward pass
is the straight-through estimator. Three are written here from their equations, as lean as possible; one is a library's:

    sign       W = sign(v),                               dl/dv = dl/dW where |v| <= 1, else 0
    gain       W = m sign(v), m = mean |v| per channel    the same, through m, too           (XNOR-Net's)
    standard   v' = (v - mean v) / std v per channel, W = 2^round(log2 mean |v'|) sign(v'), dl/dv through it (IR-Net's)
    bitorch    QConv2d_NoAct of bitorch, inputs not binarized: sign, and explicit padding of the input with zeros

bitorch is left out where it is not installed (pip install --no-deps --target DIRECTORY bitorch, on PYTHONPATH).

Ours are the rows bnn (the same sign and clip) and bnn++. All have the same network, base optimizer (SGD with momentum),
data, loop and memory format. They take turns step by step. A ratio is the median over the turns, with quartiles: if
these are far apart, the machine was busy. Binarization is also timed separately, without the network: for the peers,
the signs of all layers forward and backward; for ours, the optimizer's step less full precision's.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from machine import describe, verdict
from noise import Stepping, synchronize, trainer_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from suite.training.trainer import Trainer

BAR = 1.1


class StraightThrough(torch.autograd.Function):
    """sign(v), with 0 mapped to +1; backward: the gradient where |v| <= 1."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:  # noqa: ANN401  (torch's context)
        """+1 or -1, of v's shape and dtype."""
        ctx.save_for_backward(v)
        return torch.where(v >= 0, 1.0, -1.0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401
        """The gradient, set to 0 where |v| > 1."""
        v: Tensor = ctx.saved_tensors[0]
        return gradients[0] * (v.abs() <= 1)


class SignConv2d(nn.Conv2d):
    """Convolution with W = sign(v)."""

    def binarized(self) -> Tensor:
        """W: (C_out, C_in, k, k)."""
        weight: Tensor = StraightThrough.apply(self.weight)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        return F.conv2d(x, self.binarized(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class GainConv2d(SignConv2d):
    """Convolution with W = mean |v| sign(v)."""

    def binarized(self) -> Tensor:
        """W: (C_out, C_in, k, k)."""
        return self.weight.abs().mean(dim=(1, 2, 3), keepdim=True) * super().binarized()


class StandardConv2d(SignConv2d):
    """Convolution with standardised weights, scaled by a power of two."""

    def binarized(self) -> Tensor:
        """W: (C_out, C_in, k, k)."""
        centred = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        standard = centred / centred.std(dim=(1, 2, 3), keepdim=True)
        scale = torch.exp2(standard.detach().abs().mean(dim=(1, 2, 3), keepdim=True).log2().round())
        sign: Tensor = StraightThrough.apply(standard)
        return scale * sign


PEERS: dict[str, type[nn.Conv2d]] = {"sign": SignConv2d, "gain": GainConv2d, "standard": StandardConv2d}
if importlib.util.find_spec("bitorch") is not None:
    from bitorch.layers.config import config  # type: ignore[import-not-found,unused-ignore]
    from bitorch.layers.qconv2d import QConv2d_NoAct  # type: ignore[import-not-found,unused-ignore]

    class BitorchConv2d(QConv2d_NoAct):  # type: ignore[misc,unused-ignore]
        """bitorch's layer, as a replacement for one of our layers."""

        _pad_value = 0.0  # bitorch's default is -1, for binary inputs
        _weight_quantize = staticmethod(config.get_quantization_function("sign"))

        def binarized(self) -> Tensor:
            """W: (C_out, C_in, k, k)."""
            weight: Tensor = self._weight_quantize(self.weight)
            return weight

    PEERS["bitorch"] = BitorchConv2d
OURS = ("bnn", "bnn++")


def peer(name: str, model: str, batch_size: int) -> Trainer:
    """A full-precision trainer in which the peer's layers replace the layers that we make binary."""
    binary = trainer_of(model, "bnn", batch_size).split.binary
    trainer = trainer_of(model, "fp", batch_size)
    for parameter in binary:
        layer = trainer.engine.model.get_submodule(parameter.removesuffix(".weight"))
        if type(layer) is not nn.Conv2d:
            raise typer.BadParameter(f"{model}: {parameter} is no convolution, and the peers are")
        layer.__class__ = PEERS[name]  # the parameters stay the same, so the optimizer needs no change
    return trainer


@dataclass
class Way:
    """A way to train; `seconds` of its steps, one per turn; `alone`: seconds of just the binarization."""

    name: str
    trainer: Trainer
    seconds: list[float] = field(default_factory=list)
    alone: float = 0.0

    def __post_init__(self) -> None:
        self.step = Stepping(self.trainer).step


def _median_seconds(call: Callable[[], object], num_calls: int = 20) -> float:
    seconds = []
    for _ in range(num_calls):
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _signs_alone(model: nn.Module) -> float:
    """Seconds for the signs of all of a peer's layers, forward and backward."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, tuple(PEERS.values()))]
    gradients = [torch.ones_like(layer.weight) for layer in layers]

    def signs() -> None:
        for layer, gradient in zip(layers, gradients, strict=True):
            torch.autograd.backward(layer.binarized(), gradient)

    seconds = _median_seconds(signs)
    model.zero_grad()
    return seconds


def main(
    models: str = "resnet20",
    batch_size: int = 128,
    turns: Annotated[int, typer.Option(min=2, help="Measured steps for each way to train.")] = 40,
) -> None:
    """Compares binary weights kept by the optimizer with weights binarized in each forward pass."""
    print(describe())
    console = Console()
    for model in models.split(","):
        with console.status(model):
            ways = [Way(f"ours, {row}", trainer_of(model, row, batch_size)) for row in OURS]
            ways += [Way(f"peer, {name}", peer(name, model, batch_size)) for name in PEERS]
            ways.append(Way("full precision", trainer_of(model, "fp", batch_size)))
            for turn in range(-2, turns):
                for way in ways if turn % 2 else reversed(ways):
                    seconds = way.step()
                    if turn >= 0:  # negative turns warm up
                        way.seconds.append(seconds)
            _time_alone(ways)
        _report(model, batch_size, ways, console)


def _time_alone(ways: list[Way]) -> None:
    """Times binarization by itself. Runs last, because steps without new gradients train nothing."""
    full_precision = _median_seconds(ways[-1].trainer.optimizer.step)
    for way in ways[: len(OURS)]:
        way.alone = _median_seconds(way.trainer.optimizer.step) - full_precision
    for way in ways[len(OURS) : -1]:
        way.alone = _signs_alone(way.trainer.engine.model)


def _report(model: str, batch_size: int, ways: list[Way], console: Console) -> None:
    table = Table("way", "images/s", *(f"{way.name} over it" for way in ways[: len(OURS)]), "binarization alone, ms")
    table.title = f"{model}, batch {batch_size}: medians of {len(ways[0].seconds)} turns (quartiles)"
    for way in ways:
        rate = batch_size / statistics.median(way.seconds)
        table.add_row(
            way.name, f"{rate:.0f}", *(_ratio(ours, way) for ours in ways[: len(OURS)]), f"{1e3 * way.alone:.1f}"
        )
    console.print(table)
    for other in ways[len(OURS) : -1]:
        ratio = statistics.median(_ratios(ways[0], other))
        print(verdict(f"{model}: images/s of {ways[0].name} / {other.name}", ratio, BAR, at_least=True))


def _ratios(one: Way, other: Way) -> list[float]:
    """Ratios of images per second, turn by turn."""
    return [theirs / ours for ours, theirs in zip(one.seconds, other.seconds, strict=True)]


def _ratio(one: Way, other: Way) -> str:
    low, middle, high = statistics.quantiles(_ratios(one, other))
    return f"{middle:.3f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    typer.run(main)
