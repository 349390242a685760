"""Lists the image files of a source of class folders by split, and reports errors in its layout."""

import hashlib
import importlib.util
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from suite.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
SPLITS = {"imagenet": ("train", "val")}
_USUAL_SPLITS = ("train", "test")
_SYSTEMS_OWN = {"@eaDir", "__MACOSX", "#recycle", "lost+found"}
TINY_ANNOTATIONS = "val_annotations.txt"
"""Names and classes of the validation images, in Tiny-ImageNet's folder val."""


class Entry(NamedTuple):
    """A file that should hold an image: its name relative to the split's folder, its size, and its class index."""

    name: str
    num_bytes: int
    label: int


@dataclass(frozen=True)
class Split:
    """One split. A label is an index into `classes`; `entries` are in sample order.

    `sha256` covers names and sizes; `ignored` lists files without an image suffix.
    """

    name: str
    folder: Path
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    ignored: tuple[str, ...]
    sha256: str


def escaped(name: str) -> str:
    """Any file name, even one that is not UTF-8, as text that can be printed and written."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def list_source(dataset: str, source: Path, *, partial: bool = False, with_test: bool = True) -> list[Split]:
    """The splits of a folder SOURCE/SPLIT/CLASS/FILE, with the same classes in each.

    `partial` accepts some of imagenet's 1,000 classes; labels remain indices into the 1,000. With `with_test=False`,
    the test folder is not read.

    Raises:
        DataError: a folder is missing or unreadable, or the classes are wrong.
    """
    try:
        if (source / "val" / TINY_ANNOTATIONS).is_file():
            return _tiny_imagenet(source, with_test=with_test)
        all_splits = SPLITS.get(dataset, _USUAL_SPLITS)
        needed = all_splits if with_test else all_splits[:1]
        for name in needed:
            if not (source / name).is_dir():
                raise DataError(_missing(dataset, source, name))
        extra = [name for name in ("val",) if name not in all_splits and (source / name).is_dir()]
        found = {name: _folders(dataset, source / name) for name in (*needed, *extra)}
        for name, folders in found.items():
            if different := sorted(set(found["train"].classes) ^ set(folders.classes)):
                some = ", ".join(different[:5])
                raise DataError(f"{source}: train and {name} have different classes, {len(different):,}: {some}")
        classes = found["train"].classes
        if dataset == "imagenet":
            classes = _imagenet_classes(source, classes, partial=partial)
        if len(classes) == 1:
            raise DataError(f"{source / 'train'}: only one class, {classes[0]}: there is nothing to classify")
        return [_split(source / name, classes, folders) for name, folders in found.items()]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error


def _tiny_imagenet(source: Path, *, with_test: bool) -> list[Split]:
    """Tiny-ImageNet as unpacked: train/CLASS/images/*.JPEG, and val/images with its annotations as the test split.

    The data set's own test images have no labels.
    """
    folders = [entry for entry in _entries(source / "train") if entry.is_dir() and not _is_a_systems(entry.name)]
    classes = tuple(entry.name for entry in folders)
    number = {name: index for index, name in enumerate(classes)}
    train = [
        Entry(f"{folder.name}/images/{entry.name}", _size(entry), number[folder.name])
        for folder in folders
        for entry in _entries(Path(folder.path) / "images")
        if _is_named_as_image(entry)
    ]
    splits = [Split("train", source / "train", classes, tuple(train), (), _sha256(train))]
    if with_test:
        listed = source / "val" / TINY_ANNOTATIONS
        label_of = dict(line.split("\t")[:2] for line in listed.read_text(encoding="utf-8").splitlines() if line)
        images = {entry.name: entry for entry in _entries(source / "val" / "images") if _is_named_as_image(entry)}
        if wrong := sorted(
            name for name in {*label_of, *images} if label_of.get(name) not in number or name not in images
        ):
            raise DataError(f"{listed}: {wrong[0]} has no image, or no class of train/ ({len(wrong):,} such)")
        test = [Entry(f"images/{name}", _size(entry), number[label_of[name]]) for name, entry in images.items()]
        splits.append(Split("test", source / "val", classes, tuple(test), (), _sha256(test)))
    return splits


def _missing(dataset: str, source: Path, name: str) -> str:
    expected = f"{dataset} is expected as {source}/{{{','.join(SPLITS.get(dataset, _USUAL_SPLITS))}}}/CLASS/*.jpg"
    if not source.is_dir():
        return f"{source}: not there, or no folder; {expected}"
    if next(_images_below(source), None):
        return f"{source}: class folders without a split above them; {expected}: move them into {source}/train"
    return f"{source / name}: not there; {expected}"


def _images_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Images in the subfolders of a folder that is not a valid source."""
    for entry in _entries(folder):
        if entry.is_dir() and entry.name not in {"train", "val", "test"}:
            yield from filter(_is_named_as_image, _entries(Path(entry.path)))


@dataclass(frozen=True)
class _Folders:
    classes: tuple[str, ...]
    ignored: tuple[str, ...]


def _folders(dataset: str, folder: Path) -> _Folders:
    """The class folders of a split, sorted."""
    classes, ignored = [], []
    for entry in _entries(folder):
        if _is_a_systems(entry.name):
            ignored.append(entry.name)
        elif entry.is_dir():
            _require_good_class_name(folder, entry.name)
            classes.append(entry.name)
        elif _is_named_as_image(entry):
            raise DataError(_without_class(dataset, folder, entry.name))
        elif entry.is_symlink() and not Path(entry.path).exists():
            raise DataError(f"{folder / escaped(entry.name)}: a broken link where a class folder is expected")
        else:
            ignored.append(entry.name)
    if not classes:
        raise DataError(f"{folder}: no class folders; expected {folder.name}/CLASS/*.jpg")
    _require_different(folder, classes)
    return _Folders(tuple(classes), tuple(ignored))


def _require_good_class_name(folder: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{folder / escaped(name)}: the name of a class has to be UTF-8; rename the folder") from error
    if not name.isprintable():
        raise DataError(f"{folder}/{name!a}: the name of a class has characters that cannot be printed; rename it")


def _require_different(folder: Path, classes: Sequence[str]) -> None:
    """Rejects class names that a reader or another file system cannot distinguish."""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()

    for _, group in groupby(sorted(classes, key=plain), key=plain):
        same = sorted(group)
        if len(same) > 1:
            names = " and ".join(f"{name!a}" for name in same)
            raise DataError(f"{folder}: {names} differ only in case, spaces or accents; merge the folders")


def _without_class(dataset: str, folder: Path, name: str) -> str:
    if dataset == "imagenet" and folder.name == "val":
        return (
            f"{folder / escaped(name)}: not in a class folder; move the 50,000 validation images into folders named by "
            "wnid, which ILSVRC2012_validation_ground_truth.txt of the devkit gives"
        )
    return f"{folder / escaped(name)}: not in a class folder; expected {folder.name}/CLASS/*.jpg"


def _split(folder: Path, classes: tuple[str, ...], found: _Folders) -> Split:
    number = {name: index for index, name in enumerate(classes)}
    entries: list[Entry] = []
    ignored = list(found.ignored)
    for name in found.classes:
        num_before = len(entries)
        for entry in _entries(folder / name):
            relative = f"{name}/{entry.name}"
            if _is_named_as_image(entry):
                entries.append(Entry(relative, _size(entry), number[name]))
            else:
                ignored.append(relative)
        if len(entries) == num_before:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(
                f"{folder / name}: no images in this class folder (files named {suffixes}); fill or delete it"
            )
    return Split(folder.name, folder, classes, tuple(entries), tuple(map(escaped, ignored)), _sha256(entries))


def _sha256(entries: Sequence[Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(os.fsencode(entry.name) + f"\0{entry.num_bytes}\n".encode())
    return digest.hexdigest()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)


def _is_named_as_image(entry: os.DirEntry[str]) -> bool:
    return Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and not _is_a_systems(entry.name)


def _is_a_systems(name: str) -> bool:
    """Whether a file or folder is hidden or belongs to the operating system, so is neither a class nor an image."""
    return name.startswith(".") or name in _SYSTEMS_OWN


def _size(entry: os.DirEntry[str]) -> int:
    """Size in bytes; -1 if the entry is not a file or its size cannot be read."""
    try:
        return entry.stat().st_size if entry.is_file() else -1
    except OSError:
        return -1


def _imagenet_classes(source: Path, found: tuple[str, ...], *, partial: bool) -> tuple[str, ...]:
    """ImageNet-1k's 1,000 class names, sorted.

    Raises:
        DataError: `found` has a name that is not among them, or lacks one and `partial` is False.
    """
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        raise DataError("timm is not installed, and its list of ImageNet's classes is needed: pip install timm")
    listed = Path(package.origin).parent / "data" / "_info" / "imagenet_synsets.txt"
    classes = tuple(sorted(listed.read_text(encoding="ascii").split()))
    if others := sorted(set(found) - set(classes)):
        raise DataError(
            f"{source}: {others[0]} is not an ImageNet-1k class, n01440764 to n15075141 ({len(others):,} such); "
            "`prepare imagefolder` takes any classes"
        )
    if (missing := sorted(set(classes) - set(found))) and not partial:
        raise DataError(
            f"{source}: {len(missing):,} of ImageNet-1k's 1,000 classes are missing: {', '.join(missing[:5])}; "
            "--partial goes without them"
        )
    return classes
