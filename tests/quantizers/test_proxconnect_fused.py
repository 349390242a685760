"""Steps in one pass over memory are those of torch's operations, to float32 rounding, and share their state."""

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_steps import (
    BASES,
    IN_CPP,
    MUS,
    ROUNDS_AS_TORCH,
    SHAPES,
    Steps,
    equal,
    gradients,
    hand_over_to_the_bit,
    numbers,
)
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from quantizers import QUANTIZERS, ProxConnect, fused, maps, reference
from quantizers.fused import native, passes

every_row = pytest.mark.parametrize("quantizer", IN_CPP)
every_base = pytest.mark.parametrize("base", BASES)


@pytest.mark.parametrize("clip_latents", [False, True])
@every_base
@every_row
def test_each_step_is_that_of_torchs_operations(quantizer: str, base: str, clip_latents: bool) -> None:
    ours, theirs = (Steps(quantizer, base, fused=fused, clip_latents=clip_latents) for fused in (True, False))
    for t in range(len(MUS)):
        theirs.take(ours)
        ours.run(t)
        theirs.run(t)
        assert all(tensor.isfinite().all() for tensor in (*ours.w, *ours.w_star))
        if quantizer in ROUNDS_AS_TORCH and base != "adamw":
            assert equal(ours.w_star, theirs.w_star)
            assert equal(ours.w, theirs.w)
        torch.testing.assert_close(ours.w_star, theirs.w_star, rtol=1e-6, atol=1e-6)
        mu = MUS[t]
        torch.testing.assert_close(
            ours.w, [QUANTIZERS[quantizer].forward(v, mu) for v in ours.w_star], rtol=1e-6, atol=1e-6
        )


@every_base
@every_row
def test_each_step_is_that_of_the_literal_iteration(quantizer: str, base: str) -> None:
    ours = Steps(quantizer, base)
    states: list[dict[str, Any]] = [{} for _ in SHAPES]
    for t in range(len(MUS)):
        before = [v.double() for v in ours.w_star]
        written_mu, (_, literal, _) = ours.optimizer.param_groups[0]["written_mu"], BASES[base]
        ours.run(t)
        lr = ours.optimizer.param_groups[0]["lr"]
        expected = reference.pc_plus_plus(
            before,
            lambda _, t=t: [g.double() for g in gradients(t)],  # type: ignore[misc]
            [quantizer] * len(SHAPES),
            [written_mu],
            literal(lr=lr, **ours.base_options),
            states,
        )
        torch.testing.assert_close([v.double() for v in ours.w_star], expected, rtol=2e-6, atol=2e-6)


@every_base
def test_rows_of_sums_and_products_have_the_bits_of_torchs_operations_in_all_that_is_kept(base: str) -> None:
    """But for w* after AdamW: the square root of torch with MKL is a last bit off now and then, this one never."""
    ours, theirs = (Steps("bnn", base, fused=fused) for fused in (True, False))
    for t in range(3):
        theirs.take(ours)
        ours.run(t)
        theirs.run(t)
        for mine, its in zip(ours.w_star, theirs.w_star, strict=True):
            kept, expected = ours.optimizer.state[mine], theirs.optimizer.state[its]
            assert kept.keys() == expected.keys()
            assert all(torch.equal(kept[name], expected[name]) for name in kept)


@every_base
def test_the_state_is_what_torch_would_hold(base: str) -> None:
    ours, theirs = (Steps("bc", base, fused=fused) for fused in (True, False))
    for each in (ours, theirs):
        each.run(0)
    one, other = (each.optimizer.state_dict()["base"] for each in (ours, theirs))
    assert one["param_groups"] == other["param_groups"]
    assert [*one["state"]] == [*other["state"]]
    for index, state in one["state"].items():
        assert {name: _kind(value) for name, value in state.items()} == {
            name: _kind(value) for name, value in other["state"][index].items()
        }


def _kind(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.shape, value.stride(), value.device, value.requires_grad


@every_base
def test_either_way_goes_on_from_what_the_other_saved(base: str) -> None:
    ours, theirs = (Steps("bnn", base, fused=fused) for fused in (True, False))
    straight = Steps("bnn", base)
    for t in range(6):
        straight.run(t)
        (ours if t % 2 else theirs).run(t)
        (theirs if t % 2 else ours).take(ours if t % 2 else theirs)
    torch.testing.assert_close(ours.w_star, straight.w_star, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_row
def test_what_is_resumed_or_softened_or_stepped_without_a_pass_has_w_to_the_bit(
    quantizer: str, dtype: torch.dtype
) -> None:
    straight, resumed = Steps(quantizer, dtype=dtype), Steps(quantizer, dtype=dtype)
    hand_over_to_the_bit(straight, resumed)
    for each in (straight, resumed):
        for p in each.parameters:
            p.grad = None
        each.optimizer.step()
    assert equal(straight.w, resumed.w)
    straight.run(2)
    resumed.run(2)
    assert equal(straight.w, resumed.w)
    assert equal(straight.w_star, resumed.w_star)


@pytest.mark.parametrize("quantizer", ["bc", "bnn++"])
def test_bfloat16_weights_are_rounded_once_from_float32_latents(quantizer: str) -> None:
    ours, theirs = (Steps(quantizer, dtype=torch.bfloat16, fused=fused) for fused in (True, False))
    for t in range(4):
        theirs.take(ours)
        ours.run(t)
        theirs.run(t)
        assert all(v.dtype == torch.float32 for v in ours.w_star)
        torch.testing.assert_close(ours.w_star, theirs.w_star, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.w, theirs.w, rtol=2**-7, atol=1e-6)  # one unit of bfloat16's last place
    assert quantizer != "bc" or equal(ours.w, theirs.w)


def test_a_parameter_without_a_gradient_keeps_w_star_and_has_w_at_the_new_mu() -> None:
    ours = Steps("bnn++", "adamw", clip_latents=True)
    frozen, before = ours.parameters[0], ours.w_star[0].clone()
    ours.run(0)
    moved = ours.w_star[0].clone()
    assert not torch.equal(moved, before)
    ours.optimizer.param_groups[0]["mu"] = 2.5
    frozen.grad = None
    ours.optimizer.step()
    assert torch.equal(ours.w_star[0], moved)
    torch.testing.assert_close(frozen.detach(), QUANTIZERS["bnn++"].forward(moved, 2.5), rtol=1e-6, atol=1e-6)
    assert [ours.optimizer.state[v]["step"].item() for v in ours.w_star] == [1.0, 2.0, 2.0]


def test_gradients_and_addresses_stay_as_they_are() -> None:
    ours = Steps("bnn++")
    ours.run(0)
    addresses = [tensor.data_ptr() for tensor in (*ours.w, *ours.w_star)]
    ours.run(1)
    assert [tensor.data_ptr() for tensor in (*ours.w, *ours.w_star)] == addresses
    assert equal([p.grad for p in ours.parameters if p.grad is not None], gradients(1))


@every_base
def test_the_order_of_the_elements_in_memory_is_immaterial(base: str) -> None:
    plain, last = Steps("bnn++", base), Steps("bnn++", base)
    last.parameters[0].data = last.parameters[0].data.to(memory_format=torch.channels_last)
    group = {"params": last.parameters, "quantizer": "bnn++", "mu": MUS[0]}
    last.parameters[0].data.copy_(numbers(0)[0])
    make, _, options = BASES[base]
    for p, w_star in zip(last.parameters, numbers(0), strict=True):
        p.data.copy_(w_star)
    last.optimizer = ProxConnect(make([group], lr=0.05, **options), fused=True)
    for t in range(3):
        plain.run(t)
        last.run(t)  # its gradients are in the usual order
    assert last.w_star[0].is_contiguous(memory_format=torch.channels_last)
    assert equal(plain.w_star, last.w_star)
    assert equal(plain.w, last.w)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(num_threads: int) -> None:
    one, several = Steps("bnn++", "adamw"), Steps("bnn++", "adamw")
    before = torch.get_num_threads()
    try:
        for t in range(3):
            torch.set_num_threads(1)
            one.run(t)
            torch.set_num_threads(num_threads)
            several.run(t)
    finally:
        torch.set_num_threads(before)
    assert equal(one.w_star, several.w_star)
    assert equal(one.w, several.w)


def test_groups_that_name_no_quantizer_are_the_bases_alone() -> None:
    w, rest = (torch.nn.Parameter(tensor) for tensor in numbers(0)[:2])
    alone = rest.detach().clone().requires_grad_()
    groups: list[dict[str, Any]] = [{"params": [w], "quantizer": "bc"}, {"params": [rest]}]
    optimizer = ProxConnect(SGD(groups, lr=0.1, momentum=0.9), fused=True)
    plain = SGD([alone], lr=0.1, momentum=0.9)
    for t in range(3):
        w.grad, rest.grad = gradients(t)[:2]
        alone.grad = rest.grad.clone()
        optimizer.step()
        plain.step()
    assert torch.equal(rest, alone)
    assert torch.equal(optimizer.state[rest]["momentum_buffer"], plain.state[alone]["momentum_buffer"])


def test_a_copied_optimizer_is_fused_as_the_original() -> None:
    optimizer = Steps("bnn++").optimizer
    assert copy.deepcopy(optimizer).fused
    assert pickle.loads(pickle.dumps(optimizer)).fused  # noqa: S301  (our own bytes)


# The rule


def _of(num: int, *, fused: bool | None = None, update: str = "pc++") -> ProxConnect:
    p = torch.nn.Parameter(torch.ones(num))
    p.grad = torch.ones(num)
    return ProxConnect(SGD([{"params": [p], "quantizer": "bc"}], lr=0.1), update, fused=fused)


def test_by_itself_an_optimizer_is_fused_from_so_many_latents_on() -> None:
    assert [bool(_of(fused.MIN_ELEMENTS + more)._passes()) for more in (-1, 0)] == [False, True]
    assert not _of(fused.MIN_ELEMENTS, fused=False)._passes()
    assert _of(1, fused=True)._passes()


def test_the_maps_in_cpp_are_maps_and_make_most_of_the_catalogue() -> None:
    assert all(hasattr(maps, name) for name in passes.maps())
    assert len(IN_CPP) >= 18


def test_a_row_whose_maps_are_not_in_cpp_is_stepped_by_torchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(w_star: Tensor, _mu: float) -> Tensor:  # by its name alone one of those in C++
        return torch.full_like(w_star, 2.0)

    monkeypatch.setitem(QUANTIZERS, "bc", dataclasses.replace(QUANTIZERS["bc"], backward=ones))
    optimizer = _of(3, fused=True)
    assert not optimizer._passes()
    optimizer.step()
    assert torch.equal(optimizer.latent(_only(optimizer)), torch.full((3,), 0.8))


def _watched() -> ProxConnect:
    optimizer = _of(3, fused=True)
    optimizer.base.register_step_pre_hook(lambda *_: None)
    return optimizer


def _with(
    base: Callable[..., Optimizer], options: dict[str, Any], dtype: torch.dtype = torch.float32, *, sparse: bool = False
) -> ProxConnect:
    p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    gradient = torch.ones(3, dtype=dtype)
    p.grad = gradient.to_sparse() if sparse else gradient
    return ProxConnect(base([{"params": [p], "quantizer": "bc"}], **{"lr": 0.1, **options}), fused=True)


class _OwnSGD(SGD):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: _of(3, fused=True, update="pq"),
        _watched,
        lambda: _with(_OwnSGD, {}),
        lambda: _with(Adam, {}),
        lambda: _with(SGD, {"momentum": 0.9, "dampening": 0.1}),
        lambda: _with(SGD, {"maximize": True}),
        lambda: _with(AdamW, {"amsgrad": True}),
        lambda: _with(AdamW, {"lr": torch.tensor(0.1)}),
        lambda: _with(SGD, {}, torch.float64),
        lambda: _with(SGD, {}, torch.float16),
        lambda: _with(SGD, {}, sparse=True),
    ],
    ids=[
        "pq",
        "hook",
        "subclass",
        "adam",
        "dampening",
        "maximize",
        "amsgrad",
        "tensor",
        "float64",
        "float16",
        "sparse",
    ],
)
def test_what_the_pass_does_not_know_is_stepped_by_torchs_operations(make: Callable[[], ProxConnect]) -> None:
    assert not make()._passes()


def test_a_closure_is_stepped_by_torchs_operations() -> None:
    optimizer = _of(3, fused=True)
    (p,) = optimizer.param_groups[0]["params"]
    num_calls = 0

    def closure() -> float:
        nonlocal num_calls
        num_calls += 1
        return 1.5

    assert optimizer.step(closure) == pytest.approx(1.5)
    assert num_calls == 1
    assert torch.equal(optimizer.latent(p), torch.full((3,), 0.9))


@pytest.fixture
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.pair.cache_clear()
    passes.warn_once.cache_clear()
    yield
    native.pair.cache_clear()
    passes.warn_once.cache_clear()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "No such file or directory: 'no-such-compiler'"),
        ("false", "false cannot compile fused.cpp"),
    ],
)
def test_without_a_compiler_one_line_says_so_and_torchs_operations_step(
    compiler: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    expected = _of(3, fused=False)
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer = _of(3, fused=True)
    optimizer.step()
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _of(3, fused=True).step()
    expected.step()
    assert torch.equal(optimizer.latent(_only(optimizer)), expected.latent(_only(expected)))


def _only(optimizer: ProxConnect) -> Tensor:
    (p,) = optimizer.param_groups[0]["params"]
    assert isinstance(p, Tensor)
    return p


@pytest.mark.usefixtures("nothing_compiled")
def test_a_library_is_compiled_once_and_kept() -> None:
    assert native.pair("clip", "ones") is not None
    (library,) = native.folder().iterdir()
    written = library.stat().st_mtime_ns
    native.pair.cache_clear()
    assert native.pair("clip", "ones") is not None
    assert [path.stat().st_mtime_ns for path in native.folder().iterdir()] == [written]


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("base", ["momentum", "adamw"])
@pytest.mark.parametrize("quantizer", ["bnn++", "reste++"])
def test_a_processor_without_wide_vectors_makes_the_same_bits(
    quantizer: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = Steps(quantizer, base)
    for t in range(len(MUS)):
        wide.run(t)
    native.pair.cache_clear()
    monkeypatch.setattr(native, "PROCESSORS", {})
    narrow = Steps(quantizer, base)
    for t in range(len(MUS)):
        narrow.run(t)
    assert equal(wide.w_star, narrow.w_star)
    assert equal(wide.w, narrow.w)
    assert len(list(native.folder().glob("*.so"))) == (1 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 2)
