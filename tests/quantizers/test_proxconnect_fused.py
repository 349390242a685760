"""Fused steps equal the steps of torch's operations, up to float32 rounding, and share their state."""

import dataclasses
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_steps import (
    BASES,
    EPS,
    IN_CPP,
    MUS,
    ROUNDINGS,
    ROUNDS_AS_TORCH,
    SHAPES,
    TORCH_FUSES_MULTIPLY_ADD,
    Steps,
    equal,
    gradients,
    hand_over_to_the_bit,
    numbers,
    require_within_rounding,
)
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from quantizers import QUANTIZERS, ProxConnect, fused, reference
from quantizers.fused import native, passes

every_row = pytest.mark.parametrize("quantizer", IN_CPP)
every_base = pytest.mark.parametrize("base", BASES)


@pytest.mark.parametrize("clip_latents", [False, True])
@every_base
@every_row
def test_each_step_is_the_eager_one_up_to_rounding(quantizer: str, base: str, clip_latents: bool) -> None:
    ours, theirs = (Steps(quantizer, base, fused=fused, clip_latents=clip_latents) for fused in (True, False))
    for t in range(len(MUS)):
        theirs.take(ours)
        terms, mu = ours.terms(t), MUS[t]
        ours.run(t)
        theirs.run(t)
        assert all(tensor.isfinite().all() for tensor in (*ours.w, *ours.w_star))
        if quantizer in ROUNDS_AS_TORCH and base != "adamw" and TORCH_FUSES_MULTIPLY_ADD:
            assert equal(ours.w_star, theirs.w_star)
            assert equal(ours.w, theirs.w)
        require_within_rounding(ours.w_star, theirs.w_star, terms)
        expected = [QUANTIZERS[quantizer].forward(v, mu) for v in ours.w_star]
        require_within_rounding(ours.w, expected, [w.abs().clamp(min=1) for w in expected])


@every_base
@every_row
def test_each_step_is_that_of_the_literal_iteration(quantizer: str, base: str) -> None:
    ours = Steps(quantizer, base)
    states: list[dict[str, Any]] = [{} for _ in SHAPES]
    for t in range(3):
        before, terms = [v.double() for v in ours.w_star], ours.terms(t)
        written_mu, (_, literal, _) = ours.optimizer.state_dict()["state"][0]["mu"], BASES[base]
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
        # The literal state has evolved separately for t steps; each of them rounds ours once more.
        require_within_rounding(ours.w_star, expected, [(1 + t) * term for term in terms])


@every_base
def test_rows_of_sums_and_products_have_the_bits_of_torchs_operations_in_all_that_is_kept(base: str) -> None:
    """Except for w* after AdamW: torch's square root with MKL is sometimes off by the last bit, ours never is."""
    if not TORCH_FUSES_MULTIPLY_ADD:
        pytest.skip("torch's kernels for this processor level round a x + b twice")
    ours, theirs = (Steps("bnn", base, fused=fused) for fused in (True, False))
    for t in range(3):
        theirs.take(ours)
        ours.run(t)
        theirs.run(t)
        for mine, its in zip(ours.parameters, theirs.parameters, strict=True):
            kept, expected = ours.optimizer.state[mine], theirs.optimizer.state[its]
            assert kept.keys() == expected.keys()
            assert all(torch.equal(kept[name], expected[name]) for name in kept)


@every_base
def test_the_state_is_what_torch_would_hold(base: str) -> None:
    ours, theirs = (Steps("bc", base, fused=fused) for fused in (True, False))
    for each in (ours, theirs):
        each.run(0)
    one, other = (each.optimizer.state_dict() for each in (ours, theirs))
    assert one["param_groups"] == other["param_groups"]
    assert [*one["state"]] == [*other["state"]]
    for index, state in one["state"].items():
        assert {name: _kind(value) for name, value in state.items()} == {
            name: _kind(value) for name, value in other["state"][index].items()
        }


def _kind(value: Tensor | float) -> tuple[Any, ...]:
    if not isinstance(value, Tensor):
        return (value,)
    return value.dtype, value.shape, value.stride(), value.device, value.requires_grad


@every_base
def test_either_way_goes_on_from_what_the_other_saved(base: str) -> None:
    ours, theirs = (Steps("bnn", base, fused=fused) for fused in (True, False))
    straight = Steps("bnn", base)
    for t in range(6):
        terms = straight.terms(t)
        straight.run(t)
        (ours if t % 2 else theirs).run(t)
        (theirs if t % 2 else ours).take(ours if t % 2 else theirs)
        require_within_rounding(ours.w_star, straight.w_star, [(1 + t) * term for term in terms])


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
        terms = ours.terms(t)
        ours.run(t)
        theirs.run(t)
        assert all(v.dtype == torch.float32 for v in ours.w_star)
        require_within_rounding(ours.w_star, theirs.w_star, terms)
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
    expected = QUANTIZERS["bnn++"].forward(moved, 2.5)
    require_within_rounding([frozen.detach()], [expected], [torch.ones(())])
    assert [ours.optimizer.state[p]["step"].item() for p in ours.parameters] == [1.0, 2.0, 2.0]


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


# Clipping


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_base
@every_row
def test_a_clipped_step_uses_the_products_that_the_norm_was_of(quantizer: str, base: str, dtype: torch.dtype) -> None:
    ours, theirs = (Steps(quantizer, base, fused=fused, dtype=dtype) for fused in (True, False))
    for t in range(2):
        theirs.take(ours)
        terms = ours.terms(t)
        norms = []
        for each in (ours, theirs):
            each.give(t)
            norms.append(each.optimizer.clip_grad_norm_(1.0))
            assert all(entry.block.has_product() for entry in each.optimizer._entries.values())
            each.optimizer.step()
            assert not any(entry.block.has_product() for entry in each.optimizer._entries.values())
        # A sum of n squares, where each square and each partial sum is rounded.
        torch.testing.assert_close(*norms, rtol=EPS * sum(w.numel() for w in ours.w), atol=0)
        gradient_rounding = torch.finfo(dtype).eps  # of the scaled p.grad, if the eager step computes its product again
        for one, other, term in zip(ours.w_star, theirs.w_star, terms, strict=True):
            assert ((one - other).abs() <= (ROUNDINGS * EPS + gradient_rounding) * term).all()


def test_products_are_taken_anew_where_a_gradient_has_changed_since() -> None:
    ours, expected = Steps("bnn++"), Steps("bnn++")
    for each in (ours, expected):
        each.give(0)
        for p in each.parameters:
            assert p.grad is not None
            if each is expected:
                p.grad.mul_(0.5)
    for p in expected.parameters:
        assert p.grad is not None
        p.grad.add_(1.0)
    clip = ours.optimizer.clip_grad_norm_(1e-3)
    for p in ours.parameters:
        assert p.grad is not None
        p.grad.mul_(0.5 * (clip + 1e-6) / 1e-3).add_(1.0)
    terms = [term + 1 for term in ours.terms(0)]
    ours.optimizer.step()
    expected.optimizer.step()
    require_within_rounding(ours.w_star, expected.w_star, terms)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_gives_such_a_norm_and_shows_in_w(bad: float) -> None:
    ours = Steps("bnn++")
    ours.give(0)
    assert ours.parameters[1].grad is not None
    ours.parameters[1].grad[0] = bad
    assert not ours.optimizer.clip_grad_norm_(1.0).isfinite()
    ours.optimizer.step()
    assert ours.w[1][0].isnan()


# The rule


def _of(num: int, *, fused: bool | None = None, update: str = "pc++") -> ProxConnect:
    p = torch.nn.Parameter(torch.ones(num))
    p.grad = torch.ones(num)
    return ProxConnect(SGD([{"params": [p], "quantizer": "bc"}], lr=0.1), update, fused=fused)


def test_by_itself_an_optimizer_is_fused_from_so_many_latents_on() -> None:
    assert [_of(fused.MIN_ELEMENTS + more).is_fused for more in (-1, 0)] == [False, True]
    assert not _of(fused.MIN_ELEMENTS, fused=False).is_fused
    assert _of(1, fused=True).is_fused


def test_an_optimizer_that_quantizes_nothing_is_not_fused() -> None:
    assert not ProxConnect(SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1), fused=True).is_fused


def test_the_maps_in_cpp_are_those_of_the_catalogue() -> None:
    structs = set(
        re.findall(r"^struct (\w+) \{$", passes.MAPS.read_text().partition("// Maps\n")[2], flags=re.MULTILINE)
    )
    assert structs == passes.MAP_NAMES
    assert list(QUANTIZERS) == IN_CPP


def _twice(w_star: Tensor, _mu: float) -> Tensor:
    return torch.full_like(w_star, 2.0)


def test_a_map_of_yours_is_not_taken_for_the_one_of_that_name_in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    _twice.__name__ = "ones"
    monkeypatch.setitem(QUANTIZERS, "bc", dataclasses.replace(QUANTIZERS["bc"], backward=_twice))
    optimizer = _of(fused.MIN_ELEMENTS)
    assert not optimizer.is_fused
    optimizer.step()
    assert torch.equal(optimizer.latent(_only(optimizer)), torch.full((fused.MIN_ELEMENTS,), 0.8))


class _OwnSGD(SGD):
    pass


def _with(
    base: Callable[..., Optimizer], *, dtype: torch.dtype = torch.float32, update: str = "pc++", **options: object
) -> Callable[[bool | None], ProxConnect]:
    def make(switch: bool | None) -> ProxConnect:
        p = torch.nn.Parameter(torch.linspace(-1, 1, fused.MIN_ELEMENTS, dtype=dtype))
        p.grad = torch.ones_like(p)
        made = base([{"params": [p], "quantizer": "bnn"}], **{"lr": 0.1, **options})
        return ProxConnect(made, update, fused=switch)

    return make


NEVER_FUSED: dict[str, tuple[Callable[[bool | None], ProxConnect], str]] = {
    "pq": (_with(SGD, update="pq"), "the update is pq, not pc"),
    "subclass": (_with(_OwnSGD), "the base is _OwnSGD, not exactly torch's SGD or AdamW"),
    "adam": (_with(Adam), "the base is Adam, not exactly"),
    "dampening": (_with(SGD, momentum=0.9, dampening=0.1), "dampening=0.1 is not supported"),
    "maximize": (_with(SGD, maximize=True), "maximize=True is not supported"),
    "amsgrad": (_with(AdamW, amsgrad=True), "amsgrad=True is not supported"),
    "tensor lr": (_with(AdamW, lr=torch.tensor(0.1)), "lr is not a Python number"),
    "float64": (_with(SGD, dtype=torch.float64), "a parameter is torch.float64, not float32 or bfloat16"),
    "float16": (_with(SGD, dtype=torch.float16), "a parameter is torch.float16"),
}


@pytest.mark.parametrize(("make", "reason"), NEVER_FUSED.values(), ids=NEVER_FUSED)
def test_what_cannot_be_fused_is_refused_when_asked_for_and_else_stepped_eagerly(
    make: Callable[[bool | None], ProxConnect], reason: str
) -> None:
    by_itself, eager = make(None), make(False)
    for optimizer in (by_itself, eager):
        optimizer.step()
    torch.testing.assert_close(*(o.latent(_only(o)) for o in (by_itself, eager)), rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"^fused=True: {re.escape(reason)}"):
        make(True)


def test_an_option_of_a_later_torch_is_not_ignored() -> None:
    base = SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    base.param_groups[0]["quantizer"] = "bc"
    base.defaults["cautious"] = True
    with pytest.raises(
        ValueError, match="this version of torch has options that the fused step does not know: cautious"
    ):
        ProxConnect(base, fused=True)


def _hooked(optimizer: ProxConnect) -> None:
    optimizer.base.register_step_pre_hook(lambda *_: None)


def _sparse(optimizer: ProxConnect) -> None:
    p = _only(optimizer)
    p.grad = torch.ones_like(p).to_sparse()


def _with_tensor_lr(optimizer: ProxConnect) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "a step hook is registered on the base optimizer"),
        (_sparse, "a gradient is torch.sparse_coo torch.float32, not dense torch.float32"),
        (_with_tensor_lr, "lr is not a Python number"),
    ],
)
def test_a_step_that_cannot_be_fused_any_more_is_refused_when_asked_for_and_else_eager(
    change: Callable[[ProxConnect], None], reason: str
) -> None:
    asked, by_itself, eager = (
        _of(fused.MIN_ELEMENTS, fused=True),
        _of(fused.MIN_ELEMENTS),
        _of(fused.MIN_ELEMENTS, fused=False),
    )
    for optimizer in (asked, by_itself, eager):
        change(optimizer)
    with pytest.raises(RuntimeError, match=f"^fused=True: {reason}"):
        asked.step()
    for optimizer in (by_itself, eager):
        optimizer.step()
    assert torch.equal(by_itself.latent(_only(by_itself)), eager.latent(_only(eager)))


def test_a_closure_is_evaluated_once_and_then_stepped_fused() -> None:
    optimizer, expected = _of(3, fused=True), _of(3, fused=True)
    num_calls = 0

    def closure() -> float:
        nonlocal num_calls
        num_calls += 1
        return 1.5

    assert optimizer.step(closure) == pytest.approx(1.5)
    expected.step()
    assert num_calls == 1
    assert torch.equal(optimizer.latent(_only(optimizer)), expected.latent(_only(expected)))


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_infinite_latents_without_decay_stay_infinite_as_in_torch(base: str) -> None:
    found = []
    for switch in (True, False):
        p = torch.nn.Parameter(torch.tensor([torch.inf, -torch.inf, 1.0]))
        p.grad = torch.ones(3)
        make = {"sgd": SGD, "adamw": AdamW}[base]
        optimizer = ProxConnect(make([{"params": [p], "quantizer": "bc"}], lr=0.1, weight_decay=0.0), fused=switch)
        optimizer.step()
        found.append(optimizer.latent(p))
    torch.testing.assert_close(*found)
    assert found[0].isinf().tolist() == [True, True, False]


# The compiler and its cache


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
        ("'unclosed", "No closing quotation"),
    ],
)
def test_without_a_compiler_one_line_says_so_and_torchs_operations_step(
    compiler: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    size = fused.MIN_ELEMENTS
    expected = _of(size, fused=False)
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer = _of(size)
    optimizer.step()
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _of(size).step()
        with pytest.raises(ValueError, match=f"^fused=True: .*{message}"):
            _of(3, fused=True)
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


def _again(forward: str, backward: str) -> passes.Pair | None:
    native.pair.cache_clear()
    return native.pair(forward, backward)


@pytest.mark.usefixtures("nothing_compiled")
def test_the_folder_is_its_owners_only() -> None:
    assert native.pair("clip", "ones") is not None
    assert native.folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("num_bytes", [0, 100, 2000, 16_000])
def test_a_damaged_library_is_compiled_again_and_never_loaded(num_bytes: int) -> None:
    assert native.pair("clip", "ones") is not None
    (library,) = native.folder().iterdir()
    whole = library.read_bytes()
    library.unlink()  # not truncated in place: this process has it mapped
    library.write_bytes(whole[:num_bytes])
    assert _again("clip", "ones") is not None
    assert library.read_bytes() == whole


@pytest.mark.usefixtures("nothing_compiled")
def test_of_two_that_compile_at_once_both_use_the_first_file(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, link = [], os.link

    def beaten(made: Path, library: Path) -> None:
        link(made, library)
        compiled.append(library.stat().st_ino)
        link(made, library)  # as if another process had been faster

    monkeypatch.setattr(os, "link", beaten)
    assert native.pair("clip", "ones") is not None
    (library,) = native.folder().iterdir()
    assert [library.stat().st_ino] == compiled


@pytest.mark.usefixtures("nothing_compiled")
def test_the_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -DUNUSED='a b'")
    assert native.pair("clip", "ones") is not None


@pytest.mark.usefixtures("nothing_compiled")
def test_without_a_home_libraries_are_kept_in_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert native.pair("clip", "ones") is not None
    assert native.folder().parent == tmp_path


@pytest.mark.usefixtures("nothing_compiled")
def test_a_folder_of_somebody_else_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.warns(UserWarning, match="belongs to another user: set XDG_CACHE_HOME"):
        assert native.pair("clip", "ones") is None


def test_the_flags_are_what_torch_tests_for_and_gcc_8_knows() -> None:
    """GCC 8 to 10 do not know the levels x86-64-v3 and v4; torch checks for these sets before it reports a level."""
    assert set(native.PROCESSORS["AVX2"]) == {"-mavx2", "-mfma"}
    assert not any(flag.startswith("-march") for flags in native.PROCESSORS.values() for flag in flags)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_a_processor_without_wide_vectors_makes_the_same_bits(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = "bnn++"
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
