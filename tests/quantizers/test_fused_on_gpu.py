"""On a GPU: steps in one launch are those of torch's operations, to float32 rounding, and are resumed to the bit.

    pytest tests/quantizers/test_fused_on_gpu.py

Nobody has run these on a GPU yet. They are what has to pass before a GPU's latents are fused without being asked to.
"""

import warnings
from typing import Any

import pytest
import torch
from fused_steps import BASES, IN_CPP, MUS, SHAPES, Steps, equal, hand_over_to_the_bit
from torch import Tensor
from torch.optim import SGD, AdamW

from quantizers import QUANTIZERS, ProxConnect, cuda, fused, passes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

every_row = pytest.mark.parametrize("quantizer", IN_CPP)
every_base = pytest.mark.parametrize("base", BASES)
GPU = "cuda:0"


@pytest.mark.parametrize("clip_latents", [False, True])
@every_base
@every_row
def test_each_step_is_that_of_torchs_operations(quantizer: str, base: str, clip_latents: bool) -> None:
    ours, theirs = (
        Steps(quantizer, base, fused=fused, clip_latents=clip_latents, device=GPU) for fused in (True, False)
    )
    for t in range(len(MUS)):
        theirs.take(ours)
        ours.run(t)
        theirs.run(t)
        assert all(tensor.isfinite().all() for tensor in (*ours.w, *ours.w_star))
        torch.testing.assert_close(ours.w_star, theirs.w_star, rtol=1e-6, atol=1e-6)
        expected = [QUANTIZERS[quantizer].forward(v, MUS[t]) for v in ours.w_star]
        torch.testing.assert_close(ours.w, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_base
@every_row
def test_a_gpu_has_the_bits_of_a_cpu(quantizer: str, base: str, dtype: torch.dtype) -> None:
    """But for one constant of reste's rows, a power in double precision, which either may round its own way."""
    on_gpu, on_cpu = (Steps(quantizer, base, dtype=dtype, device=device) for device in (GPU, "cpu"))
    for t in range(len(MUS)):
        on_gpu.run(t)
        on_cpu.run(t)
        for here, there in ((on_gpu.w_star, on_cpu.w_star), (on_gpu.w, on_cpu.w)):
            moved = [tensor.cpu() for tensor in here]
            if quantizer.startswith("reste"):
                tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
                torch.testing.assert_close(moved, there, rtol=tolerance, atol=tolerance)
            else:
                assert equal(moved, there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_base
@every_row
def test_what_is_resumed_or_hardened_and_softened_goes_on_to_the_bit(
    quantizer: str, base: str, dtype: torch.dtype
) -> None:
    straight, resumed = (Steps(quantizer, base, dtype=dtype, device=GPU) for _ in range(2))
    hand_over_to_the_bit(straight, resumed)
    for each in (straight, resumed):
        each.run(2)
    assert equal(straight.w, resumed.w)
    assert equal(straight.w_star, resumed.w_star)


@every_base
def test_the_state_is_what_torch_would_hold(base: str) -> None:
    ours, theirs = (Steps("bc", base, fused=fused, device=GPU) for fused in (True, False))
    for each in (ours, theirs):
        each.run(0)
    for mine, its in zip(ours.w_star, theirs.w_star, strict=True):
        kept, expected = ours.optimizer.state[mine], theirs.optimizer.state[its]
        assert {name: (value.dtype, value.shape, value.device) for name, value in kept.items()} == {
            name: (value.dtype, value.shape, value.device) for name, value in expected.items()
        }


@every_base
def test_a_group_is_stepped_in_one_launch_without_waiting_for_the_gpu(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = []
    loaded = cuda.loaded

    def noted(binary: bytes) -> cuda.Launch:
        launch = loaded(binary)

        def note(name: str, num_blocks: int, table: Tensor) -> None:
            launches.append(name)
            launch(name, num_blocks, table)

        return note

    monkeypatch.setattr(cuda, "loaded", noted)
    cuda.pair.cache_clear()
    ours = Steps("bnn++", base, device=GPU)
    ours.run(0)
    launches.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that the mode is young
        torch.cuda.set_sync_debug_mode("error")
    try:
        ours.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert launches == [f"{base}_float32"]
    cuda.pair.cache_clear()


def test_a_step_waits_for_what_its_stream_does_before() -> None:
    ours, expected = (Steps("bnn++", device=GPU) for _ in range(2))
    gradients = [torch.randn(shape, device=GPU) for shape in SHAPES]
    for each in (ours, expected):
        for p in each.parameters:
            p.grad = torch.zeros_like(p)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        large = torch.ones(2**26, device=GPU)
        for _ in range(20):
            large = large * 1.0
        for p, gradient in zip(ours.parameters, gradients, strict=True):
            p.grad = gradient + large[0] - 1.0
        ours.optimizer.step()
    torch.cuda.synchronize()
    for p, gradient in zip(expected.parameters, gradients, strict=True):
        p.grad = gradient
    expected.optimizer.step()
    torch.testing.assert_close(ours.w_star, expected.w_star, rtol=1e-6, atol=1e-6)


def test_many_large_tensors_are_each_stepped_by_their_own_chunks() -> None:
    sizes = [0, 1, passes.CHUNK, 5 * passes.CHUNK + 7, 2**20 + 3, *range(1, 300), 0]
    starts = [torch.randn(size, device=GPU) for size in sizes]
    one, other = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = [
        ProxConnect(SGD([{"params": parameters, "quantizer": "bc"}], lr=0.1, momentum=0.9), fused=is_fused)
        for parameters, is_fused in ((one, True), (other, False))
    ]
    for _ in range(3):
        for p, q in zip(one, other, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    latents = [[optimizer.latent(p) for p in ps] for optimizer, ps in zip(optimizers, (one, other), strict=True)]
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-6, atol=1e-6)


# The rule


def _of(device: str, base: type[SGD | AdamW] = SGD, *, is_fused: bool | None = True, **options: Any) -> ProxConnect:  # noqa: ANN401
    p = torch.nn.Parameter(torch.ones(fused.MIN_ELEMENTS, device=device))
    p.grad = torch.ones_like(p)
    return ProxConnect(base([{"params": [p], "quantizer": "bc"}], lr=0.1, **options), fused=is_fused)


def test_a_gpu_is_asked_to_be_fused() -> None:
    assert _of(GPU)._passes()
    assert not _of(GPU, is_fused=None)._passes()
    assert not _of(GPU, is_fused=False)._passes()


def test_adamw_that_counts_steps_on_the_gpu_is_stepped_by_torchs_operations() -> None:
    assert _of(GPU, AdamW)._passes()
    for option in ("fused", "capturable"):
        optimizer = _of(GPU, AdamW, **{option: True})
        assert not optimizer._passes()
        optimizer.step()


def test_a_group_on_two_devices_is_stepped_by_torchs_operations() -> None:
    here, there = (torch.nn.Parameter(torch.ones(5, device=device)) for device in (GPU, "cpu"))
    group = {"params": [here, there], "quantizer": "bc", "mu": 1.0}
    optimizer = ProxConnect(SGD([group], lr=0.1), fused=True)
    for p in (here, there):
        p.grad = torch.ones_like(p)
    assert not optimizer._passes()
    optimizer.step()
    assert torch.equal(optimizer.latent(here).cpu(), optimizer.latent(there))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_second_gpu_steps_its_own_group_whichever_is_current() -> None:
    first, second = (Steps("bnn++", "adamw", device=device) for device in (GPU, "cuda:1"))
    for t in range(3):
        for each in (first, second):
            each.run(t)
    assert equal([v.cpu() for v in first.w_star], [v.cpu() for v in second.w_star])


def test_without_a_kernel_torchs_operations_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: str) -> bytes:
        raise RuntimeError("Kernel compilation failed")

    monkeypatch.setattr(cuda, "compiled", compiled)
    cuda.pair.cache_clear()
    passes.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="no kernel for cuda:0: Kernel compilation failed"):
        optimizer = _of(GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    cuda.pair.cache_clear()
    passes.warn_once.cache_clear()
    (p,) = optimizer.param_groups[0]["params"]
    assert isinstance(p, Tensor)
    torch.testing.assert_close(optimizer.latent(p), torch.full_like(p, 0.9))
