"""Which weights of a model are binary, and which group each of its parameters belongs to.

Norms, biases and embeddings stay full precision, and so do the named layers: by default, the first layer and the
classifier. Every other convolution and linear weight becomes binary, and optionally the inputs of its layer too.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from models.accumulators import Accumulator
from models.catalog import full_precision_layers, metadata
from models.inputs import BinaryInput, InputQuantization
from models.layers import BinaryConv2d, BinaryLinear, ClippedConv2d
from models.wiring import layers_before_batch_norm, layers_that_see_no_sign, not_binary
from quantizers.names import unknown
from quantizers.scales import Scale

Matrix = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def _ends(model: nn.Module) -> Callable[[str, Matrix], bool]:
    """The first layer and the classifier."""
    ends = full_precision_layers(model)
    return lambda name, _layer: any(f"{name}.".startswith(f"{root}.") for root in ends)


def _shortcuts(name: str, layer: Matrix) -> bool:
    """1x1 convolutions on shortcuts, as in Bi-Real Net: there is one for each change of width or resolution."""
    on_shortcut = not {"downsample", "shortcut"}.isdisjoint(name.split("."))
    return on_shortcut and isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1}


def _attention(name: str, layer: Matrix) -> bool:
    """A transformer's attention projections; the MLP is then binary."""
    return "attn" in name.split(".") and isinstance(layer, nn.Linear)


_Keeps = Callable[[str, Matrix], bool]

POLICIES: dict[str, Callable[[nn.Module], _Keeps]] = {
    "ends": _ends,
    "shortcuts": lambda _model: _shortcuts,
    "attention": lambda _model: _attention,
}
"""Policies for keeping layers in full precision: policy name -> (model -> ((layer name, layer) -> whether to keep it)).
"""


def kept_layers(model: nn.Module, keep: Sequence[str] = ("ends",)) -> dict[str, tuple[str, ...]]:
    """The names of the layers that each item of `keep` keeps full precision.

    An item is a name in POLICIES or a pattern of layer names such as `blocks.*.attn.qkv` (fnmatch). A pattern that
    matches a module also matches the layers inside it.

    Raises:
        ValueError: a pattern matches no convolution or linear layer.
    """
    found = {}
    own = matrices(model)
    for item in keep:
        keeps = POLICIES[item](model) if item in POLICIES else _matching(item)
        found[item] = tuple(name for name, layer in own.items() if keeps(name, layer))
        if not found[item] and item not in POLICIES:
            raise ValueError(
                f"{unknown('layers to keep in full precision', item, POLICIES)}, and no layer of "
                f"{type(model).__name__} matches it; its layers are {_some(list(own))}"
            )
    return found


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """The model's convolutions and linear layers, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Matrix)}


def _matching(pattern: str) -> _Keeps:
    return lambda name, _layer: fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, ..., {names[-1]}"  # noqa: PLR2004


@dataclass(frozen=True)
class SumQuantization:
    """The number of bits of a binary layer's sums, and the slope k of the cyclic activation (see `accumulators`)."""

    bits: int = 8
    slope: float = 2.0


@dataclass(frozen=True)
class Split:
    """The names of a model's parameters in three groups, each in the model's order.

    Checked at construction: ValueError unless every parameter of `model` is in exactly one group.

    Attributes:
        binary: weights to be quantized, which hold latents w* after `binarize`.
        decay: full-precision weights of convolutions and linear layers.
        no_decay: norms, biases, gains, shifts, slopes, tokens, position embeddings, and the parameters that
            `model.no_weight_decay()` names.
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


def binarize(
    model: nn.Module,
    keep: Sequence[str] = ("ends",),
    inputs: InputQuantization | None = None,
    scale: Scale = "none",
    sums: SumQuantization | None = None,
) -> Split:
    """Binarize every eligible layer of `model` (one that `create` built), in place; return the parameter groups.

    All convolutions and linear layers are eligible except the ones that `keep` names (see `kept_layers`).

    Without a `scale`, a layer whose output goes straight into a batch norm and nowhere else gets no gain, since the
    scale of its weight is immaterial; `layers_before_batch_norm` finds these by running the model once on one zero
    image. Any other layer becomes a BinaryLinear or BinaryConv2d with a trainable gain, which is correct whether or not
    a later layer normalises. Afterwards each weight holds its latents, clip(w / (2 mean|w|), -1, 1).

    With a `scale`, which the optimizer's group must name too, the latents are the unchanged weights, and no layer has a
    gain: weights in {-s, +s} have their own scale. `fold_scales` turns it into a gain, for deployment.

    With `inputs`, each of these layers also quantizes its inputs. A transformer's products of queries with keys and of
    attention with values have no weights and stay real. With `sums`, the layers' sums of products wrap around too.

    Draws no random numbers. Raises ValueError, with the model unchanged, if an item of `keep` matches nothing, no layer
    is eligible, a layer can't be binarized without changing what the model computes, or, with `inputs`, a layer's
    inputs are never negative (found by running the model once on one image of fixed noise).
    """
    layers = _eligible_layers(model, keep)
    if not layers:
        raise ValueError(f"{type(model).__name__}: nothing to binarize besides {' and '.join(keep)}")
    scale_free = layers_before_batch_norm(model, layers, _zero_image(model))
    if inputs is not None:
        _require_signs(model, layers)
    needs_gain = {name: scale == "none" and name not in scale_free for name in layers}
    _require_twins(layers, needs_gain, has_inputs=inputs is not None, has_scale=scale != "none")
    twins = {
        name: _twin(layer, with_gain=needs_gain[name], inputs=inputs, sums=sums)
        for name, layer in layers.items()
        if name not in scale_free or inputs is not None or scale != "none"
    }
    for name, twin in twins.items():
        model.set_submodule(name, twin)
    if scale == "none":
        with torch.no_grad():
            for layer in layers.values():  # a twin shares its layer's weight
                layer.weight.copy_(latents(layer.weight))
    return _split(model, binary={f"{name}.weight" for name in layers})


def binarize_inputs(model: nn.Module, keep: Sequence[str], inputs: InputQuantization) -> None:
    """Binarize the inputs of every eligible layer of `model`, in place, and leave its weights real: the first stage.

    It changes the layers that `binarize` would, and raises ValueError for the same reasons, with the model unchanged.
    """
    layers = _eligible_layers(model, keep)
    if not layers:
        raise ValueError(f"{type(model).__name__}: nothing to binarize besides {' and '.join(keep)}")
    _require_signs(model, layers)
    _require_twins(layers, dict.fromkeys(layers, False), has_inputs=True, has_scale=False)
    twins = {name: _twin(layer, with_gain=False, inputs=inputs) for name, layer in layers.items()}
    for name, twin in twins.items():
        model.set_submodule(name, twin)


@torch.no_grad()
def fold_scales(model: nn.Module, split: Split) -> None:
    """Replace deployed weights in {-s, +s} by +-1 and make s the layer's gain; logits stay the same to the bit.

    A layer computes with gain . weight, and s . (+-1) is exact. For models whose layers `binarize` gave no gains.

    Raises:
        ValueError: the weights of an output channel differ in modulus.
    """
    for name in split.binary:
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, BinaryLinear | BinaryConv2d)  # noqa: S101  (`binarize` made it one)
        modulus = layer.weight.abs().flatten(1)
        scale = modulus[:, 0].clone()
        if not bool((modulus == scale[:, None]).all()):
            raise ValueError(f"{name}: its weights are not -s and +s, so they have no scale to fold")
        layer.gain = nn.Parameter(scale, requires_grad=layer.weight.requires_grad)
        layer.weight.copy_(torch.where(layer.weight < 0, -1.0, 1.0))


def full_precision(model: nn.Module) -> Split:
    """The groups of the full-precision baseline: nothing binary, the model unchanged."""
    return _split(model, binary=())


def latents(weight: Tensor) -> Tensor:
    """w* = clip(w / (2 mean|w|), -1, 1), one mean per layer. Keeps shape and dtype; a weight of zeros stays zero."""
    scale = (2 * weight.abs().mean()).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scale).clamp(-1, 1)


def _require_twins(
    layers: Mapping[str, Matrix], needs_gain: Mapping[str, bool], *, has_inputs: bool, has_scale: bool
) -> None:
    """ValueError if layers need a binary twin but their type has none; the message says which, and how to keep them."""
    without = [
        name
        for name, layer in layers.items()
        if (needs_gain[name] or has_inputs or has_scale) and not _has_twin(layer, has_inputs=has_inputs)
    ]
    if without:
        kind = type(layers[without[0]]).__name__
        lack = "with binary inputs" if has_inputs else "with a gain or scale, and no batch norm follows it"
        raise ValueError(not_binary(without, f"a {kind} has no binary twin {lack}"))


def _has_twin(layer: Matrix, *, has_inputs: bool) -> bool:
    """Checked by exact type: a subclass may add behaviour that the twin would lose."""
    # ClippedConv2d adds a clip of its inputs; the twin takes their sign instead.
    return type(layer) in (nn.Linear, nn.Conv2d) or (type(layer) is ClippedConv2d and has_inputs)


def _twin(
    layer: Matrix,
    *,
    with_gain: bool,
    inputs: InputQuantization | None,
    sums: SumQuantization | None = None,
) -> BinaryLinear | BinaryConv2d:
    """The binary twin of a layer that has one."""
    quantized = None if inputs is None else BinaryInput(inputs)
    accumulator = None if sums is None else Accumulator(sums.bits, sums.slope)
    if isinstance(layer, nn.Linear):
        return BinaryLinear.from_layer(layer, with_gain=with_gain, inputs=quantized, accumulator=accumulator)
    assert isinstance(layer, nn.Conv2d)  # noqa: S101  (checked by `_require_twins`)
    return BinaryConv2d.from_layer(layer, with_gain=with_gain, inputs=quantized, accumulator=accumulator)


def _require_signs(model: nn.Module, layers: dict[str, Matrix]) -> None:
    constant = layers_that_see_no_sign(model, layers, _noise_image(model))
    if constant:
        raise ValueError(
            f"{constant[0]}: its inputs are never negative (after a ReLU?), so their sign would be +1 everywhere; "
            "for binary inputs use a bireal_* or reactnet_* model, which has no ReLU there"
        )


def _eligible_layers(model: nn.Module, keep: Sequence[str]) -> dict[str, Matrix]:
    """Every convolution and linear layer that is not kept, by name."""
    kept = {name for names in kept_layers(model, keep).values() for name in names}
    return {name: layer for name, layer in matrices(model).items() if name not in kept}


def _zero_image(model: nn.Module) -> Tensor:
    """One image of the size the model was created for, on its device and in its dtype: (1, C, H, W)."""
    parameter = next(model.parameters())
    channels, height, width = metadata(model)["input_size"]
    return parameter.new_zeros(1, channels, height, width)


def _noise_image(model: nn.Module) -> Tensor:
    """One image like the zero image, but of standard normal noise, always the same: (1, C, H, W)."""
    zeros = _zero_image(model)
    return torch.randn(zeros.shape, generator=torch.Generator().manual_seed(0)).to(zeros)


def _split(model: nn.Module, binary: Collection[str]) -> Split:
    """The parameter groups, given which parameters are binary."""
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
