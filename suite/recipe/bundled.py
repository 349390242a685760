"""The grids that come with the package, by name; light, so that a command's --help can list them at once."""

from pathlib import Path

BUNDLED = Path(__file__).parent / "grids"


CHOICES = BUNDLED / "choices"
"""What tuning chose for bundled grids, once, on some machine: NAME.yaml."""


def bundled_names() -> list[str]:
    """Names a grid argument may be, besides a file's path."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))
