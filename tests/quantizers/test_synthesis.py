"""Constructed pairs: F = T o P with B = T' o P, and F as the integral of B."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from scipy import integrate
from torch import Tensor

from quantizers import QUANTIZERS, Quantizer, complete, get, maps, synthesize
from quantizers.catalog import Map
from quantizers.theory.synthesis import Integral

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SURROGATES = [row.name for row in QUANTIZERS.values() if row.completes is not None]


def random_points(num_points: int = 20_000) -> Tensor:
    """Points of every magnitude within +-1024, float64."""
    generator = torch.Generator().manual_seed(0)
    unit = 2 * torch.rand(5, num_points // 5, generator=generator, dtype=torch.float64) - 1
    return (unit * torch.tensor([1024, 4, 0.1, 1e-4, 1e-9], dtype=torch.float64)[:, None]).flatten()


# synthesize


def test_synthesized_row_is_transform_of_prox_and_its_derivative_there() -> None:
    row = synthesize(maps.outward, lambda u, mu: torch.tanh(mu * u))
    w_star = torch.linspace(-3, 3, 101, dtype=torch.float64)
    u = maps.outward(w_star, 2.0)
    torch.testing.assert_close(row.forward(w_star, 2.0), torch.tanh(2 * u), rtol=0, atol=0)
    torch.testing.assert_close(row.backward(w_star, 2.0), 2 * (1 - torch.tanh(2 * u) ** 2), rtol=0, atol=1e-15)
    assert (row.prox, row.usual_mu) == (maps.outward, None)


@pytest.mark.parametrize("name", ["fp", "bc", "pc", "bnn"])
def test_synthesis_makes_the_catalogues_rows_again(name: str) -> None:
    row = get(name)
    assert row.prox is not None
    assert row.transform is not None
    again, w_star = synthesize(row.prox, row.transform), torch.linspace(-2, 2, 81)
    assert torch.equal(again.forward(w_star, 0.5), row.forward(w_star, 0.5))
    assert torch.equal(again.backward(w_star, 0.5), row.backward(w_star, 0.5))


def test_given_backward_is_kept() -> None:
    assert synthesize(maps.identity, maps.sign_swish, maps.sign_swish_derivative).backward is maps.sign_swish_derivative


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_synthesized_and_completed_maps_keep_shape_and_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for row in (synthesize(maps.clip, maps.sign_swish), complete(maps.sign_swish_derivative)):
        w_star = torch.full(shape, 0.3, dtype=dtype)
        for f in (row.forward, row.backward):
            assert (f(w_star, 2.0).shape, f(w_star, 2.0).dtype) == (w_star.shape, w_star.dtype)


def test_a_completed_forward_keeps_the_memory_format() -> None:
    w_star = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    f = complete(maps.clip_derivative).forward(w_star, 1.0)
    assert f.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(f, w_star)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_derivative_needs_no_graph_around_it(context: Callable[[], torch.no_grad]) -> None:
    row, w_star = synthesize(maps.identity, lambda u, _: u**3), torch.tensor([2.0])
    with context():
        assert row.backward(w_star, 1.0).item() == 12.0
    assert not row.backward(w_star.requires_grad_(), 1.0).requires_grad


def test_transform_without_a_graph_has_derivative_zero() -> None:
    row = synthesize(maps.identity, maps.hard_sign)
    assert torch.equal(row.backward(torch.tensor([-1.0, 2.0]), 1.0), torch.zeros(2))


# complete


CLOSED_FORMS: dict[str, tuple[Map, Map]] = {
    "tanh": (lambda w, mu: mu / torch.cosh((mu * w).clamp(-300, 300)) ** 2, lambda w, mu: torch.tanh(mu * w)),
    "sign-Swish": (maps.sign_swish_derivative, maps.sign_swish),
    "clip": (maps.clip_derivative, maps.clip),
    "clip at 0.3": (lambda w, mu: maps.clip_derivative(w / 0.3, mu), lambda w, _: w.clamp(-0.3, 0.3)),
    "cubic": (lambda w, _: 1 - w + 3 * w**2, lambda w, _: w - w**2 / 2 + w**3),
    "zero": (lambda w, _: torch.zeros_like(w), lambda w, _: torch.zeros_like(w)),
}


@pytest.mark.parametrize("mu", [1e-3, 0.5, 5.0, 500.0, 1e4])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_quadrature_keeps_its_stated_error_against_closed_forms(name: str, mu: float) -> None:
    backward, exact = CLOSED_FORMS[name]
    w_star = random_points()
    row = complete(backward)
    stated = row.forward.error(mu)  # type: ignore[attr-defined]  # an Integral: no closed form was given
    expected = exact(w_star, mu)
    errors = (row.forward(w_star, mu) - expected).abs()
    assert errors.max() <= stated
    assert stated <= 1e-9 * max(1.0, expected.abs().max().item())
    assert (errors <= 1e-9 * expected.abs()).all()


def test_quadrature_agrees_with_scipy_where_there_is_no_closed_form() -> None:
    def backward(w: Tensor, mu: float) -> Tensor:
        return torch.exp(-((mu * w) ** 4)) * (2 + torch.sin(3 * w))

    row = complete(backward)
    for w in (-5.0, -0.7, -1e-3, 0.2, 0.9, 30.0):
        expected, error = integrate.quad(
            lambda v: math.exp(-((1.5 * v) ** 4)) * (2 + math.sin(3 * v)), 0, min(max(w, -4.0), 4.0), epsabs=1e-13
        )
        stated = row.forward.error(1.5)  # type: ignore[attr-defined]  # an Integral
        assert abs(row.forward(torch.tensor(w, dtype=torch.float64), 1.5).item() - expected) <= stated + error


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("mu", [0.5, 3.0])
def test_completion_by_quadrature_is_the_catalogues_closed_form(name: str, mu: float) -> None:
    row = get(name)
    w_star = random_points()
    by_quadrature = complete(row.backward).forward
    torch.testing.assert_close(by_quadrature(w_star, mu), row.forward(w_star, mu), rtol=2e-9, atol=1e-12)


def steps(w: Tensor, _mu: float) -> Tensor:
    """B with jumps at 0.1, 0.7 and 2.3 of either sign, zero in places."""
    a = w.abs()
    return torch.where(a < 0.1, 3.0, torch.where(a < 0.7, 0.0, torch.where(a < 2.3, 1e-3, 50.0)))


@pytest.mark.parametrize("backward", [steps, maps.clip_derivative, lambda w, _: w**4, lambda w, _: (w - 0.3).abs()])
def test_integral_of_a_backward_of_one_sign_is_monotone(backward: Map) -> None:
    row = complete(backward)
    near_jumps = torch.cat([w + torch.linspace(-1e-9, 1e-9, 4001).double() for w in (0.1, 0.3, 0.7, 1.0, 2.3)])
    w_star = torch.cat([torch.linspace(-3, 3, 100_001).double(), near_jumps, random_points()]).sort().values
    f = row.forward(w_star, 1.0)
    assert (f.diff() >= -1e-15 * f.abs().clamp(min=1)[1:]).all()


def test_integral_is_zero_at_zero_odd_for_even_backward_and_differentiable() -> None:
    row, w_star = complete(maps.sign_swish_derivative), random_points().requires_grad_()
    f = row.forward(w_star, 3.0)
    assert row.forward(torch.zeros(1), 3.0).item() == 0
    assert torch.equal(row.forward(-w_star, 3.0), -f)
    (slope,) = torch.autograd.grad(f.sum(), w_star)
    torch.testing.assert_close(slope, row.backward(w_star.detach(), 3.0), rtol=0, atol=1e-6)


def test_integral_at_infinity_and_at_not_a_number() -> None:
    w_star = torch.tensor([math.inf, -math.inf, math.nan])
    clipped = complete(maps.clip_derivative).forward(w_star, 1.0)
    assert clipped[:2].tolist() == [1.0, -1.0]
    assert clipped[2].isnan()
    largest = torch.finfo(torch.float32).max
    assert complete(maps.ones).forward(w_star, 1.0)[:2].tolist() == [largest, -largest]


def test_integral_is_made_once_for_each_mu() -> None:
    calls = []

    def backward(w: Tensor, mu: float) -> Tensor:
        calls.append(mu)
        return torch.ones_like(w) * mu

    row = complete(backward)
    row.forward(torch.ones(3), 2.0)
    num_calls = len(calls)
    row.forward(torch.zeros(5), 2.0)
    assert len(calls) == num_calls
    assert row.forward(torch.ones(1), 4.0).item() == 4.0


SCALED = {"bnn": maps.sharp_clip_derivative, "bnn+": maps.sign_swish_derivative, "tanh": maps.tanh_derivative}


@pytest.mark.parametrize("backward", [*SCALED.values(), maps.approx_sign_derivative])
def test_where_mu_only_scales_backward_one_quadrature_serves_all_mu(backward: Map) -> None:
    calls = []

    def counted(w: Tensor, mu: float) -> Tensor:
        calls.append(mu)
        return backward(w, mu)

    w_star, scaled, plain = random_points(), complete(counted, scales=True).forward, complete(backward).forward
    scaled(w_star, 1.0)
    num_calls = len(calls)
    for mu in (0.0, 1e-3, 2.0, 700.0):
        torch.testing.assert_close(scaled(w_star, mu), plain(w_star, mu), rtol=4e-9, atol=1e-9)
    assert len(calls) == num_calls
    assert scaled.error(5.0) == scaled.error(1.0)  # type: ignore[attr-defined]  # an Integral
    infinite = torch.tensor([math.inf, -math.inf, math.nan], dtype=torch.float64)
    assert scaled(infinite, 1e300).isfinite().tolist() == [True, True, False]


@pytest.mark.parametrize("name", ["ede", "reste", "dsq"])
def test_a_promise_that_mu_only_scales_backward_is_checked(name: str) -> None:
    with pytest.raises(ValueError, match=r"^scales=True, but B\(w; mu\) is not mu B\(mu w; 1\) at w=-?\d"):
        complete(get(name).backward, scales=True)


def test_the_latest_tables_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantizers.theory.synthesis.MAX_TABLES", 3)
    integral = Integral(maps.tanh_derivative)
    for mu in (1.0, 2.0, 3.0, 4.0):
        integral(torch.ones(1), mu)
    assert [mu for mu, _ in integral._tables] == [2.0, 3.0, 4.0]


def pickled(row: Quantizer) -> Quantizer:
    again: Quantizer = pickle.loads(pickle.dumps(row))  # noqa: S301  (our own)
    return again


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
@pytest.mark.parametrize(
    "row",
    [
        complete(maps.tanh_derivative),
        complete(maps.tanh_derivative, scales=True),
        synthesize(maps.outward, maps.sign_swish),
        get("bnn++"),
    ],
    ids=["completed", "scaled", "synthesized", "catalogue"],
)
def test_rows_are_copied_and_pickled_also_after_use(row: Quantizer, clone: Callable[[Quantizer], Quantizer]) -> None:
    w_star = torch.linspace(-2, 2, 41)
    f, b = row.forward(w_star, 2.0), row.backward(w_star, 2.0)
    again = clone(row)
    assert again == row
    assert torch.equal(again.forward(w_star, 2.0), f)
    assert torch.equal(again.backward(w_star, 2.0), b)


def test_closed_form_is_kept_as_forward_and_transform() -> None:
    row = complete(maps.sign_swish_derivative, maps.sign_swish)
    assert row.forward is row.transform is maps.sign_swish


def test_a_backward_that_cannot_be_integrated_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    w_star = torch.ones(1)
    monkeypatch.setattr("quantizers.theory.quadrature.MAX_PANELS", 3000)
    with pytest.raises(ValueError, match="B varies too fast"):
        complete(lambda w, _: torch.sin(1e6 * w) + 2).forward(w_star, 1.0)
    with pytest.raises(ValueError, match="B is not finite near w = "):
        complete(lambda w, _: 1 / (w.abs() > 1).double()).forward(w_star, 1.0)
