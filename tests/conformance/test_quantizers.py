"""Claims about every row of the catalogue. New rows are tested without changes to this file."""

import itertools
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from quantizers import QUANTIZERS, ProxConnect, Quantizer, get, maps, reference
from quantizers.catalog import Map

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(), (0,), (3,), (2, 1, 3, 3)]
MUS = [0.0, 1e-3, 1.0, 50.0, 1e4]
ALL_SCALES_OF_MU = [0.0, *(3.0 * 2.0**k for k in range(-1074, 1023, 100))]
MAGNITUDES = [1e-45, 1e-3, 0.3, 0.5, 1.0, 1.5, 2.4, 12.0, 90.0, 1e4]
FINITE = [0.0, -0.0, *MAGNITUDES, *(-m for m in MAGNITUDES)]

every_row = pytest.mark.parametrize("row", QUANTIZERS.values(), ids=list(QUANTIZERS))
every_principled_row = pytest.mark.parametrize(
    "row", [row for row in QUANTIZERS.values() if row.prox is not None], ids=lambda row: str(row.name)
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_mu = pytest.mark.parametrize("mu", MUS)


def all_scales(dtype: torch.dtype) -> Tensor:
    """Finite numbers of either sign, from the smallest of the dtype to its largest, increasing; both zeros."""
    info = torch.finfo(dtype)
    powers = 2.0 ** torch.arange(-1074, 1024, 1.37, dtype=torch.float64)
    positive = torch.cat([powers, torch.tensor([info.max, info.tiny, 0.0], dtype=torch.float64)]).clamp(max=info.max)
    return torch.cat([positive, -positive]).to(dtype).sort().values


def transform_of(row: Quantizer, u: Tensor, mu: float) -> Tensor:
    assert row.transform is not None
    return row.transform(u, mu)


def prox_of(row: Quantizer, w_star: Tensor, mu: float) -> Tensor:
    assert row.prox is not None
    return row.prox(w_star, mu)


def maps_of(row: Quantizer) -> list[Map]:
    return [f for f in (row.forward, row.backward, row.prox, row.transform) if f is not None]


# The row


def test_catalogue_begins_in_the_order_of_the_theory() -> None:
    assert [name for name in QUANTIZERS if name in {"fp", "bc", "pc", "bnn", "bnn+", "bnn++"}] == (
        ["fp", "bc", "pc", "bnn", "bnn+", "bnn++"]
    )


@every_row
def test_row_has_a_source_a_literal_twin_and_both_prox_and_transform_or_neither(row: Quantizer) -> None:
    assert row.citation
    assert row.name in reference.PAIRS
    assert (row.prox is None) == (row.transform is None)


def test_only_full_precision_is_deployed_unsigned() -> None:
    assert [row.name for row in QUANTIZERS.values() if not row.binary] == ["fp"]


@every_row
def test_row_says_whether_it_depends_on_mu(row: Quantizer) -> None:
    w_star = torch.linspace(-2, 2, 41, dtype=torch.float64)
    blunt, sharp = ((row.forward(w_star, mu), row.backward(w_star, mu)) for mu in (0.25, 3.0))
    assert row.uses_mu != all(torch.equal(one, other) for one, other in zip(blunt, sharp, strict=True))


@pytest.mark.parametrize("row", [row for row in QUANTIZERS.values() if row.completes], ids=lambda row: str(row.name))
def test_a_completion_ends_as_a_sign_at_its_usual_mu(row: Quantizer) -> None:
    assert row.usual_mu is not None
    w_star = torch.tensor([-1.0, -0.05, 0.05, 1.0], dtype=torch.float64)
    torch.testing.assert_close(row.forward(w_star, row.usual_mu(1.0)), w_star.sign(), rtol=0, atol=1e-6)


def test_unknown_name_is_answered_with_the_nearest_and_all_choices() -> None:
    with pytest.raises(
        ValueError, match=r"^unknown quantizer 'bnn\+\+\+'; did you mean 'bnn\+\+'\? \(fp, bc, pc, hardtanh, bnn,"
    ) as error:
        get("bnn+++")
    assert str(error.value).endswith("dsq++), or module:attribute")


# Rows of the user's own


USERS_MODULE = """
from quantizers import Quantizer, maps
PAIR = Quantizer("pair", maps.hard_sign, maps.ones, prox=None, transform=None, citation="mine")
NUMBER = 3
"""


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that is not on sys.path, with the user's own modules."""
    (tmp_path / "users_pairs.py").write_text(USERS_MODULE)
    (tmp_path / "users_empty.py").write_text("")
    (tmp_path / "users_broken.py").write_text("def f(:\n")
    (tmp_path / "users_failing.py").write_text("raise RuntimeError('no\\nluck')\n")
    monkeypatch.chdir(tmp_path)
    for name in ("users_pairs", "users_empty", "users_broken", "users_failing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_quantizer_is_itself() -> None:
    assert get(get("bc")) is get("bc")


@pytest.mark.usefixtures("working_directory")
def test_a_users_row_is_imported_from_the_working_directory_once_and_leaves_the_path_alone() -> None:
    path = list(sys.path)
    row = get("users_pairs:PAIR")
    assert row.name == "pair"
    assert get("users_pairs:PAIR") is row
    assert sys.path == path


@pytest.mark.usefixtures("working_directory")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such:PAIR", "no_such:PAIR: cannot import 'no_such': ModuleNotFoundError: No module named 'no_such'"),
        ("users_broken:PAIR", "users_broken:PAIR: cannot import 'users_broken': SyntaxError: "),
        ("users_failing:PAIR", "users_failing:PAIR: cannot import 'users_failing': RuntimeError: no luck"),
        (":PAIR", ":PAIR: cannot import '': ValueError: "),
        ("users_pairs:PAIER", "users_pairs:PAIER: unknown attribute 'PAIER'; did you mean 'PAIR'? (PAIR)"),
        ("users_pairs:NUMBER", "users_pairs:NUMBER: of type int, not a Quantizer; users_pairs has PAIR"),
        ("users_empty:maps", "users_empty:maps: unknown attribute 'maps' (no Quantizer there)"),
    ],
)
def test_a_users_row_that_cannot_be_had_gets_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=name) as error:
        get(name)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# Shape, dtype, device, finiteness, operations


@every_row
@pytest.mark.parametrize("device", DEVICES)
def test_maps_keep_shape_dtype_and_device(row: Quantizer, device: str) -> None:
    for f, dtype, shape in itertools.product(maps_of(row), DTYPES, SHAPES):
        w_star = torch.ones(shape, dtype=dtype, device=device)
        image = f(w_star, 2.0)
        assert (image.shape, image.dtype, image.device) == (w_star.shape, w_star.dtype, w_star.device)


@every_row
@every_dtype
def test_maps_leave_their_argument_alone(row: Quantizer, dtype: torch.dtype) -> None:
    w_star = torch.tensor([*FINITE, math.nan], dtype=dtype)
    before = w_star.clone()
    for f in maps_of(row):
        f(w_star, 2.0)
    assert torch.equal(w_star.nan_to_num(7), before.nan_to_num(7))


@every_row
@every_dtype
def test_maps_are_finite_at_every_scale_of_weight_and_mu(row: Quantizer, dtype: torch.dtype) -> None:
    """At infinity too, except for F of full precision, which is infinite there by definition."""
    finite, infinite = all_scales(dtype), torch.tensor([math.inf, -math.inf], dtype=dtype)
    for mu in [*MUS, *ALL_SCALES_OF_MU]:
        for f in (row.forward, row.backward):
            assert f(finite, mu).isfinite().all(), mu
            assert f(infinite, mu).isfinite().all() or row.name == "fp", mu
    if row.name == "fp":
        assert torch.equal(row.forward(infinite, 1.0), infinite)


@every_row
@every_dtype
def test_not_a_number_stays_so_but_where_backward_is_the_constant_1(row: Quantizer, dtype: torch.dtype) -> None:
    w_star = torch.tensor([0.3, math.nan, -0.3], dtype=dtype)
    for mu in [0.0, 0.5, 2.0]:
        literal = reference.PAIRS[row.name] if dtype == torch.float64 else ()
        for f in (*maps_of(row), *literal):
            is_one = f is maps.ones or f is reference.one
            assert f(w_star, mu).isnan().tolist() == [False, not is_one, False], (f, mu)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@every_row
def test_not_a_number_stays_so_in_the_fused_step(row: Quantizer) -> None:
    p = torch.nn.Parameter(torch.tensor([0.3, math.nan, -0.3]))
    group = {"params": [p], "quantizer": row.name, "mu": 2.0}
    optimizer = ProxConnect(SGD([group], lr=0.1, momentum=0.9), fused=True)
    for _ in range(2):
        p.grad = torch.full((3,), 0.1)
        optimizer.step()
    assert p.isnan().tolist() == optimizer.latent(p).isnan().tolist() == [False, True, False]
    if row.backward is not maps.ones:
        assert optimizer.state[p]["momentum_buffer"].isnan().tolist() == [False, True, False]


def test_not_a_number_stays_so_in_hardened_weights() -> None:
    p = torch.nn.Parameter(torch.tensor([0.3, math.nan, -0.3]))
    optimizer = ProxConnect(SGD([{"params": [p], "quantizer": "bnn++"}], lr=0.1))
    optimizer.harden()
    assert p.isnan().tolist() == [False, True, False]


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num = 0

    def __torch_dispatch__(self, func: Callable[..., Any], _types: object, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        self.num += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "at_most"), [("bc", 5), ("bnn", 8), ("bnn+", 15), ("bnn++", 20), ("pc", 9)])
def test_forward_and_backward_take_few_operations(name: str, at_most: int) -> None:
    """Each is a kernel launch on a GPU."""
    w_star = torch.rand(3)
    with torch.no_grad(), Operations() as operations:
        get(name).forward(w_star, 2.0)
        get(name).backward(w_star, 2.0)
    assert operations.num <= at_most


# Values


@every_row
@every_dtype
def test_forward_is_odd_and_backward_even(row: Quantizer, dtype: torch.dtype) -> None:
    w_star = torch.tensor([m for m in MAGNITUDES if m >= 1e-3], dtype=dtype)
    for mu in MUS:
        assert torch.equal(row.forward(-w_star, mu), -row.forward(w_star, mu))
        assert torch.equal(row.backward(-w_star, mu), row.backward(w_star, mu))


@every_dtype
def test_sign_of_both_zeros_is_plus_one(dtype: torch.dtype) -> None:
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    for f in (maps.hard_sign, maps.outward, maps.piecewise_linear):
        assert f(zeros, 1.0).tolist() == [1.0, 1.0]
    assert maps.piecewise_linear(zeros, 0.5).tolist() == [0.5, 0.5]


@every_row
@every_dtype
def test_maps_agree_with_the_literal_formulas(row: Quantizer, dtype: torch.dtype) -> None:
    """Up to rounding of the dtype, and of the literal 1 - s(x), whose error of one eps is multiplied by x <= 37."""
    w_star = torch.tensor(FINITE, dtype=dtype)
    forward, backward = reference.PAIRS[row.name]
    eps, literal_error = torch.finfo(dtype).eps, 40 * torch.finfo(torch.float64).eps
    for mu in MUS:
        for ours, literal, scale in ((row.forward, forward, 1.0), (row.backward, backward, max(1.0, mu))):
            expected = literal(w_star.double(), mu)
            atol = (2 * eps + literal_error) * scale
            torch.testing.assert_close(ours(w_star, mu).double(), expected, rtol=eps, atol=atol)


@every_principled_row
@every_dtype
def test_forward_is_transform_of_prox(row: Quantizer, dtype: torch.dtype) -> None:
    w_star = torch.tensor(FINITE, dtype=dtype)
    for mu in MUS:
        assert torch.equal(row.forward(w_star, mu), transform_of(row, prox_of(row, w_star, mu), mu))


@every_principled_row
@every_mu
def test_backward_is_the_derivative_of_transform_at_prox(row: Quantizer, mu: float) -> None:
    w_star = torch.tensor([w for w in FINITE if abs(w) >= 1e-3], dtype=torch.float64)
    u = prox_of(row, w_star, mu).clone().requires_grad_()
    (derivative,) = torch.autograd.grad(transform_of(row, u, mu).sum(), u)
    torch.testing.assert_close(row.backward(w_star, mu), derivative, rtol=1e-12, atol=1e-13 * max(1.0, mu))


@every_principled_row
@every_dtype
def test_prox_is_monotone_at_every_scale_of_weight_and_mu(row: Quantizer, dtype: torch.dtype) -> None:
    w_star = all_scales(dtype)
    for mu in [*MUS, *ALL_SCALES_OF_MU]:
        u = prox_of(row, w_star, mu)
        assert (u[1:] >= u[:-1]).all(), mu


def test_bnn_plus_has_no_prox_because_its_forward_is_flat_where_its_backward_varies() -> None:
    row, near, far = get("bnn+"), torch.tensor(0.1), torch.tensor(0.2)
    assert row.prox is None
    assert row.forward(near, 5.0) == row.forward(far, 5.0)
    assert row.backward(near, 5.0) > row.backward(far, 5.0)


# Piecewise linear


@every_dtype
def test_pc_goes_from_hard_tanh_to_sign(dtype: torch.dtype) -> None:
    forward, w_star = get("pc").forward, torch.tensor(FINITE, dtype=dtype)
    assert torch.equal(forward(w_star, 0.0), w_star.clamp(-1, 1))
    assert torch.equal(forward(w_star, 1.0), get("bc").forward(w_star, 1.0))
    assert torch.equal(forward(w_star, 50.0), forward(w_star, 1.0))


# Sign-Swish


@every_dtype
@every_mu
def test_slope_of_sign_swish_at_zero_is_mu(dtype: torch.dtype, mu: float) -> None:
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    assert torch.equal(get("bnn++").backward(zeros, mu), torch.full_like(zeros, mu))
    assert get("bnn++").forward(zeros, mu).eq(0).all()


@every_dtype
@every_mu
def test_sign_swish_at_infinity_is_sign_unless_mu_is_zero(dtype: torch.dtype, mu: float) -> None:
    infinite = torch.tensor([math.inf, -math.inf], dtype=dtype)
    assert torch.equal(get("bnn++").forward(infinite, mu), infinite.sign() * (mu > 0))
    assert get("bnn++").backward(infinite, mu).eq(0).all()


@every_dtype
def test_sign_swish_of_zero_sharpness_is_zero(dtype: torch.dtype) -> None:
    w_star = torch.tensor([*FINITE, math.inf, -math.inf], dtype=dtype)
    assert get("bnn++").forward(w_star, 0.0).eq(0).all()
    assert get("bnn++").backward(w_star, 0.0).eq(0).all()


@pytest.mark.parametrize("mu", [1e-3, 1.0, 50.0, 1e4])
def test_extrema_of_sign_swish(mu: float) -> None:
    """|mu w| = 2.39936, value 1.19968; rising before, falling beyond."""
    row = get("bnn++")
    extremum = torch.tensor([2.39936, -2.39936], dtype=torch.float64) / mu
    expected = torch.tensor([1.19968, -1.19968], dtype=torch.float64)
    torch.testing.assert_close(row.forward(extremum, mu), expected, rtol=0, atol=5e-6)
    assert row.backward(extremum * 0.99999, mu).gt(0).all()
    beyond = torch.linspace(2.39937, 700, 1000, dtype=torch.float64) / mu
    assert row.backward(beyond, mu).lt(0).all()


def test_sign_swish_tends_to_sign_as_mu_grows() -> None:
    w_star = torch.tensor([-3.0, -0.01, 0.01, 3.0], dtype=torch.float64)
    errors = [(get("bnn++").forward(w_star, mu) - w_star.sign()).abs().max().item() for mu in (1e3, 2e3, 4e3, 1e4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_sign_swish_of_a_small_weight_keeps_its_digits() -> None:
    w_star = torch.tensor([1e-20, 1e-8, 1e-30], dtype=torch.float32)
    torch.testing.assert_close(get("bnn++").forward(w_star, 1.0), w_star, rtol=3e-7, atol=0)


def test_sign_swish_is_bounded_at_every_scale_of_weight_and_mu() -> None:
    w_star = all_scales(torch.float64)
    for mu in [*MUS, *ALL_SCALES_OF_MU]:
        assert (get("bnn++").forward(w_star, mu).abs() < 1.19969).all()
        assert (get("bnn++").backward(w_star, mu).abs() <= mu * (1 + 1e-15)).all()


def test_slope_too_large_for_its_dtype_saturates() -> None:
    zero = torch.zeros(1, dtype=torch.float16)
    assert get("bnn++").backward(zero, 1e6).item() == torch.finfo(torch.float16).max
