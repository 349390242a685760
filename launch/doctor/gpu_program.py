"""`launch doctor --gpu`: runs benchmarks/gpu.py, which is beside this package in a checkout of the project."""

import subprocess
import sys
from pathlib import Path

from launch.selection import fail

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def run(out: Path, data_dir: Path | None) -> int:
    """Runs the program, which reports to `out`; returns its exit status. It trains on CIFAR-10 if `data_dir` has it."""
    if not PROGRAM.is_file():
        fail(f"--gpu needs the project's tests and benchmarks, and there is no {PROGRAM}: run it in a checkout")
    found = ["--data-dir", str(data_dir)] if data_dir is not None else []
    return subprocess.run([sys.executable, str(PROGRAM), "--out", str(out), *found], check=False).returncode
