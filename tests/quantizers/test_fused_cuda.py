"""Without a GPU: NVRTC compiles the kernels, and their code, executed on the CPU, has the bits of the CPU's pass."""

import ctypes
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from fused_steps import IN_CPP
from torch import Tensor
from torch.optim import SGD

from quantizers import QUANTIZERS, cuda, fused, native, passes

TOUCHED = {"write": (1, 1), "sgd": (2, 2), "momentum": (3, 3), "nesterov": (3, 3), "adamw": (4, 4)}
"""Numbers that are read and written for each element: w*, gradient and state; w*, state and w."""
every_row = pytest.mark.parametrize("quantizer", IN_CPP)


def _pair(quantizer: str) -> tuple[str, str]:
    row = QUANTIZERS[quantizer]
    return row.forward.__name__, row.backward.__name__


# What NVRTC makes


def _has_nvrtc() -> bool:
    try:
        cuda.compiled("identity", "ones", "90")
    except (AttributeError, OSError):
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not _has_nvrtc(), reason="torch has come without NVRTC")


@cache
def _binary(forward: str, backward: str, capability: str) -> bytes:
    return cuda.compiled(forward, backward, capability)


@needs_nvrtc
@pytest.mark.parametrize(
    ("quantizer", "capability"), [*product(IN_CPP, ["90"]), ("bnn++", "80"), ("reste++", "80"), ("bnn++", "120")]
)
def test_nvrtc_compiles_every_row_with_each_base_and_dtype(quantizer: str, capability: str) -> None:
    binary = _binary(*_pair(quantizer), capability)
    assert all(b"\0.text." + name.encode() + b"\0" in binary for name in passes.FUNCTIONS)


@needs_nvrtc
def test_what_nvrtc_refuses_is_a_runtime_error_with_its_lines() -> None:
    with pytest.raises(RuntimeError, match="no_such_map"):
        cuda.compiled("no_such_map", "ones", "90")


def _cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton")
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not program.exists():
        pytest.skip("triton has come without cuobjdump")
    return subprocess.run([str(program), *arguments], check=True, capture_output=True, text=True).stdout


@needs_nvrtc
@pytest.mark.parametrize("quantizer", ["bc", "bnn++", "reste++"])
def test_an_element_is_loaded_once_and_stored_once_in_single_precision_and_registers(
    quantizer: str, tmp_path: Path
) -> None:
    kernels = tmp_path / "kernels.cubin"
    kernels.write_bytes(_binary(*_pair(quantizer), "90"))
    usage = _cuobjdump("--dump-resource-usage", str(kernels))
    assert usage.count(" STACK:0 ") == usage.count(" LOCAL:0 ") == len(passes.FUNCTIONS)
    functions = _cuobjdump("--dump-sass", str(kernels)).split("Function : ")[1:]
    for name, code in (function.split("\n", 1) for function in functions):
        # The pass is made before the barrier, and the loop ends where the kernel does; subroutines come behind.
        made, _, rest = code.partition("BAR.SYNC")
        before, loop = Counter(_operations(made)), Counter(_operations(rest.rpartition("EXIT")[0]))
        reads, writes = TOUCHED[name.split("_")[0]]
        # The compiler may have unrolled: so many copies of one element's code.
        copies = loop["ST"] // writes
        assert copies > 0
        assert (loop["LD"], loop["ST"], loop["LDG"], loop["STG"]) == (copies * reads, copies * writes, 0, 0)
        assert not {"DADD", "DMUL", "DFMA", "DSETP", "LDL", "STL"} & {*loop}
        assert (before["LD"], before["ST"]) == (0, 0)
        # One wait for memory and not one after the other.
        first_copy = _operations(rest)[: _operations(rest).index("ST")]
        assert "CALL" not in first_copy[: len(first_copy) - first_copy[::-1].index("LD")]
        if name == "momentum_float32" and quantizer == "bc":
            # Only what is written as a fused multiply-add is one.
            assert (loop["FFMA"], loop["FMUL"], loop["FADD"]) == (2 * copies, copies, copies)


def _operations(sass: str) -> list[str]:
    return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", sass)


# The kernels' code on the CPU, behind a driver that lets threads take turns: a missing barrier would not be seen

EMULATION = """
#include <string.h>
#define __global__
#define __shared__ static
#define __launch_bounds__(num_threads)
struct Index { unsigned x; };
static Index blockIdx, threadIdx;
static void __syncthreads() {}
#include "fused.cu"
#undef EXPORT
#define EXPORT(NAME, ...) if (!strcmp(name, #NAME)) *function = reinterpret_cast<void*>(NAME);
extern "C" {
int num_launches = 0;
int cuModuleLoadData(void** module, const char* binary) { *module = &num_launches; return strcmp(binary, "binary"); }
int cuModuleGetFunction(void** function, void* module, const char* name) { EXPORT_ALL return module != &num_launches; }
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z,
                   unsigned shared_bytes, void* stream, void** arguments, void** extra) {
  ++num_launches;
  for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < block_x; ++threadIdx.x)
      reinterpret_cast<void (*)(const Group*)>(function)(*static_cast<const Group**>(arguments[0]));
  const bool is_right = grid_y == 1 && grid_z == 1 && block_x == THREADS && block_y == 1 && block_z == 1 &&
                        shared_bytes == 0 && reinterpret_cast<int64_t>(stream) == STREAM && extra == nullptr;
  return !is_right;
}
}
"""
STREAM = 2**40 + 7
SIZES = [0, 1, passes.CHUNK - 1, passes.CHUNK, 0, passes.CHUNK + 1, 2 * passes.CHUNK + 33, 257, 0]
WRITTEN_MUS = [1.0, 0.4, 3.0, 100.0, 2.0, 1e4, 0.0, 7.5, 1.0]


class Emulated(NamedTuple):
    """A pair that `cuda.pair` made, with g++ for NVRTC and the CPU for the device; how often it has launched."""

    pair: passes.Pair
    num_launches: ctypes.c_int


@pytest.fixture
def emulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Emulated]:
    """Makes emulated pairs."""
    driver = tmp_path / "emulated.so"
    names = [flag for flag in cuda.FLAGS if flag.startswith("-D")]
    flags = [*names, f"-DSTREAM={STREAM}", "-O1", "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing"]

    def make(forward: str, backward: str) -> Emulated:
        maps = [f"-DFORWARD={forward}", f"-DBACKWARD={backward}", f"-I{cuda.SOURCE.parent}"]
        command = ["g++", *flags, *maps, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(driver)]
        subprocess.run(command, check=True, input=EMULATION, text=True)
        pair = cuda.pair.__wrapped__(forward, backward, torch.device("cpu"))
        assert pair is not None
        return Emulated(pair, ctypes.c_int.in_dll(ctypes.CDLL(str(driver)), "num_launches"))

    monkeypatch.setattr(cuda, "compiled", lambda *_: b"binary")
    monkeypatch.setattr(cuda, "DRIVER", str(driver))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    return make


def _numbers(
    seed: int, dtype: torch.dtype = torch.float32, scales: Sequence[float] = (1.0,) * len(SIZES)
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [scale * torch.randn(size, generator=generator) for size, scale in zip(SIZES, scales, strict=True)]
    for tensor in made:
        tensor[:64] *= torch.logspace(-6, 3, 64)[: tensor.numel()]
        tensor[-4:] = torch.tensor([0.0, -0.0, 1.0, -1.0])[-tensor.numel() :][: tensor.numel()]
    return [tensor.to(dtype) for tensor in made]


class Problem:
    """Tensors that a pair steps, the same for every pair."""

    def __init__(self, base: str, dtype: torch.dtype, *, clip_latents: bool) -> None:
        first, second = _numbers(2), [tensor.abs() for tensor in _numbers(3)]
        steepness = [1 / max(1.0, mu) for mu in WRITTEN_MUS]
        self.batch = passes.Batch(
            _numbers(0), _numbers(1, dtype, steepness), _numbers(0, dtype), WRITTEN_MUS, 2.5, clip_latents
        )
        self.move = passes.Move(
            base,
            lr=0.05,
            weight_decay=0.1,
            first=() if base == "sgd" else first,
            second=second if base == "adamw" else (),
            momentum=0.9,
            step_sizes=[0.05 / (1 - 0.9 ** (1 + i)) for i in range(len(SIZES))],
            root_corrections=[(1 - 0.999 ** (1 + i)) ** 0.5 for i in range(len(SIZES))],
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
        )

    def bits(self) -> list[Tensor]:
        """All that a step changes."""
        kept = (*self.batch.w_star, *self.batch.weights, *self.move.first, *self.move.second)
        return [tensor.view(torch.uint8) for tensor in kept]


@every_row
def test_the_kernels_code_has_the_bits_of_the_cpus_pass(
    quantizer: str, emulate: Callable[[str, str], Emulated]
) -> None:
    (emulated, num_launches), on_cpu = emulate(*_pair(quantizer)), native.pair(*_pair(quantizer))
    assert on_cpu is not None
    for base, dtype, clip_latents in product(passes.BASES, passes.DTYPES, [False, True]):
        one, other = (Problem(base, dtype, clip_latents=clip_latents) for _ in range(2))
        for _ in range(2):
            emulated.step(one.batch, one.move)
            on_cpu.step(other.batch, other.move)
        assert all(map(torch.equal, one.bits(), other.bits())), (base, dtype, clip_latents)
        assert not all(map(torch.equal, one.bits(), Problem(base, dtype, clip_latents=clip_latents).bits()))
        for w_star, weight, expected in zip(one.batch.w_star, one.batch.weights, other.batch.weights, strict=True):
            weight.fill_(7.0)
            emulated.write(w_star, weight, one.batch.mu)
            assert torch.equal(weight.view(torch.uint8), expected.view(torch.uint8))
    steps = 2 * 2 * len(passes.DTYPES) * len(passes.BASES)
    writes = sum(size > 0 for size in SIZES) * steps // 2
    assert num_launches.value == steps + writes


def test_each_tensor_moves_along_b_at_the_mu_that_its_w_was_written_with(
    emulate: Callable[[str, str], Emulated],
) -> None:
    problem = Problem("sgd", torch.float32, clip_latents=False)
    batch, move, backward = problem.batch, problem.move, QUANTIZERS["bnn++"].backward
    before = [v.clone() for v in batch.w_star]
    emulate(*_pair("bnn++")).pair.step(batch, move)
    for v, gradient, mu, after in zip(before, batch.gradients, batch.written_mus, batch.w_star, strict=True):
        expected = v - move.lr * (backward(v, mu) * gradient + move.weight_decay * v)
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)


def test_nothing_is_launched_for_tensors_without_elements(emulate: Callable[[str, str], Emulated]) -> None:
    pair, num_launches = emulate("hard_sign", "ones")
    pair.write(torch.empty(0), torch.empty(0), 1.0)
    assert num_launches.value == 0


def test_the_chunks_of_a_table_are_those_of_its_tensors() -> None:
    batch = Problem("sgd", torch.float32, clip_latents=False).batch
    assert passes.table(batch, passes.Move("sgd")).num_chunks == sum(-(-size // passes.CHUNK) for size in SIZES)


def test_lists_of_different_lengths_make_no_table() -> None:
    batch = Problem("sgd", torch.float32, clip_latents=False).batch
    with pytest.raises(ValueError, match="shorter"):
        passes.table(batch._replace(gradients=batch.gradients[1:]), passes.Move("sgd"))


# The rule


def test_by_itself_an_optimizer_leaves_what_is_not_on_the_cpu_to_torchs_operations() -> None:
    base = SGD([torch.ones(1)], lr=0.1)
    latents = {torch.ones(1): torch.empty(fused.MIN_ELEMENTS, device="meta")}
    assert not fused.is_wanted(None, base, latents)
    assert fused.is_wanted(True, base, latents)


@pytest.mark.parametrize("error", [AttributeError, OSError, RuntimeError])
def test_without_nvrtc_one_line_says_so_and_there_is_no_pair(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*_: str) -> bytes:
        raise error("fused.cu(1): error:\nno such thing")

    monkeypatch.setattr(cuda, "compiled", compiled)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    passes.warn_once.cache_clear()
    message = r"by torch's operations, .*: no kernel for cuda:0: fused.cu\(1\): error: no such thing$"
    with pytest.warns(UserWarning, match=message) as caught:
        pairs = [cuda.pair.__wrapped__("hard_sign", "ones", torch.device("cuda", 0)) for _ in range(2)]
    passes.warn_once.cache_clear()
    assert pairs == [None, None]
    assert len(caught) == 1


def test_a_torch_without_cuda_has_no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(OSError, match="libnvrtc"):
        cuda.compiled("hard_sign", "ones", "90")
