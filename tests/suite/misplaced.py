"""Makes sources for `prepare`: a good one, one full of odd files, and some with a wrong layout."""

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import malformed


def good_source(
    source: Path, classes: tuple[str, ...] = ("cat", "dog"), splits: tuple[str, ...] = ("train", "test")
) -> Path:
    """Two small JPEGs in each class."""
    for split in splits:
        for name in classes:
            folder = source / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                (folder / f"{number}.jpg").write_bytes(malformed.encoded("JPEG"))
    return source


class Layout(NamedTuple):
    """A source that is rejected as `dataset`: how to break a good one, and a pattern of the message."""

    name: str
    dataset: str
    spoil: Callable[[Path], object]
    says: str


def _add(relative: bytes | str) -> Callable[[Path], object]:
    """Adds a class folder with an image."""

    def spoil(source: Path) -> None:
        folder = source / os.fsdecode(relative)
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(malformed.encoded("JPEG"))

    return spoil


def _both(name: str) -> Callable[[Path], object]:
    return lambda source: [_add(f"{split}/{name}")(source) for split in ("train", "test")]


def _remove(source: Path, *relative: str) -> None:
    for name in relative:
        shutil.rmtree(source / name)


def _move_up(source: Path) -> None:
    for folder in ("cat", "dog"):
        (source / "train" / folder).rename(source / folder)
    _remove(source, "test", "train")


def _flat_validation(source: Path) -> None:
    _remove(source, "test")
    (source / "val").mkdir()
    (source / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(malformed.encoded("JPEG"))


def _only(source: Path, *classes: str) -> None:
    _remove(source, "train", "test")
    good_source(source, classes, ("train", "val"))


def layouts() -> list[Layout]:
    """Sources made from `good_source`, each with one error."""
    return [
        Layout(
            "source missing", "imagefolder", lambda s: s.rename(s.with_name("elsewhere")), "not there, or no folder"
        ),
        Layout("source empty", "imagefolder", lambda s: _remove(s, "train", "test"), "train: not there; "),
        Layout(
            "test missing", "imagefolder", lambda s: _remove(s, "test"), "test: not there; imagefolder is expected as"
        ),
        Layout("no splits", "imagefolder", _move_up, "class folders without a split above them"),
        Layout("no splits, cifar", "cifar10", _move_up, "class folders without a split above them"),
        Layout("split without classes", "imagefolder", lambda s: (s / "val").mkdir(), "val: no class folders"),
        Layout("class without images", "imagefolder", lambda s: (s / "train/ant").mkdir(), "different classes, 1: ant"),
        Layout("class of other files", "imagefolder", _empty_both, "ant: no images in this class folder"),
        Layout("train has more", "imagefolder", _add("train/ant"), "train and test have different classes, 1: ant"),
        Layout("test has more", "imagefolder", _add("test/ant"), "train and test have different classes, 1: ant"),
        Layout(
            "val has more", "imagefolder", _add("val/ant"), "train and val have different classes, 3: ant, cat, dog"
        ),
        Layout("differing only in case", "imagefolder", _both("Cat"), "'Cat' and 'cat' differ only in case"),
        Layout("differing only in a space", "imagefolder", _both("cat "), "'cat' and 'cat ' differ only in case"),
        Layout("differing only in accents' form", "imagefolder", _accents, r"differ only in case, spaces or accents"),
        Layout(
            "class not UTF-8", "imagefolder", _add(b"train/\xe4"), r"train/\\xe4: the name of a class has to be UTF-8"
        ),
        Layout("class unprintable", "imagefolder", _add("train/a\nb"), r"'a\\nb': the name of a class has characters"),
        Layout("image beside classes", "imagefolder", _stray, "x.jpg: not in a class folder; expected train/CLASS"),
        Layout("class a dead link", "imagefolder", lambda s: (s / "test/bee").symlink_to("no"), "a broken link"),
        Layout(
            "val flat", "imagenet", _flat_validation, r"50,000 .*ILSVRC2012_validation_ground_truth.txt of the devkit"
        ),
        Layout("not ImageNet", "imagenet", lambda s: _only(s, "cat"), "cat is not an ImageNet-1k class"),
        Layout("not all of ImageNet", "imagenet", lambda s: _only(s, "n01440764"), "999 of .* --partial goes without"),
        Layout(
            "not torchvision's CIFAR",
            "cifar10",
            lambda s: (s / "cifar-10-batches-py").mkdir(),
            "download cifar10 again",
        ),
    ]


def _empty_both(source: Path) -> None:
    for split in ("train", "test"):
        (source / split / "ant").mkdir()
        (source / split / "ant" / "readme.txt").write_bytes(b"?")


def _accents(source: Path) -> None:
    for form in ("NFC", "NFD"):
        _both(unicodedata.normalize(form, "\u00fc"))(source)


def _stray(source: Path) -> None:
    (source / "train" / "x.jpg").write_bytes(malformed.encoded("JPEG"))


def odd_source(source: Path) -> Path:
    """A good source with every odd file in one class."""
    good_source(source)
    for case in malformed.files():
        case.make(source / "train" / "cat" / case.name)
    return source
