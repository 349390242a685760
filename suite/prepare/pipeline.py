"""Makes data files from image files: stores each file, or lists it with a reason. Deterministic and resumable."""

import hashlib
import platform
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import features

from suite.data.beton import PAGE_BYTES, BetonWriter, Sample
from suite.data.class_folders import Split, list_source
from suite.data.decoding import Storage, Task
from suite.data.manifest import Manifest, Settings, manifest_path, read_manifest, sha256_of, write_manifest
from suite.errors import DataError
from suite.prepare import progress
from suite.prepare.resume import Done, Recorder, record_path
from suite.prepare.workers import store_in_order
from suite.run.locks import locked
from suite.run.provenance import own_version

if TYPE_CHECKING:
    from rich.console import Console

CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
EXACT = Storage(None, 100, 0.0, PAGE_BYTES)
"""Raw pixels at full size, for small images."""


@dataclass(frozen=True)
class Job:
    """One split to store as file `beton`; progress is shown on `console`."""

    dataset: str
    split: Split
    beton: Path
    storage: Storage
    console: "Console"

    @property
    def settings(self) -> Settings:
        """The storage settings, in the manifest's form."""
        quality = self.storage.quality if self.storage.jpeg_share else None
        return Settings(max_resolution=self.storage.max_resolution, quality=quality, jpeg_share=self.storage.jpeg_share)

    def say(self, line: str, style: str | None = None) -> None:
        """Prints the line without interpreting markup, which a path may resemble."""
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def prepare(
    dataset: str,
    source: Path,
    out: Path,
    storage: Storage,
    num_workers: int,
    console: "Console",
    *,
    leave_out_broken: bool = False,
    partial: bool = False,
) -> None:
    """Writes OUT/{train,val,test}.beton, each with a manifest beside it; resumes an interrupted call.

    Raises:
        DataError: the source has the wrong layout or broken files that must not be left out, `out` has other data
            files, another process prepares files there, or reading or writing fails.
    """
    if dataset in CIFAR_FOLDERS and (source / dataset / "train").is_dir():  # as in a folder of data sets
        source = source / dataset
    broken: list[tuple[Job, dict[str, str]]] = []
    try:
        is_pixels = dataset in CIFAR_FOLDERS and (source / CIFAR_FOLDERS[dataset]).is_dir()
        with console.status("listing the images"):
            splits = [] if is_pixels else list_source(dataset, source, partial=partial)
        with locked(out / ".prepare.lock") as mine:
            if not mine:
                raise DataError(f"{out}: another process prepares files there; wait for it, or choose another --out")
            if is_pixels:
                _prepare_pixels(dataset, source, out, console)
            for split in splits:
                job = Job(dataset, split, out / f"{split.name}.beton", storage, console)
                broken.append((job, _prepare_split(job, num_workers, leave_out_broken=leave_out_broken)))
    except OSError as error:
        what = f"{error.filename or out}: {error.strerror}"
        raise DataError(f"{what}; fix this and run the same command again to resume") from error
    if any(reasons for _, reasons in broken):
        raise DataError(_broken_files([(job, reasons) for job, reasons in broken if reasons]))


def _prepare_split(job: Job, num_workers: int, *, leave_out_broken: bool) -> dict[str, str]:
    """Stores a split; returns its broken files and their reasons, or nothing if the split is finished."""
    if job.beton.exists():
        _require_same(job)
        return {}
    was_begun = record_path(job.beton).exists() and record_path(job.beton).stat().st_size > 0
    recorder = Recorder(job.beton, job.split, job.storage)
    try:
        num_done, num = recorder.done.num_entries, len(job.split.entries)
        if was_begun:
            anew = "files or settings have changed, starting over"
            job.say(f"{job.split.name}: {f'resuming after {num_done:,} of {num:,} images' if num_done else anew}")
        _store_rest(job, recorder, num_workers)
        recorder.commit()
        listed = _list_of_broken(job.beton)
        listed.unlink(missing_ok=True)
        if recorder.done.broken and not leave_out_broken:
            lines = [f"{job.split.folder}/{name}\t{reason}\n" for name, reason in recorder.done.broken.items()]
            listed.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
            return recorder.done.broken
        _require_all_classes(job, recorder.done)
        _conclude(job, recorder.done, recorder.finish())
        recorder.publish()
    finally:
        recorder.stop()
    return {}


def _require_same(job: Job) -> None:
    path = manifest_path(job.beton)
    manifest = read_manifest(job.beton)
    if manifest.settings != job.settings:
        what = f"was made with {_words(manifest.settings)}, not {_words(job.settings)}"
    elif (manifest.dataset, manifest.classes, manifest.source_sha256) != (
        job.dataset,
        job.split.classes,
        job.split.sha256,
    ):
        what = f"was made from different files than {job.split.folder} has now"
    else:
        job.say(f"{job.beton} already exists, from this source with these settings")
        return
    raise DataError(f"{job.beton}: {what}; delete it and {path.name} to remake it, or choose another --out")


def _words(settings: Settings) -> str:
    options = {
        "max-resolution": settings.max_resolution or 0,
        "quality": settings.quality,
        "jpeg-share": settings.jpeg_share,
    }
    return " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)


def _store_rest(job: Job, recorder: Recorder, num_workers: int) -> None:
    """Stores the files that are not yet recorded as done."""
    start, split = recorder.done.num_entries, job.split
    num = len(split.entries)
    tasks = (
        Task(str(split.folder / entry.name), number, entry.label)
        for number, entry in enumerate(islice(split.entries, start, None), start)
    )
    with (
        progress.images(job.console, split.name, num, start) as advance,
        closing(store_in_order(tasks, num - start, job.storage, num_workers)) as found,
    ):
        for stored in found:
            recorder.add(stored)
            advance(1)


def _require_all_classes(job: Job, done: Done) -> None:
    """Raises DataError unless every class of the source still has a sample."""
    have = set(done.rows["label"].tolist())
    for label in sorted({entry.label for entry in job.split.entries} - have):
        raise DataError(f"{job.split.folder / job.split.classes[label]}: all images of this class are broken")


def _conclude(job: Job, done: Done, unnamed: Path) -> None:
    """Writes the manifest of the finished file, which then needs only its final name."""
    manifest = _manifest(job, done, unnamed)
    write_manifest(job.beton, manifest)
    _summarise(job, manifest, done)


def _manifest(job: Job, done: Done, unnamed: Path) -> Manifest:
    """The manifest of the finished file; reads the file once, for its checksum."""
    with progress.bytes_read(job.console, f"{job.split.name}: checksum", unnamed.stat().st_size) as advance:
        sha256 = sha256_of(unnamed, advance)
    return Manifest(
        dataset=job.dataset,
        split=job.split.name,
        classes=job.split.classes,
        num_samples=len(done.rows),
        samples_per_class=tuple(np.bincount(done.rows["label"], minlength=len(job.split.classes)).tolist()),
        num_bytes=unnamed.stat().st_size,
        sha256=sha256,
        source_sha256=job.split.sha256,
        settings=job.settings,
        converted=done.converted,
        left_out=done.broken,
        ignored=job.split.ignored,
        written_with=_versions(),
    )


def _versions() -> dict[str, str]:
    """Versions of the software that determines the output bytes."""
    return {
        "proxbench": own_version(),
        "pillow": version("pillow"),
        "libjpeg-turbo": features.version("libjpeg_turbo") or "none",
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _summarise(job: Job, manifest: Manifest, done: Done) -> None:
    num_jpeg = int(done.rows["is_jpeg"].sum())
    job.say(
        f"{job.beton}: {manifest.num_samples:,} images of {len(set(done.rows['label'].tolist())):,} classes, "
        f"{manifest.num_bytes / 1e6:,.1f} MB, {num_jpeg:,} JPEG and {manifest.num_samples - num_jpeg:,} raw; "
        f"{len(manifest.converted):,} were converted, {len(manifest.ignored):,} other files ignored"
    )
    if manifest.left_out:
        name = manifest_path(job.beton).name
        job.say(f"{len(manifest.left_out):,} broken files were left out; {name} names them", "yellow")


def _broken_files(found: list[tuple[Job, dict[str, str]]]) -> str:
    """A message of several lines: the first ten broken files, the files that list all of them, and the fix."""
    num = sum(len(reasons) for _, reasons in found)
    lines = [f"{job.split.folder}/{name}: {reason}" for job, reasons in found for name, reason in reasons.items()]
    lists = " and ".join(str(_list_of_broken(job.beton)) for job, _ in found)
    if num > len(lines := lines[:10]):
        lines.append("...")
    advice = (
        f"{num:,} broken files, listed in {lists}; everything else is stored. Repair or delete them and run the "
        "same command again, which resumes at the first that changed, or add --leave-out-broken"
    )
    return "\n".join([*lines, advice])


def _list_of_broken(beton: Path) -> Path:
    return beton.with_suffix(".broken.txt")


def _prepare_pixels(dataset: str, source: Path, out: Path, console: "Console") -> None:
    """Stores CIFAR from torchvision's files: it fits in memory and takes seconds."""
    from suite.data.datasets import load
    from suite.data.source import Pixels

    try:
        found = load(dataset, source, "memory")
    except RuntimeError as error:  # torchvision's, of checksums
        raise DataError(f"{source / CIFAR_FOLDERS[dataset]}: {error}; download {dataset} again") from error
    for name, part in (("train", found.train), ("test", found.test)):
        if not isinstance(part, Pixels):
            raise TypeError(f"{dataset} comes as {type(part).__name__}")
        images, labels = part.images.permute(0, 2, 3, 1).contiguous().numpy(), part.labels.numpy()
        sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        job = Job(dataset, Split(name, source, found.classes, (), (), sha256), out / f"{name}.beton", EXACT, console)
        if job.beton.exists():
            _require_same(job)
            continue
        writer = BetonWriter(job.beton, len(labels), EXACT.page_bytes)
        try:
            for image, label in zip(images, labels.tolist(), strict=True):
                writer.append(Sample(False, image.shape[0], image.shape[1], label, image.tobytes()))
            _conclude(job, Done(writer.rows), writer.finish())
            writer.publish()
        finally:
            writer.abandon()
