"""Data sets by name, as they lie on disk: uint8 pixels in memory, or the files of an image folder.

`digits` ships in scikit-learn's wheel; `fashion-mnist` comes from Debian's dataset-fashion-mnist or torchvision;
`cifar10` and `cifar100` from torchvision's files or class folders; `imagenet` and `folder/NAME` are class folders
DIRECTORY/NAME/{train,test}/CLASS/*.jpg (imagenet's second folder is `val`).
"""

import gzip
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from suite.errors import UserError
from suite.seeds import stream

SPLIT_SEED = stream(0, "split")
"""Every split is drawn from this one seed: fixed for all cells, on all machines."""
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class DataError(UserError):
    """A data set is not where it should be; the message says where that is."""


@dataclass(frozen=True)
class Pixels:
    """images: uint8 [N, C, H, W]; labels: int64 [N]."""

    images: Tensor
    labels: Tensor

    def subset(self, index: Tensor) -> "Pixels":
        """The images at `index` (int64 [M]), in that order."""
        return Pixels(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Files:
    """paths: N image files, decoded when asked for; labels: int64 [N]."""

    paths: tuple[Path, ...]
    labels: Tensor

    def subset(self, index: Tensor) -> "Files":
        """The files at `index` (int64 [M]), in that order."""
        return Files(tuple(self.paths[i] for i in index.tolist()), self.labels[index])


@dataclass(frozen=True)
class Source:
    """A data set; `checksum` is what provenance records of it."""

    classes: tuple[str, ...]
    train: Pixels | Files
    test: Pixels | Files
    image_size: int
    checksum: str

    @property
    def in_chans(self) -> int:
        """Colour channels; decoded files are RGB."""
        return self.train.images.shape[1] if isinstance(self.train, Pixels) else 3


def names() -> list[str]:
    """Names a grid may use; `folder/NAME` stands for any image folder."""
    return [*_LOADERS, "imagenet", "folder/NAME"]


def is_known(name: str) -> bool:
    """Whether a grid may use the name; whether the files are there is `load`'s question."""
    return name in _LOADERS or name == "imagenet" or (name.startswith("folder/") and len(name) > len("folder/"))


def load(name: str, directory: Path) -> Source:
    """The data set `name`, looked for under `directory`.

    Raises:
        DataError: the files are not there and could not be downloaded.
    """
    if name in _LOADERS:
        return _LOADERS[name](directory)
    classes, train, test, checksum = _scan(
        directory / name.removeprefix("folder/"), "val" if name == "imagenet" else "test"
    )
    return Source(classes, train, test, 224, checksum)


def hold_out(num: int, fraction: float) -> tuple[Tensor, Tensor]:
    """(kept, held out): sorted int64 indices into `num` samples, a fixed random share, the same for all seeds."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(SPLIT_SEED))
    num_held_out = round(num * fraction)
    return order[num_held_out:].sort().values, order[:num_held_out].sort().values


def _digits(_directory: Path) -> Source:
    """1,797 grey 8x8 images. scikit-learn names no test set; ours is a fixed fifth (359)."""
    # The file load_digits() reads, without the two seconds that importing scikit-learn would cost each run.
    file = Path(str(distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")))
    table = torch.tensor(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    # 17 grey levels, 0 to 16: times 15 spreads them over a byte.
    digits = Pixels(table[:, :-1].reshape(-1, 1, 8, 8) * 15, table[:, -1].long())
    train, test = hold_out(len(table), 0.2)
    return _in_memory(tuple("0123456789"), digits.subset(train), digits.subset(test))


def _fashion_mnist(directory: Path) -> Source:
    classes = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    places = [directory / "fashion-mnist", directory / "FashionMNIST" / "raw", DEBIAN_FASHION_MNIST]
    for place in places:
        if all((place / f"{part}-images-idx3-ubyte.gz").is_file() for part in ("train", "t10k")):
            return _in_memory(classes, _idx(place, "train"), _idx(place, "t10k"))
    from torchvision.datasets import FashionMNIST

    _download(FashionMNIST, directory, "fashion-mnist", "or, on Debian, apt-get install dataset-fashion-mnist")
    return _in_memory(classes, _idx(places[1], "train"), _idx(places[1], "t10k"))


def _idx(place: Path, part: str) -> Pixels:
    """Reads MNIST's IDX files: a big-endian header (16 bytes for images, 8 for labels), then bytes."""
    images = np.frombuffer(gzip.decompress((place / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((place / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return Pixels(torch.tensor(images.reshape(-1, 1, 28, 28)), torch.tensor(labels, dtype=torch.int64))


def _cifar(name: str) -> Callable[[Path], Source]:
    def load_cifar(directory: Path) -> Source:
        from torchvision import datasets

        if (directory / name / "train").is_dir():
            classes, train_files, test_files, _ = _scan(directory / name, "test")
            return _in_memory(classes, _decode(train_files), _decode(test_files))
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        if not (directory / kind.base_folder).is_dir():
            _download(kind, directory, name, f"or class folders as {directory / name}/{{train,test}}/CLASS/*.jpg")
        parts = [kind(directory, train=train) for train in (True, False)]
        train, test = (
            Pixels(torch.tensor(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)) for part in parts
        )
        return _in_memory(tuple(parts[0].classes), train, test)

    return load_cifar


_LOADERS: dict[str, Callable[[Path], Source]] = {
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
            f"put torchvision's files there, {otherwise}; --data-dir names another place"
        ) from error


def _in_memory(classes: tuple[str, ...], train: Pixels, test: Pixels) -> Source:
    digest = hashlib.sha256()
    for part in (train, test):
        digest.update(part.images.contiguous().numpy().data)
        digest.update(part.labels.numpy().data)
    return Source(classes, train, test, train.images.shape[-1], digest.hexdigest())


def _decode(files: Files) -> Pixels:
    """Decodes files of one size."""
    return Pixels(torch.stack([read_image(path) for path in files.paths]), files.labels)


def read_image(path: Path) -> Tensor:
    """The file's image as RGB, uint8 [3, H, W].

    Raises:
        DataError: it cannot be decoded; the message names the file.
    """
    try:
        with Image.open(path) as image:
            return torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be decoded ({error})") from error


def _scan(place: Path, test_folder: str) -> tuple[tuple[str, ...], Files, Files, str]:
    """(classes in order, training files, test files, digest of relative paths and sizes)."""
    digest = hashlib.sha256()
    classes = {folder: _class_names(place / folder) for folder in ("train", test_folder)}
    names = classes["train"]
    if classes[test_folder] != names:
        different = ", ".join(sorted(set(names) ^ set(classes[test_folder]))[:5])
        raise DataError(f"{place}: train and {test_folder} have different classes: {different}")
    parts = []
    for folder in classes:
        paths = [path for name in names for path in sorted((place / folder / name).iterdir()) if _is_image(path)]
        for path in paths:
            digest.update(f"{path.relative_to(place)} {path.stat().st_size}\n".encode())
        number = {name: index for index, name in enumerate(names)}
        parts.append(Files(tuple(paths), torch.tensor([number[path.parent.name] for path in paths])))
    return names, parts[0], parts[1], digest.hexdigest()


def _class_names(folder: Path) -> tuple[str, ...]:
    found = tuple(sorted(entry.name for entry in folder.glob("*") if entry.is_dir()))
    if not found:
        raise DataError(f"{folder}: no class folders; expected {folder.name}/CLASS/*.jpg (--data-dir names the parent)")
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES
