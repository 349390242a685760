"""Published weights to start from: a local file if it exists, otherwise timm's on the Hugging Face hub.

    model, sha256 = pretrained("resnet18.a1_in1k", 1000, 224, 3, Path("data"))

Local files are tried first: DATA/weights/NAME.safetensors, .pth, .pt, .bin, each a state dict or a timm checkpoint
(the averaged weights, if it has both). On the hub, the name's tag selects the weights: a name without a tag is an
architecture, whose default weights change with timm's version.
"""

import hashlib
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import models
from models.catalog import metadata
from suite.errors import UserError
from suite.recipe.settings import Interpolation

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_TIMEOUT_SECONDS = 5.0
"""Timeout for the hub's first answer, so that a machine without internet fails quickly."""


class PretrainedError(UserError):
    """There are no such weights, or they do not fit the model."""


def pretrained(
    name: str, num_classes: int, image_size: int, in_chans: int, data_dir: Path, *, own_classes: bool = False
) -> tuple[nn.Module, str]:
    """The network `name` with published weights, as `models.create` makes it, and the SHA-256 of their file.

    timm adapts them: position embeddings to the image size, the first layer to `in_chans`. A head of another number of
    classes is drawn, as `models.create` draws it from torch's generator, which is left as a fresh network leaves it.

    Raises:
        PretrainedError: nothing published under that name, no way to the hub, a file that is not of this model, or,
            with `own_classes`, a head of another number of classes.
    """
    model = models.create(name, num_classes, image_size, in_chans)
    file = _local(name, data_dir) or _from_hub(name, data_dir)
    with torch.random.fork_rng(devices=[]):
        source, num_source_classes = _source(name, file, image_size, in_chans)
    if own_classes and num_source_classes != num_classes:
        raise PretrainedError(f"{file}: of {num_source_classes} classes, and the data set has {num_classes}")
    weights = source.state_dict()
    heads = tuple(f"{head}." for head in _heads(metadata(model)))
    if num_source_classes != num_classes:
        weights = {key: value for key, value in weights.items() if not key.startswith(heads)}
    model.load_state_dict(weights, strict=num_source_classes == num_classes)
    return model, _sha256(file)


class Preprocessing(NamedTuple):
    """What a network's published weights saw: mean and std of each channel, and how images were resized."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation


def preprocessing(name: str) -> Preprocessing:
    """From timm's pretrained configuration; bilinear if its interpolation is neither bilinear nor bicubic."""
    import timm

    config = timm.get_pretrained_cfg(name)
    interpolation: Interpolation = "bicubic" if config.interpolation == "bicubic" else "bilinear"
    return Preprocessing(tuple(config.mean), tuple(config.std), interpolation)


def _local(name: str, data_dir: Path) -> Path | None:
    candidates = [data_dir / "weights" / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((path for path in candidates if path.is_file()), None)


def require_named(name: str, data_dir: Path) -> None:
    """PretrainedError if DATA/weights has no file of that name and timm knows no such weights."""
    if _local(name, data_dir) is not None:
        return
    import timm

    tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    if name not in tags:
        choice = f"has published weights as {', '.join(tags)}: name one, or" if tags else "has no published weights:"
        place = data_dir / "weights" / f"{name}{SUFFIXES[0]}"
        raise PretrainedError(f"published weights: {name} {choice} put your own at {place}")


def _from_hub(name: str, data_dir: Path) -> Path:
    """The hub's file in its cache, downloaded if it is not there yet."""
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
    except Exception as error:  # httpx's, requests' or the hub's own: they all mean no file
        raise PretrainedError(
            f"published weights: {name}: no {place}, and {url} cannot be had from here ({type(error).__name__}): "
            "download it where there is internet and put it there"
        ) from error


def _download(hub_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    file = _HUB_FILES[0]
    try:
        # By itself, hf_hub_download retries for minutes if the hub does not answer.
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
    except Exception as error:  # each architecture adapts files in its own way, and may trip over a strange one
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
    """Module names of the classifier head(s) in timm's metadata."""
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
