"""Does one process train S seeds of a small cell faster with their weights stacked than one after the other?

    python benchmarks/stacked_seeds.py
    python benchmarks/stacked_seeds.py --models resnet8,resnet20 --seeds 1,3,8 --batch-size 64

torch.func stacks S networks of one (model, quantizer), and vmap trains them as one, with one ProxConnect over the
stacked weights (its maps are elementwise). The baseline trains the S networks one after the other in the same process,
like the launcher's cells on a core. Whole steps are timed: forward, backward, B, AdamW, F. Both start from the same
weights, and their losses are compared after the first steps. Decision 011 draws the conclusion.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from machine import describe, verdict
from noise import synchronize
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import models
from models import Split
from quantizers import ProxConnect

SIDES = {"resnet8": (1, 8), "vit_mini_patch2_8": (1, 8), "resnet20": (3, 32), "vit_mini_patch4_32": (3, 32)}
"""(channels, side) of the images of small models, as in the digits or CIFAR."""
BAR = 1.5


def _network(model: str, seed: int, device: torch.device) -> tuple[nn.Module, Split]:
    torch.manual_seed(seed)
    channels, side = SIDES[model]
    network = models.create(model, 10, side, channels)
    return network.to(device).train(), models.binarize(network)


def _optimizer(parameters: dict[str, Tensor], split: Split) -> ProxConnect:
    groups = [
        {"params": [parameters[name] for name in split.decay], "weight_decay": 0.01},
        {"params": [parameters[name] for name in split.no_decay], "weight_decay": 0.0},
        {"params": [parameters[name] for name in split.binary], "weight_decay": 0.01, "quantizer": "bnn++", "mu": 20.0},
    ]
    return ProxConnect(torch.optim.AdamW(groups, 0.003))


def _separate(networks: list[tuple[nn.Module, Split]], images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A step of every network, one after the other; the step returns their losses."""
    optimizers = [_optimizer(dict(network.named_parameters()), split) for network, split in networks]

    def step() -> Tensor:
        losses = []
        for (network, _), optimizer, own, wanted in zip(networks, optimizers, images, labels, strict=True):
            loss = nn.functional.cross_entropy(network(own), wanted)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    return step


def _stacked(networks: list[tuple[nn.Module, Split]], images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A step of all networks at once; the step returns their losses."""
    stacked, buffers = stack_module_state([network for network, _ in networks])
    parameters = {name: tensor.detach().requires_grad_() for name, tensor in stacked.items()}
    skeleton = copy.deepcopy(networks[0][0]).to("meta")
    optimizer = _optimizer(parameters, networks[0][1])

    def loss_of(own: dict[str, Tensor], state: dict[str, Tensor], image: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(skeleton, (own, state), (image,)), wanted)

    losses_of = vmap(loss_of, randomness="different")

    def step() -> Tensor:
        losses: Tensor = losses_of(parameters, buffers, images, labels)
        optimizer.zero_grad()
        torch.autograd.backward(losses.sum())
        optimizer.step()
        return losses.detach()

    return step


def main(
    models: str = "resnet8,vit_mini_patch2_8,resnet20",
    seeds: Annotated[str, typer.Option(help="Numbers of seeds S.")] = "1,3,8",
    batch_size: int = 64,
    steps: Annotated[int, typer.Option(help="Steps of each kind, alternating; reports medians.")] = 15,
) -> None:
    """Compares S stacked networks with S separate ones."""
    warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap of attention: part of the answer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{describe()}: {device}, bnn++, AdamW, batch {batch_size}")
    for model in models.split(","):
        gains = [_compare(model, number, batch_size, steps, device) for number in map(int, seeds.split(","))]
        print(verdict(f"{model}: cells per hour, stacked / separate, at best", max(gains), BAR, at_least=True))


def _compare(model: str, number: int, batch_size: int, num_steps: int, device: torch.device) -> float:
    torch.manual_seed(0)
    images = torch.randn(number, batch_size, SIDES[model][0], SIDES[model][1], SIDES[model][1], device=device)
    labels = torch.randint(0, 10, (number, batch_size), device=device)
    ways = {
        "separate": _separate([_network(model, seed, device) for seed in range(number)], images, labels),
        "stacked": _stacked([_network(model, seed, device) for seed in range(number)], images, labels),
    }
    first = {name: torch.stack([step() for _ in range(3)]) for name, step in ways.items()}
    apart = float((first["separate"] - first["stacked"]).abs().max())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_steps):
        for name, step in ways.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    separate, stacked = (1e3 * statistics.median(seconds[name]) for name in ("separate", "stacked"))
    print(
        f"{model}, S = {number}: separate {separate:.1f} ms, stacked {stacked:.1f} ms a step of all: "
        f"{separate / stacked:.2f} times the cells per hour; losses of the first steps differ by {apart:.1e} at most"
    )
    return separate / stacked


if __name__ == "__main__":
    typer.run(main)
