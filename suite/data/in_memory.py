"""Data sets of small images of one size: uint8 pixels in memory, unchanged from disk."""

import gzip
import hashlib
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from suite.data.class_folders import list_source
from suite.data.source import SPLIT_SEED, Files, Pixels, Source
from suite.errors import DataError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def _digits(_directory: Path, *, with_test: bool) -> Source:
    """1,797 grey 8x8 images. scikit-learn defines no test set; ours is a fixed fifth (359)."""
    # Read load_digits()'s file directly: importing scikit-learn would cost each run two seconds.
    file = Path(str(distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")))
    table = torch.tensor(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    # The 17 grey levels 0 to 16, times 15, use most of a byte's range.
    digits = Pixels(table[:, :-1].reshape(-1, 1, 8, 8) * 15, table[:, -1].long())
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, train = order[:359].sort().values, order[359:].sort().values
    return _in_memory(tuple("0123456789"), digits.subset(train), digits.subset(test) if with_test else None)


def _fashion_mnist(directory: Path, *, with_test: bool) -> Source:
    classes = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    places = [directory / "fashion-mnist", directory / "FashionMNIST" / "raw", DEBIAN_FASHION_MNIST]
    place = next((place for place in places if _has_idx(place)), None)
    if place is None:
        from torchvision.datasets import FashionMNIST

        _download(FashionMNIST, directory, "fashion-mnist", "or, on Debian, apt-get install dataset-fashion-mnist")
        place = places[1]
    return _in_memory(classes, _idx(place, "train"), _idx(place, "t10k") if with_test else None)


def _has_idx(place: Path) -> bool:
    return all((place / f"{part}-images-idx3-ubyte.gz").is_file() for part in ("train", "t10k"))


def _idx(place: Path, part: str) -> Pixels:
    """Reads MNIST's IDX files: a big-endian header (16 bytes for images, 8 for labels), then bytes."""
    images = np.frombuffer(gzip.decompress((place / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((place / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return Pixels(torch.tensor(images.reshape(-1, 1, 28, 28)), torch.tensor(labels, dtype=torch.int64))


def _cifar(name: str) -> "Load":
    def load_cifar(directory: Path, *, with_test: bool) -> Source:
        from torchvision import datasets

        if (directory / name / "train").is_dir():
            splits = {split.name: split for split in list_source(name, directory / name, with_test=with_test)}
            test = Files.of(splits["test"]).pixels() if with_test else None
            return _in_memory(splits["train"].classes, Files.of(splits["train"]).pixels(), test)
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        if not (directory / kind.base_folder).is_dir():
            _download(kind, directory, name, f"or class folders as {directory / name}/{{train,test}}/CLASS/*.jpg")
        parts = [kind(directory, train=train) for train in ((True, False) if with_test else (True,))]
        pixels = [Pixels(torch.tensor(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)) for part in parts]
        return _in_memory(tuple(parts[0].classes), pixels[0], pixels[1] if with_test else None)

    return load_cifar


class Load(Protocol):
    """Loads a data set from a directory. Without `with_test`, does not read the test part (digits: drops it)."""

    def __call__(self, directory: Path, /, *, with_test: bool) -> Source: ...  # noqa: D102


LOADERS: dict[str, Load] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar("cifar10"),
    "cifar100": _cifar("cifar100"),
}


def _download(kind: Callable[..., object], directory: Path, name: str, otherwise: str) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        kind(directory, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name}: not under {directory}, and the download failed ({str(error).splitlines()[0]}); "
            f"put torchvision's files there, {otherwise}; --data-dir sets another directory"
        ) from error


def _in_memory(classes: tuple[str, ...], train: Pixels, test: Pixels | None) -> Source:
    digest = hashlib.sha256()
    for part in filter(None, (train, test)):
        digest.update(part.images.contiguous().numpy().data)
        digest.update(part.labels.numpy().data)
    return Source(classes, train, test, train.images.shape[-1], digest.hexdigest())
