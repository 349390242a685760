"""The C++ of fused.cpp, compiled for a pair of maps when it is first wanted, and kept for later processes.

    pair = native.pair("hard_sign", "ones")

A compilation takes one to three seconds of g++ and is done once for each pair, source and kind of processor: the
library is put into `folder()` under a name that is a digest of all three. A process that finds it there loads it in a
millisecond. Two that compile at once put the same file in place, one after the other.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from quantizers.fused.passes import MAPS, PASSES, Pair, Table, warn_once

SOURCE = Path(__file__).with_name("fused.cpp")
# No -ffast-math: what is rounded, and in which order, is what the source says, on every machine.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
# Levels and not -march=native: nodes that share a home directory share its libraries.
PROCESSORS = {"AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"), "AVX2": ("-march=x86-64-v3",)}
COMPILE_SECONDS = 120


def folder() -> Path:
    """Where compiled libraries are kept: proxbench in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "proxbench"


@cache
def pair(forward: str, backward: str) -> Pair | None:
    """The passes of the pair of those names, with torch's own threads; None, after a warning, if they can't be had."""
    try:
        library = ctypes.CDLL(str(_compiled(forward, backward)))
    except (OSError, subprocess.SubprocessError) as error:
        warn_once(_reason(error))
        return None

    def run(name: str, table: Table) -> None:
        function = library[name]
        function.restype = None
        function(table.content)

    return Pair(run)


def _reason(error: OSError | subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = str(error.stderr).strip().splitlines() or [f"exit status {error.returncode}"]
        return f"{error.cmd[0]} cannot compile {SOURCE.name}: {lines[0]}"
    return str(error)


def _compiled(forward: str, backward: str) -> Path:
    flags = (*FLAGS, *PROCESSORS.get(torch.backends.cpu.get_cpu_capability(), ()))
    command = [os.environ.get("CXX", "g++"), *flags, f"-DFORWARD={forward}", f"-DBACKWARD={backward}"]
    source = b"".join(path.read_bytes() for path in (MAPS, PASSES, SOURCE))
    digest = hashlib.sha256("\0".join([*command, sys.platform]).encode() + source).hexdigest()[:16]
    library = folder() / f"{forward}-{backward}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            command += ["-shared", "-fPIC", str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            made.replace(library)
    return library
