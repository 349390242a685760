"""Hugging Face data sets as written by `save_to_disk`: Arrow files, read by index, offline.

    datasets.load_dataset(NAME).save_to_disk("DATA/tiny")        in a grid: dataset: hf/tiny

A row is located by text, like a file, so that the image-file reader can read rows as well.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import DataError

if TYPE_CHECKING:
    from suite.data.source import Source

PREFIX = "arrow:"
_VALIDATION = ("validation", "valid", "val")
_LABELS = ("label", "labels", "fine_label")
"""The column to use if several hold classes: fine_label is CIFAR-100's."""


def is_row(location: str) -> bool:
    """Whether the location refers to an Arrow row rather than a file."""
    return location.startswith(PREFIX)


def image_of(location: str) -> io.BytesIO | str:
    """The row's encoded image, or the path of the file it refers to: either can be passed to Pillow's `open`."""
    number, column, folder = location.removeprefix(PREFIX).split(":", 2)
    held = _rows(folder, column)[int(number)][column]
    return io.BytesIO(held["bytes"]) if held["bytes"] is not None else str(held["path"])


def load(name: str, place: Path, *, with_test: bool) -> "Source":
    """The train and test splits, and the validation split if there is one.

    Raises:
        DataError: the package or the folder is missing, or a split has no column of images or of classes.
    """
    from suite.data.source import Source

    found = _splits(name, place)
    validation = next((each for each in _VALIDATION if each in found), None)
    needed = ["train", *(["test"] if with_test else []), *([validation] if validation else [])]
    if missing := [each for each in needed if each not in found]:
        raise DataError(
            f"{place}: it has the splits {', '.join(found)} and lacks {missing[0]}; rename one before save_to_disk"
        )
    parts, classes = {}, {}
    for split in needed:
        parts[split], classes[split] = _part(place / split)
    if different := [split for split in needed if classes[split] != classes["train"]]:
        raise DataError(f"{place}: train and {different[0]} have different classes")
    checksum = hashlib.sha256("\n".join(_facts(place, needed)).encode()).hexdigest()
    held = parts[validation] if validation else None
    from suite.data.datasets import USUAL_SIZE

    return Source(classes["train"], parts["train"], parts.get("test"), USUAL_SIZE, checksum, held)


def _splits(name: str, place: Path) -> list[str]:
    try:
        return list(json.loads((place / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{name}: {place} has no dataset_dict.json, as Hugging Face's load_dataset(...).save_to_disk(...) writes it"
        ) from error


def _part(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """A split and the names of its classes."""
    import torch

    from suite.data.source import Files

    rows = _loaded(str(folder))
    kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    label = next((column for column in _LABELS if column in labels), labels[0] if len(labels) == 1 else None)
    if len(images) != 1 or label is None:
        told = ", ".join(f"{column}: {kind}" for column, kind in kinds.items())
        raise DataError(f"{folder}: one column of images and one of classes are expected, found {told}")
    values = torch.tensor(rows[label][:])
    if len(values) and int(values.min()) < 0:
        raise DataError(f"{folder}: images without labels ({int((values < 0).sum()):,} of {len(values):,})")
    paths = tuple(f"{PREFIX}{number}:{images[0]}:{folder}" for number in range(len(values)))
    return Files(paths, values), tuple(rows.features[label].names)


def _facts(place: Path, splits: list[str]) -> Iterator[str]:
    """Input of the checksum: file names, file sizes, and the contents of dataset_info.json."""
    for split in splits:
        for path in sorted((place / split).iterdir()):
            content = path.read_text(encoding="utf-8") if path.name == "dataset_info.json" else ""
            yield f"{split}/{path.name} {path.stat().st_size} {content}"


@cache
def _loaded(folder: str) -> Any:  # noqa: ANN401  (a datasets.Dataset)
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise DataError(f"{folder}: needs Hugging Face's datasets: pip install 'proxbench[huggingface]'") from error
    try:
        return load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read: {' '.join(str(error).split())[:160]}") from error


@cache
def _rows(folder: str, column: str) -> Any:  # noqa: ANN401
    """The split, with images still encoded."""
    from datasets import Image

    return _loaded(folder).cast_column(column, Image(decode=False))
