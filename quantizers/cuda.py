"""The C++ of fused.cu, compiled for a pair of maps and a GPU when a process first wants it.

    pair = cuda.pair("hard_sign", "ones", torch.device("cuda", 0))

A compilation takes about a second of NVRTC, which comes with torch's wheels, and is not kept for other processes; no
CUDA toolkit is needed. A step is one launch on the device's current stream, with a table of the tensors that goes there
in one copy; the host waits for neither. NVRTC and the driver are called here alone, through their C interfaces; where
one is missing or fails there is a warning, and torch's operations step.

Nobody has run this on a GPU yet: the tests compile it, and execute its code on a CPU.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantizers.passes import CHUNK, FUNCTIONS, MAPS, PASSES, Pair, Table, warn_once

SOURCE = Path(__file__).with_name("fused.cu")
DRIVER = "libcuda.so.1"
THREADS = 256
# Fused multiply-adds are those that the source writes out; division and square root round as IEEE says by default.
FLAGS = ("-std=c++17", "-fmad=false", "-default-device", f"-DTHREADS={THREADS}", f"-DCHUNK={CHUNK}")

Launch = Callable[[str, int, Tensor], None]
"""Launches the function of that name with so many blocks on a table, on the current stream."""


@cache
def pair(forward: str, backward: str, device: torch.device) -> Pair | None:
    """The passes of the pair of those names on that GPU; None, after a warning, if they cannot be had."""
    try:
        major, minor = torch.cuda.get_device_capability(device)
        binary = compiled(forward, backward, f"{major}{minor}")
        with torch.cuda.device(device):
            launch = loaded(binary)
    except (AttributeError, OSError, RuntimeError) as error:
        warn_once(f"no kernel for {device}: {error}")
        return None

    def run(name: str, table: Table) -> None:
        if not table.num_chunks:
            return
        with torch.cuda.device(device):
            # From pinned memory, or the host would wait for the stream.
            content = torch.frombuffer(bytearray(table.content), dtype=torch.uint8).pin_memory()
            launch(name, table.num_chunks, content.to(device, non_blocking=True))

    return Pair(run)


def compiled(forward: str, backward: str, capability: str) -> bytes:
    """The binary of all FUNCTIONS for GPUs of that compute capability, "90" say; needs none.

    OSError or AttributeError without NVRTC, RuntimeError with the compiler's lines if it refuses.
    """
    nvrtc = ctypes.CDLL(f"libnvrtc.so.{str(torch.version.cuda).split('.')[0]}")
    flags = [f"-arch=sm_{capability}", *FLAGS, f"-DFORWARD={forward}", f"-DBACKWARD={backward}"]
    headers = (MAPS, PASSES)
    included = [_strings(*(path.read_bytes() for path in headers)), _strings(*(path.name.encode() for path in headers))]
    program, name = ctypes.c_void_p(), SOURCE.name.encode()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), name, len(headers), *included))
    try:
        if nvrtc.nvrtcCompileProgram(program, len(flags), _strings(*map(str.encode, flags))):
            log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise RuntimeError(log.decode().rstrip("\0"))
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def loaded(binary: bytes) -> Launch:
    """What launches the binary's functions on the current device; OSError or RuntimeError if that can't load it."""
    driver = ctypes.CDLL(DRIVER)
    torch.cuda.synchronize()  # makes the device's context that of this thread
    module = ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), binary))
    functions = {name: ctypes.c_void_p() for name in FUNCTIONS}
    for name, function in functions.items():
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))

    def launch(name: str, num_blocks: int, table: Tensor) -> None:
        address = ctypes.c_void_p(table.data_ptr())
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(address))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        shape = (num_blocks, 1, 1, THREADS, 1, 1)
        _check(driver.cuLaunchKernel(functions[name], *shape, 0, stream, arguments, None))

    return launch


def _strings(*values: bytes) -> "ctypes.Array[ctypes.c_char_p]":
    return (ctypes.c_char_p * len(values))(*values)


def _read(get_size: Any, get: Any, program: ctypes.c_void_p) -> bytes:  # noqa: ANN401  (NVRTC's functions)
    size = ctypes.c_size_t()
    _check(get_size(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _check(get(program, content))
    return content.raw


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA's error {status}")
