"""Shows the current activity of a command that runs for more than two seconds."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_SECONDS = 2.0


@contextmanager
def progress(after: float = PATIENCE_SECONDS) -> Iterator[Callable[[str], None]]:
    """Yields a function that takes a description of the current activity and shows it on stderr.

    Nothing is shown before `after` seconds or if stderr is not a terminal. The display disappears at the end.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = Progress(*columns, console=Console(stderr=True), transient=True)
    task = shown.add_task("reading the runs", total=None)
    timer = threading.Timer(after, shown.start)
    timer.start()
    try:
        yield lambda what: shown.update(task, description=what)
    finally:
        timer.cancel()
        timer.join()  # otherwise the display could start just after stop()
        shown.stop()
