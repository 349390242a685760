"""What a long command is doing, on the terminal of a person who has waited for two seconds."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_SECONDS = 2.0


@contextmanager
def progress(after: float = PATIENCE_SECONDS) -> Iterator[Callable[[str], None]]:
    """Gives a function that says what is being done; it is shown on stderr after that long, and gone at the end.

    On anything but a terminal nothing is shown.
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
        timer.join()  # else it could start just after the stop
        shown.stop()
