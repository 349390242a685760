"""Compile fused.cpp for a pair of maps on first use, and keep the library for later processes.

    pair = native.pair("hard_sign", "ones")

Compiling takes one to three seconds with g++ (8 or newer; or the command in CXX, arguments included). It is done once
per pair, source, compiler and type of processor: the library's name in `folder()` contains a digest of all of them. Its
last bytes are a checksum of the rest, so that a damaged file is recompiled and never loaded. Processes that compile at
the same time, even on several nodes of a shared file system, all use the first file that is linked into place.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from quantizers.fused.passes import MAPS, PASSES, Pair, warn_once

SOURCE = Path(__file__).with_name("fused.cpp")
# No -ffast-math: every machine rounds the same operations in the order of the source.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
# The instruction sets that torch checks for before it reports each capability. Not -march=native: nodes that share a
# home directory share its libraries. Not -march=x86-64-v3: GCC 10 does not know it, and it requires more than torch
# has checked.
PROCESSORS = {
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
COMPILE_SECONDS = 120
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_failures: list[str] = []


def folder() -> Path:
    """The folder of the libraries: proxbench in XDG_CACHE_HOME or ~/.cache; without a home, a temporary folder."""
    if cache_home := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache_home) / "proxbench"
    try:
        return Path.home() / ".cache" / "proxbench"
    except RuntimeError:  # no HOME, and the user id is not registered
        return Path(tempfile.gettempdir()) / f"proxbench-{os.getuid()}"


@cache
def pair(forward: str, backward: str) -> Pair | None:
    """The passes for the maps of those names, run with torch's threads; None, after a warning, if compiling fails."""
    try:
        library = ctypes.CDLL(str(_compiled(forward, backward)))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        _failures.append(_reason(error))
        warn_once(_failures[-1])
        return None

    def call(name: str, table: bytes) -> None:
        function = library[name]
        function.restype = None
        function(table, ctypes.c_int(torch.get_num_threads()))

    return Pair(call)


def failure() -> str | None:
    """Why the last pair that could not be compiled or loaded failed; None if there is none."""
    return _failures[-1] if _failures else None


def _reason(error: OSError | ValueError | subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = str(error.stderr).strip().splitlines() or [f"exit status {error.returncode}"]
        return f"{error.cmd[0]} cannot compile {SOURCE.name}: {lines[0]}"
    return str(error)


def _compiled(forward: str, backward: str) -> Path:
    flags = (*FLAGS, *PROCESSORS.get(torch.backends.cpu.get_cpu_capability(), ()))
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    command = [*compiler, *flags, f"-DFORWARD={forward}", f"-DBACKWARD={backward}"]
    source = b"".join(path.read_bytes() for path in (MAPS, PASSES, SOURCE))
    system = [sys.platform, platform.machine(), *platform.libc_ver()]
    digest = hashlib.sha256("\0".join([*command, *system]).encode() + source).hexdigest()[:16]
    library = folder() / f"{forward}-{backward}-{digest}.so"
    _require_own(library.parent)
    if library.exists() and not _is_whole(library):
        library.unlink(missing_ok=True)
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            command += ["-shared", "-fPIC", str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            with made.open("ab") as file:  # the loader ignores bytes after the sections
                file.write(hashlib.sha256(made.read_bytes()).digest())
            # Not replace(): another node may have mapped a file of that name, which NFS would delete while in use.
            with suppress(FileExistsError):
                os.link(made, library)
    return library


def _require_own(directory: Path) -> None:
    """Create the folder for this user only; OSError if it belongs to another user, who could have put code into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to another user: set XDG_CACHE_HOME to a folder that you own")


def _is_whole(library: Path) -> bool:
    content = library.read_bytes()
    return hashlib.sha256(content[:-_CHECKSUM_BYTES]).digest() == content[-_CHECKSUM_BYTES:]
