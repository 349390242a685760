"""`launch doctor --gpu`: starts benchmarks/gpu.py, which lies beside this package in a checkout of the project."""

import subprocess
import sys
from pathlib import Path

from launch.selection import fail

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def run(out: Path, data_dir: Path | None) -> int:
    """The program's exit status; its report goes to `out`. Without CIFAR-10 in `data_dir`, nothing is trained on it."""
    if not PROGRAM.is_file():
        fail(f"--gpu needs the project's tests and benchmarks, and there is no {PROGRAM}: run it in a checkout")
    found = ["--data-dir", str(data_dir)] if data_dir is not None else []
    return subprocess.run([sys.executable, str(PROGRAM), "--out", str(out), *found], check=False).returncode
