"""Published initial weights: a local file if it exists, otherwise timm's on the Hugging Face hub.

    model, sha256 = pretrained("resnet18.a1_in1k", 1000, 224, 3, Path("data"))

Local files are tried first: DATA/weights/NAME.safetensors, .pth, .pt, .bin, each a state dict or a timm checkpoint
(whose averaged weights are used if it has both). On the hub, the name's tag selects the weights: a name without a tag
is only an architecture, whose default weights change with timm's version.
"""

import hashlib
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import models
from models.catalog import metadata
from quantizers.names import is_own
from suite.errors import UserError
from suite.recipe.settings import Interpolation

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_TIMEOUT_SECONDS = 5.0
"""Timeout for the hub's first response, so that a machine without internet fails quickly."""


class PretrainedError(UserError):
    """The weights do not exist or do not fit the model."""


def pretrained(
    name: str, num_classes: int, image_size: int, in_chans: int, data_dir: Path, *, own_classes: bool = False
) -> tuple[nn.Module, str]:
    """The network `name` from `models.create`, with published weights, and the SHA-256 of their file.

    timm adapts the weights: position embeddings to the image size, the first layer to `in_chans`. If the number of
    classes differs, the head keeps the random values from `models.create`. torch's generator advances as for a new
    network.

    Raises:
        PretrainedError: nothing is published under that name, the hub cannot be reached, the file is for another model,
            or, with `own_classes`, its head has another number of classes.
    """
    model = models.create(name, num_classes, image_size, in_chans)
    file = _local(name, data_dir) or _from_hub(name, data_dir)
    with torch.random.fork_rng(devices=[]):
        source, num_source_classes = _source(name, file, image_size, in_chans)
    if own_classes and num_source_classes != num_classes:
        raise PretrainedError(f"{file}: for {num_source_classes} classes, but the data set has {num_classes}")
    weights = source.state_dict()
    heads = tuple(f"{head}." for head in _heads(metadata(model)))
    if num_source_classes != num_classes:
        weights = {key: value for key, value in weights.items() if not key.startswith(heads)}
    model.load_state_dict(weights, strict=num_source_classes == num_classes)
    return model, _sha256(file)


class Preprocessing(NamedTuple):
    """The preprocessing that published weights were trained with: mean and std per channel, and interpolation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation


def preprocessing(name: str) -> Preprocessing:
    """The preprocessing in timm's pretrained configuration; bilinear if it is neither bilinear nor bicubic."""
    import timm

    config = timm.get_pretrained_cfg(name)
    interpolation: Interpolation = "bicubic" if config.interpolation == "bicubic" else "bilinear"
    return Preprocessing(tuple(config.mean), tuple(config.std), interpolation)


def _local(name: str, data_dir: Path) -> Path | None:
    if is_own(name):
        raise PretrainedError(f"published weights: {name} is your own model: only timm's have published weights")
    candidates = [data_dir / "weights" / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((path for path in candidates if path.is_file()), None)


def require_named(name: str, data_dir: Path) -> None:
    """Raises PretrainedError if DATA/weights has no file of that name and timm has no such weights."""
    if _local(name, data_dir) is not None:
        return
    import timm

    tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    if name not in tags:
        choice = f"has published weights as {', '.join(tags)}: name one, or" if tags else "has no published weights:"
        place = data_dir / "weights" / f"{name}{SUFFIXES[0]}"
        raise PretrainedError(f"published weights: {name} {choice} put your own at {place}")


def _from_hub(name: str, data_dir: Path) -> Path:
    """Path of the hub's file in the cache, downloaded if it is not there yet."""
    import huggingface_hub
    import timm

    require_named(name, data_dir)
    place = data_dir / "weights" / f"{name}{SUFFIXES[0]}"
    config = timm.get_pretrained_cfg(name)
    if not config.hf_hub_id:
        url = config.url if isinstance(config.url, str) else config.url[0]
        raise PretrainedError(f"published weights: {name} is not on the hub: put {url} at {place.with_suffix('.pth')}")
    for file in _HUB_FILES:
        cached = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, file)
        if isinstance(cached, str):
            return Path(cached)
    url = huggingface_hub.hf_hub_url(config.hf_hub_id, _HUB_FILES[0])
    try:
        return _download(config.hf_hub_id)
    except Exception as error:  # from httpx, requests or the hub: each means that there is no file
        raise PretrainedError(
            f"published weights: {name}: no {place}, and {url} cannot be downloaded ({type(error).__name__}): "
            "download it on a machine with internet access and copy it to that path"
        ) from error


def _download(hub_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    file = _HUB_FILES[0]
    try:
        # Check first, because hf_hub_download retries for minutes if the hub does not respond.
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(hub_id, file), timeout=_HUB_TIMEOUT_SECONDS)
    except EntryNotFoundError:
        file = _HUB_FILES[1]
    return Path(huggingface_hub.hf_hub_download(hub_id, file))


def _source(name: str, file: Path, image_size: int, in_chans: int) -> tuple[nn.Module, int]:
    """The file's network, adapted to the image size and channels, and the number of classes of the file's head."""
    import timm

    weights = _read(file)
    config = timm.get_pretrained_cfg(name)
    rows = [len(weights[key]) for head in _heads(vars(config)) if (key := f"{head}.weight") in weights]
    num_classes = rows[0] if rows else config.num_classes
    size = {"img_size": image_size} if config.fixed_input_size else {}
    overlay = {"state_dict": weights, "num_classes": num_classes}
    settings = {"num_classes": num_classes, "in_chans": in_chans, **size}
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **settings)
    except Exception as error:  # each architecture adapts files in its own way and may fail on others
        raise PretrainedError(f"{file}: not the weights of {name}: {_in_one_line(error)}") from error
    return model, num_classes


def _read(file: Path) -> dict[str, Tensor]:
    from timm.models import load_state_dict

    try:
        weights: dict[str, Tensor] = load_state_dict(str(file))
        strange = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    except Exception as error:  # torch's, safetensors', pickle's, zipfile's
        raise PretrainedError(f"{file}: cannot be read as weights: {_in_one_line(error)}") from error
    if strange or not weights:
        what = f"{strange[0]!r} is no tensor" if strange else "it is empty"
        raise PretrainedError(f"{file}: cannot be read as weights: {what}")
    return weights


def _heads(config: dict[str, Any]) -> tuple[str, ...]:
    """Module names of the classifier heads in timm's metadata."""
    heads = config["classifier"]
    return (heads,) if isinstance(heads, str) else tuple(heads)


def _in_one_line(error: Exception) -> str:
    lines = [textwrap.shorten(line, 150) for line in str(error).splitlines()[:4] if line.strip()]
    return " ".join(lines) or type(error).__name__


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
