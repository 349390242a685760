"""`python -m launch` as a user of the cluster types it."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

WriteGrid = Callable[..., Path]
SOURCE = Path(__file__).parents[2]
MODEST = ("--partition", "gpu", "--mem", "2G", "--time", "1h", "--cpus-per-task", "1", "--gpus-per-node", "0")


def launch(
    *arguments: str | Path,
    program: str = "-m launch",
    checkout: Path = SOURCE,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """What the command came to; `program` instead of it, `checkout` as the folder it is typed in."""
    command = [sys.executable, *program.split(" ", 1), *map(str, arguments)]
    everything = os.environ | {"COLUMNS": "150"} | dict(environment or {})
    return subprocess.run(command, cwd=checkout, env=everything, capture_output=True, text=True, check=False)
