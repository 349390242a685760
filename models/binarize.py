"""Which weights of a model are binary, and every parameter's place.

The first layer, the classifier head, norms, biases and embeddings stay full precision; every other convolution and
linear weight is binary (theory.md, section 6).
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor, nn

from models.catalog import full_precision_layers, metadata
from models.layers import BinaryConv2d, BinaryLinear
from models.wiring import layers_before_batch_norm

Matrix = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Split:
    """The names of a model's parameters in three groups, each in the model's order.

    Checked at birth: ValueError unless every parameter of `model` is in exactly one group.

    Attributes:
        binary: weights that are quantized, and hold latents w* after `binarize`.
        decay: full-precision weights of convolutions and linear layers.
        no_decay: norms, biases, gains, tokens, position embeddings, and what `model.no_weight_decay()` names.
    """

    binary: tuple[str, ...]
    decay: tuple[str, ...]
    no_decay: tuple[str, ...]
    model: InitVar[nn.Module]

    def __post_init__(self, model: nn.Module) -> None:
        listed = Counter(self.binary + self.decay + self.no_decay)
        owned = {name for name, _ in model.named_parameters()}
        problems = {
            "in no group": sorted(owned - listed.keys()),
            "not in the model": sorted(listed.keys() - owned),
            "in several groups": sorted(name for name, times in listed.items() if times > 1),
        }
        found = [f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names]
        if found:
            raise ValueError(f"the groups are not a partition of the model's parameters; {'; '.join(found)}")


def binarize(model: nn.Module) -> Split:
    """Make every eligible layer of `model` (one that `create` built) binary, in place; return the parameters' groups.

    Eligible are all convolutions and linear layers except the first layer and the classifier. Where the layer's
    output goes straight into a batch norm and nowhere else, the scale of its weight is immaterial and the layer stays
    as it is; `layers_before_batch_norm` finds these by running the model once on one zero image. Any other layer
    becomes a BinaryLinear or BinaryConv2d with a gain: right whether or not something normalises later. Then each
    weight holds its latents, clip(w / (2 mean|w|), -1, 1).

    Draws no random numbers. Raises ValueError, with the model unchanged, where no layer is eligible and where one
    can't be binarized without changing what the model computes.
    """
    layers = _eligible_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__}: nothing to binarize between its first layer and its classifier")
    scale_free = layers_before_batch_norm(model, layers, _zero_image(model))
    twins = {name: _with_gain(name, layer) for name, layer in layers.items() if name not in scale_free}
    for name, twin in twins.items():
        model.set_submodule(name, twin)
    with torch.no_grad():
        for layer in layers.values():  # a twin shares its layer's weight
            layer.weight.copy_(latents(layer.weight))
    return _split(model, binary={f"{name}.weight" for name in layers})


def full_precision(model: nn.Module) -> Split:
    """The groups of the full-precision baseline: nothing binary, the model unchanged."""
    return _split(model, binary=())


def latents(weight: Tensor) -> Tensor:
    """w* = clip(w / (2 mean|w|), -1, 1), one mean per layer. Keeps shape and dtype; a weight of zeros stays zero."""
    scale = (2 * weight.abs().mean()).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scale).clamp(-1, 1)


def _with_gain(name: str, layer: Matrix) -> BinaryLinear | BinaryConv2d:
    """The layer's binary twin. By exact type: a subclass may do something of its own that the twin would lose."""
    if type(layer) is nn.Linear:
        return BinaryLinear.from_layer(layer)
    if type(layer) is nn.Conv2d:
        return BinaryConv2d.from_layer(layer)
    raise ValueError(f"{name}: a {type(layer).__name__} with no batch norm behind it has no binary twin with a gain")


def _eligible_layers(model: nn.Module) -> dict[str, Matrix]:
    """Every convolution and linear layer, by name, that is not inside a full-precision layer."""
    exact = full_precision_layers(model)
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Matrix) and not any(f"{name}.".startswith(f"{root}.") for root in exact)
    }


def _zero_image(model: nn.Module) -> Tensor:
    """One image of the size the model was created for, on its device and in its dtype: (1, C, H, W)."""
    parameter = next(model.parameters())
    channels, height, width = metadata(model)["input_size"]
    return parameter.new_zeros(1, channels, height, width)


def _split(model: nn.Module, binary: Collection[str]) -> Split:
    """The parameters' groups, given which are binary."""
    matrices = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, Matrix)}
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    decay = matrices.difference(exempt, binary)
    order = [name for name, _ in model.named_parameters()]
    return Split(
        binary=tuple(name for name in order if name in binary),
        decay=tuple(name for name in order if name in decay),
        no_decay=tuple(name for name in order if name not in binary and name not in decay),
        model=model,
    )
