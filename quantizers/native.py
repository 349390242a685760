"""The C++ of fused.cpp, compiled for a pair of maps when it is first wanted, and kept for the processes that follow.

    pair = native.pair("hard_sign", "ones")

A compilation takes one to three seconds of g++ and is done once for each pair, source and kind of processor: the
library is put into `folder()` under a name that is a digest of all three. A process that finds it there loads it in a
millisecond. Two that compile at once put the same file in place, one after the other.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("fused.cpp")
# No -ffast-math: what is rounded, and in which order, is what the source says, on every machine.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
# Levels and not -march=native: nodes that share a home directory share its libraries.
PROCESSORS = {"AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"), "AVX2": ("-march=x86-64-v3",)}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Of a quantized parameter and its gradient."""
COMPILE_SECONDS = 120


class Batch(NamedTuple):
    """What is stepped: tensors of a group, in lists of one length; each one's elements are in the same order."""

    w_star: Sequence[Tensor]
    gradients: Sequence[Tensor]
    weights: Sequence[Tensor]
    written_mus: Sequence[float]
    mu: float
    clip_latents: bool


class Sgd(NamedTuple):
    """A step of SGD; no buffers without momentum."""

    buffers: Sequence[Tensor] | None
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool


class AdamW(NamedTuple):
    """A step of AdamW: of each tensor lr / (1 - beta1^step) and sqrt(1 - beta2^step) beside its moments."""

    means: Sequence[Tensor]
    squares: Sequence[Tensor]
    step_sizes: Sequence[float]
    root_corrections: Sequence[float]
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class _Tensors(ctypes.Structure):
    """`Tensors` of fused.cpp."""

    _fields_ = (
        ("num", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sizes", "w_star", "gradients", "weights", "written_mus")),
        ("mu", ctypes.c_double),
        ("clip_latents", ctypes.c_int64),
    )


class _Sgd(ctypes.Structure):
    """`Sgd` of fused.cpp."""

    _fields_ = (
        ("buffers", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("lr", "momentum", "weight_decay")),
        ("nesterov", ctypes.c_int64),
    )


class _AdamW(ctypes.Structure):
    """`AdamW` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("means", "squares", "step_sizes", "root_corrections")),
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
    )


@cache
def maps() -> frozenset[str]:
    """The names of the maps that are written in C++."""
    source = SOURCE.read_text(encoding="utf-8")
    section = source[source.index("// Maps") : source.index("// The precisions")]
    return frozenset(re.findall(r"^struct (\w+) \{", section, flags=re.MULTILINE))


class Pair:
    """The passes of one pair of maps, on CPU tensors without gaps, with torch's own threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def write(self, w_star: Tensor, weight: Tensor, mu: float) -> None:
        """Write w = F(w*; mu), to the bits of a step's."""
        batch = Batch([w_star], [], [weight], [], mu, clip_latents=False)
        lists = _lists(batch)
        self._call("write", weight, _tensors(batch, lists))

    def step_sgd(self, batch: Batch, options: Sgd) -> None:
        """One step of SGD; moves w* and the buffers, and writes the weights."""
        lists = _lists(batch)
        buffers = None if options.buffers is None else _addresses(options.buffers)
        address = None if buffers is None else _address(buffers)
        self._call("sgd", batch.weights[0], _tensors(batch, lists), _Sgd(address, *options[1:]))

    def step_adamw(self, batch: Batch, options: AdamW) -> None:
        """One step of AdamW; moves w* and the moments, and writes the weights."""
        lists = _lists(batch)
        moments = [_addresses(tensors) for tensors in options[:2]]
        numbers = [_doubles(each) for each in options[2:4]]
        addresses = [*map(_address, moments), *map(_address, numbers)]
        self._call("adamw", batch.weights[0], _tensors(batch, lists), _AdamW(*addresses, *options[4:]))

    def _call(self, name: str, weight: Tensor, *structures: ctypes.Structure) -> None:
        function = self._library[f"{name}_{DTYPES[weight.dtype]}"]
        function.restype = None
        function(*map(ctypes.byref, structures))


_Lists = list["ctypes.Array[Any]"]


def _lists(batch: Batch) -> _Lists:
    """What C reads of the batch; to be kept alive until it has."""
    sizes = (ctypes.c_int64 * len(batch.w_star))(*[tensor.numel() for tensor in batch.w_star])
    return [sizes, *map(_addresses, batch[:3]), _doubles(batch.written_mus)]


def _tensors(batch: Batch, lists: _Lists) -> _Tensors:
    return _Tensors(len(batch.w_star), *map(_address, lists), batch.mu, batch.clip_latents)


def _address(array: "ctypes.Array[Any]") -> int:
    return ctypes.addressof(array)


def _addresses(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _doubles(numbers: Sequence[float]) -> "ctypes.Array[ctypes.c_double]":
    return (ctypes.c_double * len(numbers))(*numbers)


def folder() -> Path:
    """Where compiled libraries are kept: proxbench in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "proxbench"


@cache
def pair(forward: str, backward: str) -> Pair | None:
    """The passes of the pair of those names; None, after a warning, if they cannot be had."""
    try:
        return Pair(ctypes.CDLL(str(_compiled(forward, backward))))
    except (OSError, subprocess.SubprocessError) as error:
        _warn_once(_reason(error))
        return None


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"quantized weights are stepped by torch's operations, more slowly: {reason}", stacklevel=2)


def _reason(error: OSError | subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = str(error.stderr).strip().splitlines() or [f"exit status {error.returncode}"]
        return f"{error.cmd[0]} cannot compile {SOURCE.name}: {lines[0]}"
    return " ".join(str(error).split())


def _compiled(forward: str, backward: str) -> Path:
    flags = (*FLAGS, *PROCESSORS.get(torch.backends.cpu.get_cpu_capability(), ()))
    command = [os.environ.get("CXX", "g++"), *flags, f"-DFORWARD={forward}", f"-DBACKWARD={backward}"]
    digest = hashlib.sha256("\0".join([*command, sys.platform]).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = folder() / f"{forward}-{backward}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            command += ["-shared", "-fPIC", str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            made.replace(library)
    return library
