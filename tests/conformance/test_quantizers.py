"""Claims about every row of the catalogue. A new row is held to them without a word being added here."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import quantizers
from quantizers import QUANTIZERS, Quantizer, get, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])]
MUS = [0.0, 1e-3, 1.0, 50.0, 1e4]
MAGNITUDES = [1e-45, 1e-3, 0.3, 0.5, 1.0, 1.5, 2.4, 12.0, 90.0, 1e4]
FINITE = [0.0, -0.0, *MAGNITUDES, *(-m for m in MAGNITUDES)]

every_row = pytest.mark.parametrize("row", QUANTIZERS.values(), ids=list(QUANTIZERS))
every_principled_row = pytest.mark.parametrize(
    "row", [row for row in QUANTIZERS.values() if row.prox is not None], ids=lambda row: str(row.name)
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_mu = pytest.mark.parametrize("mu", MUS)
finite_floats = st.floats(allow_nan=False, allow_infinity=False)
sharpnesses = st.floats(0, 1e300)


def transform_of(row: Quantizer, u: Tensor, mu: float) -> Tensor:
    assert row.transform is not None
    return row.transform(u, mu)


def prox_of(row: Quantizer, w_star: Tensor, mu: float) -> Tensor:
    assert row.prox is not None
    return row.prox(w_star, mu)


# The row


def test_catalogue_lists_its_rows_by_name_in_the_order_of_the_theory() -> None:
    assert list(QUANTIZERS) == [row.name for row in QUANTIZERS.values()]
    assert [name for name in QUANTIZERS if name in {"fp", "bc", "pc", "bnn", "bnn+", "bnn++"}] == (
        ["fp", "bc", "pc", "bnn", "bnn+", "bnn++"]
    )


@every_row
def test_row_is_frozen_and_cites_its_source(row: Quantizer) -> None:
    assert row.citation
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.name = "other"  # type: ignore[misc]  # that it cannot be set is the claim


@every_row
def test_row_has_both_prox_and_transform_or_neither(row: Quantizer) -> None:
    assert (row.prox is None) == (row.transform is None)


def test_only_full_precision_is_deployed_unsigned() -> None:
    assert [row.name for row in QUANTIZERS.values() if not row.binary] == ["fp"]


@every_row
def test_row_says_whether_it_depends_on_mu(row: Quantizer) -> None:
    w_star = torch.linspace(-2, 2, 41, dtype=torch.float64)
    blunt, sharp = ((row.forward(w_star, mu), row.backward(w_star, mu)) for mu in (0.25, 3.0))
    assert row.uses_mu != all(torch.equal(one, other) for one, other in zip(blunt, sharp, strict=True))


@every_row
def test_row_has_a_literal_twin(row: Quantizer) -> None:
    assert row.name in reference.PAIRS
    assert get(row.name) is row


def test_unknown_name_is_answered_with_the_nearest_and_all_choices() -> None:
    with pytest.raises(
        ValueError, match=r"^unknown quantizer 'bnn\+\+\+'; did you mean 'bnn\+\+'\? \(fp, bc, pc, hardtanh, bnn,"
    ):
        get("bnn+++")


def test_package_exports_what_it_says() -> None:
    assert set(quantizers.__all__) == {
        *(
            "QUANTIZERS",
            "get",
            "Quantizer",
            "ProxConnect",
            "SharpnessSchedule",
            "Constant",
            "Linear",
            "Exponential",
            "Cosine",
            "synthesize",
            "complete",
            "certify",
            "Certificate",
        )
    }
    assert all(hasattr(quantizers, name) for name in quantizers.__all__)


# Shape, dtype, device, finiteness


@every_row
@every_dtype
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 1, 3, 3)])
def test_maps_keep_shape_dtype_and_device(
    row: Quantizer, dtype: torch.dtype, device: str, shape: tuple[int, ...]
) -> None:
    w_star = torch.ones(shape, dtype=dtype, device=device)
    for image in (f(w_star, 2.0) for f in (row.forward, row.backward, row.prox, row.transform) if f):
        assert (image.shape, image.dtype, image.device) == (w_star.shape, w_star.dtype, w_star.device)


@every_row
@every_dtype
def test_maps_leave_their_argument_alone(row: Quantizer, dtype: torch.dtype) -> None:
    w_star = torch.tensor(FINITE, dtype=dtype)
    before = w_star.clone()
    for f in (row.forward, row.backward, row.prox, row.transform):
        if f:
            f(w_star, 2.0)
    assert torch.equal(w_star, before)


@every_row
@every_dtype
@every_mu
def test_maps_are_finite(row: Quantizer, dtype: torch.dtype, mu: float) -> None:
    """At infinity too, but for F of full precision, which is infinite there by definition."""
    finite = torch.tensor(FINITE, dtype=dtype)
    infinite = torch.tensor([math.inf, -math.inf], dtype=dtype)
    assert row.forward(finite, mu).isfinite().all()
    assert row.backward(finite, mu).isfinite().all()
    assert row.backward(infinite, mu).isfinite().all()
    if row.name == "fp":
        assert torch.equal(row.forward(infinite, mu), infinite)
    else:
        assert row.forward(infinite, mu).isfinite().all()


@every_row
@given(w=finite_floats, mu=sharpnesses)
def test_maps_are_finite_wherever_hypothesis_looks(row: Quantizer, w: float, mu: float) -> None:
    for dtype in DTYPES:
        w_star = torch.tensor(w).to(dtype).nan_to_num()
        assert row.forward(w_star, mu).isfinite()
        assert row.backward(w_star, mu).isfinite()


# Values


@every_row
@every_dtype
@every_mu
def test_forward_is_odd_and_backward_even(row: Quantizer, dtype: torch.dtype, mu: float) -> None:
    w_star = torch.tensor([m for m in MAGNITUDES if m >= 1e-3], dtype=dtype)
    assert torch.equal(row.forward(-w_star, mu), -row.forward(w_star, mu))
    assert torch.equal(row.backward(-w_star, mu), row.backward(w_star, mu))


@every_row
@every_dtype
def test_sign_of_zero_is_plus_one(row: Quantizer, dtype: torch.dtype) -> None:
    w_star = torch.tensor(FINITE, dtype=dtype)
    for f in (row.forward, row.prox):
        if f and f(w_star[2:], 0.5).abs().eq(1).all():
            assert f(w_star[:2], 0.5).eq(1).all()


@every_row
@every_dtype
@every_mu
def test_maps_agree_with_the_literal_formulas(row: Quantizer, dtype: torch.dtype, mu: float) -> None:
    """To rounding: of the dtype, and of the literal 1 - s(x), wrong by an eps that an x of up to 37 multiplies."""
    w_star = torch.tensor(FINITE, dtype=dtype)
    forward, backward = reference.PAIRS[row.name]
    eps, literal_error = torch.finfo(dtype).eps, 40 * torch.finfo(torch.float64).eps
    for ours, literal, scale in ((row.forward, forward, 1.0), (row.backward, backward, max(1.0, mu))):
        expected = literal(w_star.double(), mu)
        atol = (2 * eps + literal_error) * scale
        torch.testing.assert_close(ours(w_star, mu).double(), expected, rtol=eps, atol=atol)


@every_principled_row
@every_dtype
@every_mu
def test_forward_is_transform_of_prox(row: Quantizer, dtype: torch.dtype, mu: float) -> None:
    w_star = torch.tensor(FINITE, dtype=dtype)
    assert torch.equal(row.forward(w_star, mu), transform_of(row, prox_of(row, w_star, mu), mu))


@every_principled_row
@every_mu
def test_backward_is_the_derivative_of_transform_at_prox(row: Quantizer, mu: float) -> None:
    """Away from 0, where autograd has no derivative of the |w*| inside sign-Swish."""
    w_star = torch.tensor([w for w in FINITE if abs(w) >= 1e-3], dtype=torch.float64)
    u = prox_of(row, w_star, mu).clone().requires_grad_()
    (derivative,) = torch.autograd.grad(transform_of(row, u, mu).sum(), u)
    torch.testing.assert_close(row.backward(w_star, mu), derivative, rtol=1e-12, atol=1e-13 * max(1.0, mu))


@every_principled_row
@given(w=finite_floats, other=finite_floats, mu=sharpnesses)
def test_prox_is_monotone(row: Quantizer, w: float, other: float, mu: float) -> None:
    lower, upper = prox_of(row, torch.tensor(sorted((w, other)), dtype=torch.float64), mu)
    assert lower <= upper


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


@given(w=finite_floats, mu=sharpnesses)
def test_sign_swish_is_bounded(w: float, mu: float) -> None:
    w_star = torch.tensor(w, dtype=torch.float64)
    assert get("bnn++").forward(w_star, mu).abs() < 1.19969
    assert get("bnn++").backward(w_star, mu).abs() <= mu * (1 + 1e-15)


def test_slope_too_large_for_its_dtype_saturates() -> None:
    zero = torch.zeros(1, dtype=torch.float16)
    assert get("bnn++").backward(zero, 1e6).item() == torch.finfo(torch.float16).max


@every_dtype
@pytest.mark.parametrize("quantizer", ["fp", "pc", "bnn++"])
def test_a_continuous_map_does_not_hide_not_a_number(quantizer: str, dtype: torch.dtype) -> None:
    assert get(quantizer).forward(torch.tensor(math.nan, dtype=dtype), 0.5).isnan()
