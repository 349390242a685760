"""A data file's manifest, written beside it (`train.json` for `train.beton`), and the check against it."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from suite.data.beton import read_index
from suite.errors import DataError
from suite.run.atomic import write_bytes

_CHUNK_BYTES = 4 << 20


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Settings(_Frozen):
    """How images were stored; max_resolution in pixels, None if nothing was resized; quality is None without JPEGs."""

    max_resolution: int | None
    quality: int | None
    jpeg_share: float


class Manifest(_Frozen):
    """One split of a data set. File names are relative to the split's folder, with non-UTF-8 bytes escaped.

    `converted` gives the original format of images that were not 8-bit RGB, `left_out` the reason a file could not be
    decoded; `ignored` lists files without an image suffix. `source_sha256` covers names and sizes, `sha256` the data
    file.
    """

    dataset: str
    split: str
    classes: tuple[str, ...]
    num_samples: int
    samples_per_class: tuple[int, ...]
    num_bytes: int
    sha256: str
    source_sha256: str
    settings: Settings
    converted: dict[str, str]
    left_out: dict[str, str]
    ignored: tuple[str, ...]
    written_with: dict[str, str]


def manifest_path(beton: Path) -> Path:
    """Path of a data file's manifest."""
    return beton.with_suffix(".json")


def read_manifest(beton: Path) -> Manifest:
    """The manifest of a data file.

    Raises:
        DataError: the file is missing, or is not a manifest.
    """
    path = manifest_path(beton)
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: not there; it came with {beton.name} from `python -m suite.data prepare`") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: not a manifest: {where}: {first['msg']}") from error


def write_manifest(beton: Path, manifest: Manifest) -> None:
    """Atomically."""
    write_bytes(manifest_path(beton), (manifest.model_dump_json(indent=2) + "\n").encode())


def sha256_of(path: Path, advance: Callable[[int], None]) -> str:
    """SHA-256 of the whole file; calls `advance` with the number of bytes after each read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def faults(beton: Path, advance: Callable[[int], None]) -> Iterator[str]:
    """One line for each way in which a data file differs from its manifest. Decodes no image."""
    try:
        manifest = read_manifest(beton)
        num_bytes = beton.stat().st_size
    except DataError as error:
        yield str(error)
        return
    except OSError as error:
        yield f"{beton}: {error.strerror}"
        return
    if manifest.split != beton.stem:
        yield f"{beton}: its manifest is for the split {manifest.split}"
    if num_bytes != manifest.num_bytes:
        yield f"{beton}: {num_bytes:,} bytes, its manifest says {manifest.num_bytes:,}"
    elif (found := sha256_of(beton, advance)) != manifest.sha256:
        yield f"{beton}: its content has changed: sha256 {found}, its manifest says {manifest.sha256}"
    try:
        yield from (f"{beton}: {fault}" for fault in _faults_of_labels(beton, manifest))
    except DataError as error:
        yield str(error)


def _faults_of_labels(beton: Path, manifest: Manifest) -> Iterator[str]:
    labels, num_classes = read_index(beton).labels, len(manifest.classes)
    if len(labels) != manifest.num_samples:
        yield f"{len(labels):,} samples, its manifest says {manifest.num_samples:,}"
    if labels.min() < 0 or labels.max() >= num_classes:
        yield f"labels from {labels.min()} to {labels.max()}, but its manifest has {num_classes:,} classes"
        return
    counts = np.bincount(labels, minlength=num_classes).tolist()
    if len(manifest.samples_per_class) != num_classes:
        yield f"its manifest counts {len(manifest.samples_per_class):,} classes and names {num_classes:,}"
        return
    different = [i for i in range(num_classes) if counts[i] != manifest.samples_per_class[i]]
    if different:
        i = different[0]
        yield (
            f"{counts[i]:,} samples of class {manifest.classes[i]}, its manifest says "
            f"{manifest.samples_per_class[i]:,} ({len(different):,} classes differ)"
        )
