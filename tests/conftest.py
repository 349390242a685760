"""A cell that trains in a second, and a place to run it."""

import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from browser import Browser, obstacle
from PIL import Image
from tiny_cells import tiny_cell, tiny_grid

from suite.recipe.cell import Cell
from suite.run.directory import RunDir

# A developer's own settings must not lead a test to their runs.
for variable in ("PROXBENCH_ROOT", "PROXBENCH_DATA", "MLFLOW_TRACKING_URI"):
    os.environ.pop(variable, None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each thing that this machine lacks, not for each test that was skipped for it."""
    files = defaultdict(set)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        files[reason.removeprefix("Skipped: ")].add(Path(report.nodeid.partition("::")[0]).name)
    if files:
        terminalreporter.section("skipped")
    for reason, names in sorted(files.items()):
        terminalreporter.write_line(f"{reason}: tests of {', '.join(sorted(names))}")


@pytest.fixture(autouse=True)
def _own_signal_handlers() -> Iterator[None]:
    """suite.train takes them over for the rest of its process, which here is pytest's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def make_cell() -> Callable[..., Cell]:
    return tiny_cell


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDir]:
    """A run directory of a tiny cell, in a grid folder of the given name."""

    def make(grid: str = "grid", **changes: object) -> RunDir:
        cell = tiny_cell(**changes)
        return RunDir.create(tmp_path / grid / cell.id, cell)

    return make


@pytest.fixture
def write_grid(tmp_path: Path) -> Callable[..., Path]:
    """The file of a grid of tiny cells; keyword arguments replace its keys."""

    def write(**changes: object) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(tiny_grid(**changes), sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def lamps(tmp_path: Path) -> Path:
    """Sixteen JPEGs of two classes, and as many to test, under `data/lamps`."""
    for part in ("train", "test"):
        for number, name in enumerate(("dark", "light")):
            place = tmp_path / "data" / "lamps" / part / name
            place.mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (40, 30), (150 * number + index,) * 3).save(place / f"{index}.jpg")
    return tmp_path / "data" / "lamps"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A Chromium; without one the test is skipped, or fails if PROXBENCH_REQUIRE_CHROMIUM=1."""
    if why := obstacle():
        if os.environ.get("PROXBENCH_REQUIRE_CHROMIUM") == "1":
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened
