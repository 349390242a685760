"""Progress bars of the commands that make and check data files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

Advance = Callable[[int], None]


class _ImagesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Empty until the speed has been measured."""
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")


def _description() -> TextColumn:
    """A description column without markup, which a file name may resemble."""
    return TextColumn("{task.description}", markup=False)


@contextmanager
def images(console: Console, what: str, total: int, start: int) -> Iterator[Advance]:
    """A bar that counts images from `start`, with the speed and the time left."""
    columns = (_description(), BarColumn(), MofNCompleteColumn(), _ImagesPerSecond(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        shown = progress.add_task(what, total=total, completed=start)
        yield lambda num: progress.advance(shown, num)


@contextmanager
def bytes_read(console: Console, what: str, total: int) -> Iterator[Advance]:
    """A bar that counts bytes and disappears when all are read."""
    columns = (_description(), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        shown = progress.add_task(what, total=total)
        yield lambda num: progress.advance(shown, num)
