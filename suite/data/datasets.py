"""Data sets by name: uint8 pixels in memory, or the files of an image folder.

`digits` ships in scikit-learn's wheel; `fashion-mnist` comes from Debian's dataset-fashion-mnist or torchvision;
`cifar10` and `cifar100` from torchvision's files or class folders; `imagenet` and `folder/NAME` are class folders
DIRECTORY/NAME/{train,test}/CLASS/*.jpg (imagenet's second folder is `val`; others may have one for validation);
`hf/NAME` is DIRECTORY/NAME as written by Hugging Face's `save_to_disk`.
`python -m suite.data prepare` makes FFCV files, DIRECTORY/NAME/{train,test}.beton, of cifar10, cifar100, imagenet and
folder/NAME.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Literal

import torch

from suite.data import arrow
from suite.data.beton import read_index
from suite.data.class_folders import list_source
from suite.data.decoding import read_rgb
from suite.data.in_memory import LOADERS
from suite.data.manifest import Manifest, read_manifest
from suite.data.source import Encoded, Files, Source
from suite.errors import DataError

LoaderName = Literal["auto", "memory", "torch", "ffcv"]
_KINDS = ("folder/", "hf/")
USUAL_SIZE = 224
"""Image side, in pixels, for data sets without one of their own."""


GREY = frozenset({"digits", "fashion-mnist"})
"""Data sets whose images have one channel."""


def names() -> list[str]:
    """Names a grid may use; `folder/NAME` means any image folder, `hf/NAME` any Hugging Face data set."""
    return [*LOADERS, "imagenet", "folder/NAME", "hf/NAME"]


def is_known(name: str) -> bool:
    """Whether a grid may use the name. Does not check that the files exist: `load` does."""
    return name in LOADERS or name == "imagenet" or any(name.startswith(kind) and name != kind for kind in _KINDS)


def load(name: str, directory: Path, loader: LoaderName = "auto", *, with_test: bool = True) -> Source:
    """The data set `name` under `directory`, in the form that the named loader reads, optionally without its test part.

    Raises:
        DataError: the files are missing and could not be downloaded, or the loader does not support them.
    """
    place = directory / name.partition("/")[2] if name.startswith(_KINDS) else directory / name
    test_split = "val" if name == "imagenet" else "test"
    if loader == "memory" or (loader == "auto" and name in LOADERS):
        if name not in LOADERS:
            raise DataError(f"execution.loader: memory holds {', '.join(LOADERS)}; for {name} take ffcv or torch")
        return LOADERS[name](directory, with_test=with_test)
    if name.startswith("hf/") and loader != "ffcv":
        return arrow.load(name, place, with_test=with_test)
    if loader == "ffcv" or (loader == "auto" and _beton(place, "train").exists()):
        return _prepared(name, place, test_split, with_test=with_test)
    return _scan(name, place, with_test=with_test)


def is_small(name: str) -> bool:
    """Whether the images have one size and fit in memory; such data sets are normalised by their own statistics."""
    return name in LOADERS


def _beton(place: Path, split: str) -> Path:
    return place / f"{split}.beton"


def _prepared(name: str, place: Path, test_split: str, *, with_test: bool) -> Source:
    """The files written by `suite.data prepare`. They are not read in full: checking them is `verify`'s job."""
    if not _beton(place, "train").exists():
        kind = "imagefolder" if name.startswith("folder/") else name
        raise DataError(
            f"{_beton(place, 'train')}: not there; python -m suite.data prepare {kind} --source DIR --out {place}"
        )
    if importlib.util.find_spec("ffcv") is None:
        raise DataError(
            f"{_beton(place, 'train')}: needs FFCV: pip install proxbench[ffcv], which is built from OpenCV and "
            "TurboJPEG (on Debian: apt-get install pkg-config libopencv-dev libturbojpeg0-dev); "
            "or, for image files, --set execution.loader=torch"
        )
    splits = ["train", *([test_split] if with_test else [])]
    splits += ["val"] if test_split != "val" and _beton(place, "val").exists() else []
    found = {split: _encoded(_beton(place, split)) for split in splits}
    parts = {split: part for split, (part, _) in found.items()}
    manifests = [manifest for _, manifest in found.values()]
    if any(manifest.classes != manifests[0].classes for manifest in manifests):
        raise DataError(f"{place}: the splits have different classes; prepare them from one folder")
    index = read_index(parts["train"].path)
    sides = {int(side) for lengths in (index.heights, index.widths) for side in (lengths.min(), lengths.max())}
    size = sides.pop() if len(sides) == 1 else USUAL_SIZE
    checksum = hashlib.sha256(" ".join(manifest.sha256 for manifest in manifests).encode()).hexdigest()
    test = parts[test_split] if with_test else None
    validation = parts.get("val") if test_split != "val" else None
    return Source(tuple(manifests[0].classes), parts["train"], test, size, checksum, validation)


def _encoded(path: Path) -> tuple[Encoded, Manifest]:
    manifest = read_manifest(path)
    if path.stat().st_size != manifest.num_bytes:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, its manifest says {manifest.num_bytes}; "
            f"check it with python -m suite.data verify {path}"
        )
    labels = torch.from_numpy(read_index(path).labels)
    return Encoded(path, torch.arange(len(labels)), labels), manifest


def _scan(name: str, place: Path, *, with_test: bool) -> Source:
    """Class folders; the checksum covers names and sizes. Small data sets get the memory loader's splits and size."""
    splits = {split.name: split for split in list_source(name, place, with_test=with_test)}
    size = USUAL_SIZE
    if is_small(name):
        splits.pop("val", None)
        size = read_rgb(Files.of(splits["train"]).paths[0]).shape[1]
    parts = {split: Files.of(found) for split, found in splits.items()}
    checksum = hashlib.sha256(" ".join(split.sha256 for split in splits.values()).encode()).hexdigest()
    test_split = "val" if name == "imagenet" else "test"
    validation = None if test_split == "val" else parts.get("val")
    return Source(splits["train"].classes, parts["train"], parts.get(test_split), size, checksum, validation)
