"""Model names (ours, every classifier of timm, a user's `module:function`) and timm's metadata for them.

Weights are always freshly initialised, never downloaded. Looking up timm's names imports timm, which takes seconds; our
names are known without it.
"""

import difflib
import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from torch import nn

from quantizers.names import is_own, own

OURS = frozenset(
    (
        *("resnet8", "resnet20", "resnet32", "resnet56"),
        *(f"{family}_resnet{depth}" for family in ("bireal", "reactnet") for depth in (8, 18, 20)),
        *("vit_mini_patch2_8", "vit_mini_patch4_32"),
    )
)
"""The architectures that this package adds to timm's."""

_USERS_SIZE = 32

_RATES = {"drop_rate": "dropout", "drop_path_rate": "drop_path"}
"""timm's names of the rates: ours."""


def create(
    name: str, num_classes: int, image_size: int, in_chans: int = 3, *, dropout: float = 0.0, drop_path: float = 0.0
) -> nn.Module:
    """The network `name` with fresh weights: (B, in_chans, image_size, image_size) -> logits (B, num_classes).

    `dropout` and `drop_path` are timm's drop_rate and drop_path_rate.

    A user's own `module:function` is called with the keywords `num_classes` and `in_chans`, with `image_size` if it
    names that parameter, and with `drop_rate` and `drop_path_rate` where they are not 0.

    Raises ValueError if the name is unknown (the message lists the closest ones), the network has no such rate, or a
    user's function fails.
    """
    # With this, timm sets in_chans, sets img_size on models that fix it, and keeps the metadata true of the model.
    shape = {"input_size": (in_chans, image_size, image_size)}
    rates = {key: rate for key, rate in zip(_RATES, (dropout, drop_path), strict=True) if rate}
    try:
        if is_own(name):
            model = _users_own(name, image_size, num_classes=num_classes, in_chans=in_chans, **rates)
        elif is_known(name):
            model = _timm().create_model(name, num_classes=num_classes, pretrained_cfg_overlay=shape, **rates)
        else:
            close = suggest(name)
            hint = f"did you mean {' or '.join(repr(match) for match in close)}? " if close else ""
            raise ValueError(f"model: unknown {name!r}; {hint}(models.names() lists all {len(names())})")
    except TypeError as error:
        for key, ours in _RATES.items():
            if f"'{key}'" in str(error):
                raise ValueError(f"{ours}: {name} has no {key}") from error
        raise
    if "input_size" not in metadata(model):  # a user's constructor need not record it as timm's do; binarize reads it
        model.pretrained_cfg = metadata(model) | shape  # type: ignore[assignment]  # a dict, as timm sets it
    return model


def _users_own(name: str, image_size: int, **keywords: float) -> nn.Module:
    function: Callable[..., object] = own(name, callable, "function")
    signature = inspect.signature(function)
    if "image_size" in signature.parameters:
        keywords["image_size"] = image_size
    try:
        signature.bind(**keywords)
    except TypeError as error:
        if any(f"'{rate}'" in str(error) for rate in _RATES):
            raise
        raise ValueError(f"{name} is called with {', '.join(keywords)}: {error}") from error
    try:
        made = function(**keywords)
    except Exception as error:  # whatever the user's function raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{name} cannot make a network: {reason}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} returned a {type(made).__name__}, not an nn.Module")  # noqa: TRY004 (one line)
    return made


def is_known(name: str) -> bool:
    """Whether `create` knows the name: an architecture, or an architecture and a tag (`resnet18.a1_in1k`).

    A user's `module:function` counts as known; `skeleton` tries it.
    """
    return is_own(name) or name in OURS or name in names() or name in _tagged_names()


def suggest(name: str) -> list[str]:
    """Known names that look like `name`, closest first; at most three."""
    return difflib.get_close_matches(name, names(), n=3)


def input_size(name: str) -> int:
    """Side in pixels of the images the model was designed for; its images are square. A user's function: 32."""
    return _USERS_SIZE if is_own(name) else int(_timm().get_pretrained_cfg(name).input_size[-1])


def takes_any_size(name: str) -> bool:
    """Whether one network of that name accepts images of several sizes; vision transformers accept only one.

    A user's function is taken to make networks that do.
    """
    if is_own(name):
        return True
    found = _timm().get_pretrained_cfg(name)
    return not (found and found.fixed_input_size)


def full_precision_layers(model: nn.Module) -> tuple[str, ...]:
    """Module names of the first layer(s) and the classifier head(s), from the metadata that timm puts on the model.

    Raises ValueError if the model has no such metadata, or if it names a module that the model lacks.
    """
    layers: list[str] = []
    for key in ("first_conv", "classifier"):
        value = metadata(model).get(key)
        if not value:
            raise ValueError(
                f"{type(model).__name__}: timm's metadata has no {key!r}, so full_precision: ends finds no layers; "
                "name the layers that stay exact"
            )
        layers += [value] if isinstance(value, str) else value
    unknown = set(layers) - {name for name, _ in model.named_modules()}
    if unknown:
        raise ValueError(f"{type(model).__name__}: timm's metadata names {sorted(unknown)}, which the model lacks")
    return tuple(layers)


def metadata(model: nn.Module) -> dict[str, Any]:
    """The metadata timm put on the model: `first_conv`, `classifier`, `input_size` as created; empty if none."""
    recorded: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    return recorded


@cache
def skeleton(
    name: str,
    num_classes: int = 10,
    image_size: int | None = None,
    in_chans: int = 3,
    *,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> nn.Module:
    """The network from `create`, with shapes and names but no values (on torch's meta device); default: design size."""
    import torch

    size = image_size or input_size(name)
    # A user's function may compute with values, which the meta device does not have.
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if is_own(name) else "meta"):
        return create(name, num_classes, size, in_chans, dropout=dropout, drop_path=drop_path).to("meta")


@cache
def names() -> tuple[str, ...]:
    """Every architecture, sorted, except those that timm has deprecated."""
    return tuple(sorted(_timm().list_models()))


@cache
def _tagged_names() -> frozenset[str]:
    """Every `architecture.tag` for which timm has published weights."""
    return frozenset(_timm().list_models(include_tags=True))


@cache
def _timm() -> ModuleType:
    """Timm with our models registered. Imported only when needed: it takes three seconds."""
    import timm

    from models import bireal, cifar_resnet, small_vit  # noqa: F401 - importing them registers their models

    module: ModuleType = timm
    return module
