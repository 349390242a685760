"""Images per second from ImageNet's files to float32 batches of 224 px: FFCV, our loaders, torchvision; ratios first.

    python benchmarks/loading.py --source DIR               DIR/CLASS/*.JPEG; 250 photographs are enough
    python benchmarks/loading.py --source DIR --samples 400 --repeats 2 --plot curve.png
    python benchmarks/loading.py --source DIR --augmented   with RandAugment and random erasing

All loaders apply the same steps: random crop resized to 224 px, random flip, normalisation. All have the same number of
workers and deliver batches to one process that does nothing else. The files are read repeatedly until there are enough
samples, so they come from memory. The loaders take turns, and a ratio is the median over the turns.

"To bytes" is the CPU's part when a GPU does the rest: FFCV's pipeline flips before that point, ours after it.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # keeps --help fast
    from torch import Tensor

    from suite.data.source import Part

SIZE, QUALITY, RESOLUTION = 224, 90, 400
SHARES, RESOLUTIONS = (0.0, 0.25, 0.5, 1.0), (256, 400, 500)
"""Shares of images stored as JPEG, and longest sides in pixels, for the curve."""


@dataclass(frozen=True)
class Setting:
    """Common settings of all loaders. One epoch is `num_samples` images."""

    num_samples: int
    batch_size: int
    num_workers: int


@dataclass
class Way:
    """A loader; `epoch(k)` yields batches of images. `rates` are images per second, one per turn."""

    name: str
    epoch: Callable[[int], Iterator["Tensor"]]
    dtype: str = "float32"
    rates: list[float] = field(default_factory=list)

    def run(self, number: int) -> float:
        """Images per second of one epoch, from the first request to the last batch."""
        start, num_images = time.perf_counter(), 0
        for images in self.epoch(number):
            if images.shape[1:] != (3, SIZE, SIZE) or str(images.dtype) != f"torch.{self.dtype}":
                raise RuntimeError(f"{self.name}: {images.shape} of {images.dtype} is not what was agreed")
            num_images += len(images)
        return num_images / (time.perf_counter() - start)


def torchvision(name: str, folder: Path, setting: Setting, policy: object = None) -> Way:
    """ImageFolder and DataLoader as in torchvision's own recipe, with persistent workers.

    With a policy (a transform of Pillow images), a quarter of the images also get random erasing.
    """
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), policy, transforms.ToTensor()]
    steps += [transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    steps += [None if policy is None else transforms.RandomErasing(0.25, value="random")]
    transform = transforms.Compose([step for step in steps if step is not None])
    images = datasets.ImageFolder(str(folder), transform)
    loader = DataLoader(
        images,
        setting.batch_size,
        sampler=RandomSampler(images, replacement=True, num_samples=setting.num_samples),
        num_workers=setting.num_workers,
        drop_last=True,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )
    return Way(f"torchvision, {name}", lambda _: (images for images, _ in loader))


def ours(name: str, part: "Part", setting: Setting, dtype: str = "float32", **augmentation: object) -> Way:
    """suite.data's loader: FFCV for a data file, worker processes for image files; `augmentation` as in a recipe."""
    import torch

    from suite.data.augmentation import IMAGENET, draw
    from suite.data.loader import Loader, Reader
    from suite.data.source import Encoded, Files
    from suite.engines.process_group import Layout
    from suite.recipe.settings import Data

    cpu = torch.device("cpu")
    recipe = {"image_size": SIZE, "crop": "random_resized", "horizontal_flip": True, **augmentation}
    settings = Data.model_validate(recipe)
    reader: Reader
    repeated = part.subset(torch.arange(setting.num_samples) % len(part.labels))
    from suite.data.readers.image_folder import FolderReader, Workers

    workers = Workers(setting.num_workers, cpu)
    if isinstance(repeated, Encoded):
        from suite.data.readers.ffcv import FFCVReader

        reader = FFCVReader(repeated, setting.batch_size, setting.num_workers, cpu)
    else:
        assert isinstance(repeated, Files)  # noqa: S101
        reader = FolderReader(repeated, workers, cpu)
    loader = Loader(reader, settings, SIZE, IMAGENET, setting.batch_size, 0, Layout(), workers=lambda: workers)

    def to_bytes(epoch: int) -> Iterator["Tensor"]:
        batches = torch.split(torch.randperm(setting.num_samples), setting.batch_size)[: len(loader)]
        return (images for images, _ in reader.read(batches, draw(settings, setting.num_samples, 0, epoch).crops, SIZE))

    def to_floats(epoch: int) -> Iterator["Tensor"]:
        return (images for images, _ in loader.epoch(epoch))

    return Way(name, to_bytes if dtype == "uint8" else to_floats, dtype)


def ffcv_imagenet(name: str, beton: Path, setting: Setting, dtype: str = "float32") -> Way:
    """libffcv/ffcv-imagenet's training pipeline; without a GPU it is float32, normalised before it becomes a tensor."""
    import numpy as np
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    from suite.data.beton import read_index

    mean, std = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
    normalize = [NormalizeImage(mean, std, np.float32)] if dtype == "float32" else []
    crop = RandomResizedCropRGBImageDecoder((SIZE, SIZE))
    loader: Any = Loader(
        str(beton),
        setting.batch_size,
        num_workers=setting.num_workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        seed=0,
        indices=np.arange(setting.num_samples) % len(read_index(beton)),
        drop_last=True,
        pipelines={
            "image": [crop, RandomHorizontalFlip(), *normalize, ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )
    return Way(f"ffcv-imagenet's settings, {name}", lambda _: (images for images, _ in loader), dtype)


@dataclass(frozen=True)
class Stock:
    """A folder of images; data files made from it go to `place`, in the form that `suite.data prepare` writes."""

    source: Path
    place: Path

    def beton(self, max_resolution: int, share: float) -> Path:
        """The data file with this resolution and JPEG share, created if missing."""
        from suite.data.beton import BetonWriter

        path = self.place / f"{max_resolution}-{share}.beton"
        if not path.exists():
            samples = [sample for _, sample in self._stored(max_resolution, share)]
            with BetonWriter(path, len(samples)) as writer:
                for sample in samples:
                    writer.append(sample)
        return path

    def jpegs(self, max_resolution: int) -> Path:
        """The folder with the same images as JPEG files."""
        folder = self.place / f"{max_resolution}"
        for path, sample in self._stored(max_resolution, 1.0):
            (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
            (folder / path.parent.name / path.name).write_bytes(sample.content)
        return folder

    def files(self) -> list[Path]:
        """The source files, sorted by class and name."""
        return sorted(path for path in self.source.glob("*/*") if path.suffix.lower() in {".jpg", ".jpeg"})

    def _stored(self, max_resolution: int, share: float) -> Iterator[tuple[Path, Any]]:
        from suite.data.decoding import Storage, Task, store

        storage = Storage.of(max_resolution, QUALITY, share)
        for number, path in enumerate(self.files()):
            stored = store(Task(str(path), number, 0), storage)
            if stored.sample is None:
                raise typer.BadParameter(f"{path}: {stored.note}")
            yield path, stored.sample


def encoded(beton: Path) -> "Part":
    """All samples of a data file, as a Part."""
    import torch

    from suite.data.beton import read_index
    from suite.data.source import Encoded

    labels = torch.from_numpy(read_index(beton).labels)
    return Encoded(beton, torch.arange(len(labels)), labels)


def take_turns(ways: list[Way], repeats: int, console: Console) -> None:
    """One epoch each to start workers, compile and fill the page cache, then `repeats` rounds in alternating order."""
    with console.status("warming up") as status:
        for way in ways:
            status.update(f"warming up: {way.name}")
            way.run(0)
        for turn in range(repeats):
            for way in ways if turn % 2 else reversed(ways):
                status.update(f"turn {turn + 1} of {repeats}: {way.name}")
                way.rates.append(way.run(turn + 1))


def ratio(one: Way, other: Way) -> str:
    """Median over turns of one rate over the other, and its range."""
    ratios = [a / b for a, b in zip(one.rates, other.rates, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def compare(stock: Stock, setting: Setting, repeats: int, console: Console) -> None:
    """Prints ratios and rates of all loaders at 400 px."""
    import torch

    from suite.data.source import Files

    jpegs, files = stock.jpegs(RESOLUTION), stock.files()
    as_files = Files(tuple(str(jpegs / path.parent.name / path.name) for path in files), torch.zeros(len(files)).long())
    originals, stored = torchvision("original files", stock.source, setting), torchvision("400 px", jpegs, setting)
    pillow = ours("ours, torch loader, 400 px", as_files, setting)
    pairs: list[tuple[str, Way, Way]] = []
    for dtype, ending in (("float32", ""), ("uint8", ", to bytes")):
        for share in SHARES if dtype == "float32" else (SHARES[0], SHARES[-1]):
            what, beton = f"{share:.0%} JPEG{ending}", stock.beton(RESOLUTION, share)
            way = ours(f"ours, FFCV, {what}", encoded(beton), setting, dtype)
            pairs.append((what, way, ffcv_imagenet(what, beton, setting, dtype)))
    ways = [originals, stored, pillow, *(way for _, one, other in pairs for way in (one, other))]
    take_turns(ways, repeats, console)
    fast = pairs[len(SHARES) - 1][1]
    ratios = Table("ratio of images per second", "median (range)", "wanted", title=f"{repeats} turns")
    ratios.add_row("ours, FFCV, JPEG / torchvision, same JPEGs", ratio(fast, stored), "2.5")
    ratios.add_row("ours, FFCV, JPEG / torchvision, original files", ratio(fast, originals), "2.5")
    for what, one, other in pairs:
        ratios.add_row(f"ours / ffcv-imagenet's settings, {what}", ratio(one, other), "1.0")
    ratios.add_row("ours, torch loader / torchvision, same JPEGs", ratio(pillow, stored), "1.0")
    rates = Table("way", "images/s", "range")
    for way in ways:
        rates.add_row(way.name, f"{statistics.median(way.rates):.0f}", f"{min(way.rates):.0f} to {max(way.rates):.0f}")
    console.print(ratios, rates)


def compare_augmented(stock: Stock, setting: Setting, repeats: int, console: Console) -> None:
    """Prints ratios and rates with RandAugment, two operations of magnitude 9, and random erasing."""
    import torch
    from timm.data.auto_augment import rand_augment_transform
    from torchvision.transforms import RandAugment

    from suite.data.source import Files

    notation, hparams = "rand-m9-n2-p1", {"translate_const": 100, "img_mean": (124, 116, 104), "interpolation": 2}
    jpegs, files = stock.jpegs(RESOLUTION), stock.files()
    as_files = Files(tuple(str(jpegs / path.parent.name / path.name) for path in files), torch.zeros(len(files)).long())
    own = torchvision("its RandAugment", jpegs, setting, RandAugment(2, 9))
    same = torchvision("timm's RandAugment", jpegs, setting, rand_augment_transform(notation, hparams))
    wanted: dict[str, Any] = {"auto_augment": notation, "random_erasing": 0.25}
    pillow = ours("ours, torch loader", as_files, setting, **wanted)
    fast = ours("ours, FFCV, 100% JPEG", encoded(stock.beton(RESOLUTION, 1.0)), setting, **wanted)
    take_turns([own, same, pillow, fast], repeats, console)
    ratios = Table("ratio of images per second, augmented", "median (range)", "wanted", title=f"{repeats} turns")
    for way in (pillow, fast):
        for peer in (own, same):
            ratios.add_row(f"{way.name} / {peer.name}", ratio(way, peer), "1.0")
    rates = Table("way", "images/s", "range")
    for way in (own, same, pillow, fast):
        rates.add_row(way.name, f"{statistics.median(way.rates):.0f}", f"{min(way.rates):.0f} to {max(way.rates):.0f}")
    console.print(ratios, rates)


def draw(stock: Stock, setting: Setting, repeats: int, console: Console, path: Path) -> None:
    """Measures loading speed against file size, prints it, and draws it to `path`."""
    from matplotlib.figure import Figure

    from suite.data.beton import read_index

    cases = [(resolution, share) for resolution in RESOLUTIONS for share in SHARES]
    ways = [ours(f"{r} px, {s:.0%} JPEG", encoded(stock.beton(r, s)), setting) for r, s in cases]
    take_turns(ways, repeats, console)
    kilobytes = [float(read_index(stock.beton(*case)).num_bytes.mean()) / 1e3 for case in cases]
    rates = [statistics.median(way.rates) for way in ways]
    table = Table("longest side, JPEG share", "kB per image", "GB for 1,281,167", "images/s")
    for way, size, rate in zip(ways, kilobytes, rates, strict=True):
        table.add_row(way.name, f"{size:.0f}", f"{size * 1.281167:.0f}", f"{rate:.0f}")
    console.print(table)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, resolution in enumerate(RESOLUTIONS):
        points = slice(number * len(SHARES), (number + 1) * len(SHARES))
        axes.plot(kilobytes[points], rates[points], "o-", label=f"{resolution} px")
        for share, size, rate in zip(SHARES, kilobytes[points], rates[points], strict=True):
            axes.annotate(f"{share:.0%}", (size, rate), (4, 5), textcoords="offset points", fontsize=8)
    axes.margins(0.12)
    axes.set(xlabel="kB per image", ylabel="images per second", xlim=(0, None), ylim=(0, None))
    axes.set_title(
        f"Training batches of {SIZE} px by {setting.num_workers} threads\nnumbers: share of images stored as JPEG"
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(title="longest side at most")
    figure.savefig(path, dpi=150)
    console.print(f"drawn to {path}")


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(models or [platform.processor()])[0]}, {len(os.sched_getaffinity(0))} cores"


def main(
    source: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Class folders of JPEG files.")],
    samples: Annotated[int, typer.Option(min=64, help="Images per epoch.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Measured epochs per loader.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Workers per loader: threads or processes.")] = 2,
    augmented: Annotated[
        bool, typer.Option("--augmented", help="Compare with torchvision under RandAugment and random erasing instead.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also measure file sizes and JPEG shares, and draw them to this file.")
    ] = None,
) -> None:
    """Compares loaders on the same images."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="loading-") as folder:
        stock = Stock(source, Path(folder))
        if not stock.files():
            raise typer.BadParameter(f"{source}: no CLASS/*.jpg or .JPEG files in it")
        import torch

        torch.set_num_threads(1)  # as torchrun does; the comparison is about the workers
        setting = Setting(samples, batch_size, workers)
        console.print(
            f"{_machine()}; {len(stock.files())} files; {setting}; torch {torch.__version__}", highlight=False
        )
        (compare_augmented if augmented else compare)(stock, setting, repeats, console)
        if plot is not None:
            draw(stock, setting, repeats, console, plot)


if __name__ == "__main__":
    typer.run(main)
