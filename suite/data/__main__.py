"""Commands that make and check data files; see `python -m suite.data --help`."""

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from suite.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Make FFCV files from image files, and check them.\n\n"
    "[bold]python -m suite.data prepare imagenet --source /data/ILSVRC --out data/imagenet[/]\n"
    "[bold]python -m suite.data verify data/imagenet/*.beton[/]",
)
MAX_RESOLUTION, QUALITY, JPEG_SHARE = 400, 90, 0.5


class Dataset(str, Enum):
    """Data sets that `prepare` accepts."""

    imagenet = "imagenet"
    cifar10 = "cifar10"
    cifar100 = "cifar100"
    imagefolder = "imagefolder"


@app.command()
def prepare(
    dataset: Annotated[
        Dataset,
        typer.Argument(help="imagefolder: any class folders; a grid's data set folder/NAME.", show_default=False),
    ],
    source: Annotated[
        Path,
        typer.Option(
            help="The image files, laid out as above.",
            metavar="DIR",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for train.beton and the other files: a grid looks in DATA/imagenet.", metavar="DIR"),
    ],
    max_resolution: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=16384,
            help="Maximum longer side, in pixels; larger images are shrunk. 0: no limit.",
            show_default="400",
        ),
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Quality of re-encoded JPEGs.", show_default="90")
    ] = None,
    jpeg_share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of images stored as JPEG; the rest are raw: larger, faster.",
            show_default="0.5",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Worker processes.", show_default="this machine's cores")
    ] = None,
    leave_out_broken: Annotated[
        bool,
        typer.Option("--leave-out-broken", help="Skip files that cannot be decoded; the manifest lists them."),
    ] = False,
    partial: Annotated[bool, typer.Option("--partial", help="imagenet: accept fewer than the 1,000 classes.")] = False,
) -> None:
    """Write train.beton etc.: the same images and settings give the same bytes for any number of workers.

    [bold]python -m suite.data prepare imagenet --source /data/ILSVRC --out data/imagenet --workers 16[/]
    [bold]python -m suite.data prepare imagefolder --source photos --out data/photos --jpeg-share 1[/]

    imagenet needs DIR/train/CLASS/*.JPEG and DIR/val/CLASS/*.JPEG; the others
    need DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, and optionally DIR/val.
    For cifar10 and cifar100, torchvision's files work, too.

    If it is killed, run the same command again to resume. Each file gets a
    manifest: counts, classes, checksums, and the images that were converted or
    skipped.
    """
    from rich.console import Console

    from suite.data.decoding import Storage
    from suite.prepare.pipeline import EXACT
    from suite.prepare.pipeline import prepare as make

    options = {"--max-resolution": max_resolution, "--quality": quality, "--jpeg-share": jpeg_share}
    given = [name for name, value in options.items() if value is not None]
    storage = EXACT
    if dataset not in {Dataset.cifar10, Dataset.cifar100}:
        storage = Storage.of(
            (MAX_RESOLUTION if max_resolution is None else max_resolution) or None,
            QUALITY if quality is None else quality,
            JPEG_SHARE if jpeg_share is None else jpeg_share,
        )
    elif given:
        fail(f"{given[0]}: {dataset.value} is stored unchanged, raw and at full size; omit the option")
    if partial and dataset is not Dataset.imagenet:
        fail(f"--partial: {dataset.value} has no fixed list of classes; the option is for imagenet")
    num_workers = workers or len(os.sched_getaffinity(0))
    console = Console()
    make(dataset.value, source, out, storage, num_workers, console, leave_out_broken=leave_out_broken, partial=partial)


@app.command()
def verify(
    files: Annotated[
        list[Path], typer.Argument(help="Data files, each with its manifest beside it.", metavar="FILE...")
    ],
) -> None:
    """Check data files against their manifests: size, checksum, index, labels, counts. Exit status 1 if any is bad.

    [bold]python -m suite.data verify data/imagenet/*.beton[/]
    """
    from rich.console import Console

    from suite.data.class_folders import escaped
    from suite.data.manifest import faults
    from suite.prepare.progress import bytes_read

    num_bad = 0
    for file in files:
        total = file.stat().st_size if file.is_file() else 0
        with bytes_read(Console(stderr=True), file.name, total) as advance:
            found = list(faults(file, advance))
        for fault in found:
            print(fault, file=sys.stderr)
        num_bad += bool(found)
        if not found:
            print(f"{escaped(str(file))}: matches its manifest")
    raise SystemExit(1 if num_bad else 0)


def fail(message: str) -> NoReturn:
    """Prints only the message and exits with status 2, as for any bad input."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        fail(str(error))
