"""Compiles fused.cpp for a pair of maps when it is first wanted, and keeps the library for later processes.

    pair = native.pair("hard_sign", "ones")

A compilation takes one to three seconds of g++ (8 or newer; or what CXX says, arguments included). It is done once for
each pair, source, compiler and kind of processor: the library's name in `folder()` is a digest of all of them, and its
last bytes are a checksum of the rest, so that a damaged file is compiled again and never loaded. Processes that compile
at once, on several nodes of a shared file system too, all use the first file that is linked into place.
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
# No -ffast-math: what is rounded, and in which order, is what the source says, on every machine.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
# What torch tests for before it says so. Not -march=native: nodes that share a home directory share its libraries; nor
# -march=x86-64-v3, which GCC 10 does not know and which asks for more than torch has tested.
PROCESSORS = {
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
COMPILE_SECONDS = 120
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_failures: list[str] = []


def folder() -> Path:
    """Where libraries are kept: proxbench in XDG_CACHE_HOME or ~/.cache; without a home, a temporary folder."""
    if cache_home := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache_home) / "proxbench"
    try:
        return Path.home() / ".cache" / "proxbench"
    except RuntimeError:  # no HOME, and a user id that nobody has registered
        return Path(tempfile.gettempdir()) / f"proxbench-{os.getuid()}"


@cache
def pair(forward: str, backward: str) -> Pair | None:
    """The passes of the pair of those names, with torch's own threads; None, after a warning, if they can't be had."""
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
    """Why the last pair that was asked for in vain could not be had."""
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
            with made.open("ab") as file:  # bytes behind its sections are nothing to the loader
                file.write(hashlib.sha256(made.read_bytes()).digest())
            # Not replace(): another node may have mapped a file of that name, and NFS would take it from under it.
            with suppress(FileExistsError):
                os.link(made, library)
    return library


def _require_own(directory: Path) -> None:
    """Make the folder for this user only; OSError if it belongs to somebody else, who could have put code into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to another user: set XDG_CACHE_HOME to a folder of yours")


def _is_whole(library: Path) -> bool:
    content = library.read_bytes()
    return hashlib.sha256(content[:-_CHECKSUM_BYTES]).digest() == content[-_CHECKSUM_BYTES:]
