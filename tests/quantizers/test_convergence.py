"""The bounds of `quantizers.theory.convergence` hold at every T, on random problems run through the real optimizer."""

import pytest
import torch
from torch import Tensor

from quantizers import QUANTIZERS, Constant
from quantizers.theory.convergence import (
    Quadratic,
    curves,
    descent_bound,
    ergodic_gap,
    lazy_projection_bound,
    random_quadratics,
    run,
    sign_bound,
    squared_gradients,
    transformed_smoothness,
)

SMOOTH_COMPLETIONS = ["bnn++", "bireal++", "ede++", "tanh++"]


NUM_PROBLEMS = 18


def problems() -> tuple[Quadratic, Tensor]:
    """Quadratics in four dimensions with L = 1, run side by side, and a start for each in [-2, 2]^4: (18, 4)."""
    generator = torch.Generator().manual_seed(0)
    loss = random_quadratics(NUM_PROBLEMS, 4, generator)
    return loss, 4 * torch.rand(NUM_PROBLEMS, 4, dtype=torch.float64, generator=generator) - 2


def slope_of(values: Tensor) -> float:
    """The log-log slope over the last nine tenths of T, where the effect of the start has faded."""
    first, last = len(values) // 10, len(values)
    return float((values[last - 1] / values[first - 1]).log() / torch.tensor(last / first).log())


def test_the_box_minimizer_is_where_projected_gradient_descent_ends() -> None:
    loss, w = problems()
    for _ in range(3000):
        w = (w - loss.gradient(w)).clamp(-1, 1)
    assert torch.allclose(loss.box_minimizer(), w, atol=1e-12)


def test_random_problems_have_smoothness_one_and_gradients_of_autograd() -> None:
    loss, w = problems()
    w.requires_grad_()
    (by_autograd,) = torch.autograd.grad(loss(w).sum(), w)
    assert loss.smoothness == pytest.approx(1)
    assert torch.allclose(loss.gradient(w), by_autograd)


# The projection for P


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_gap_of_hardtanh_is_below_its_bound_at_every_step(rate: float) -> None:
    loss, start = problems()
    best = loss.box_minimizer()
    path = run(loss, "hardtanh", start, [rate] * 800)
    gap, bound = ergodic_gap(loss, path.weights[1:], path.rates), lazy_projection_bound(loss, path, best)
    assert bool((gap >= -1e-12).all())
    assert bool((gap <= bound).all())
    simple = (best - start).square().sum(-1) / (2 * rate * torch.arange(1, 801).double().unsqueeze(-1))
    assert bool((bound <= simple * (1 + 1e-9)).all())


def test_the_gap_of_hardtanh_falls_as_one_over_t() -> None:
    loss, start = problems()
    path = run(loss, "hardtanh", start, [1.0] * 1500)
    assert slope_of(ergodic_gap(loss, path.weights[1:], path.rates).mean(-1)) <= -0.9


def test_pc_held_at_zero_is_the_same_iteration() -> None:
    loss, start = problems()
    one, other = (run(loss, name, start, [0.5] * 50, Constant(0.0)) for name in ("hardtanh", "pc"))
    assert torch.equal(one.latents, other.latents)


def test_with_noisy_gradients_the_mean_gap_is_below_its_bound_and_falls_as_one_over_root_t() -> None:
    loss, start = problems()
    generator = torch.Generator().manual_seed(0)
    noise = (
        torch.randint(0, 2, (1000, 24, NUM_PROBLEMS, 4), generator=generator).to(start) - 0.5
    )  # |noise|^2 = 1, always
    rates = [0.5 / (t + 1) ** 0.5 for t in range(1000)]
    path = run(loss, "hardtanh", start.expand(24, NUM_PROBLEMS, 4), rates, noise=noise)
    gap = ergodic_gap(loss, path.weights[1:], path.rates).mean(1)
    assert bool((gap <= lazy_projection_bound(loss, path, loss.box_minimizer(), variance=1.0)[:, 0]).all())
    assert slope_of(gap.mean(-1)) <= -0.4


def test_a_learning_rate_past_the_proof_is_refused() -> None:
    loss, start = problems()
    path = run(loss, "hardtanh", start, [1.1] * 3)
    with pytest.raises(ValueError, match="needs eta <= 1/L = 1"):
        lazy_projection_bound(loss, path, loss.box_minimizer())


def test_the_bound_is_of_use_only_for_the_projection() -> None:
    """BinaryConnect, whose P is not a projection, breaks the bound, so the test above can fail."""
    loss, start = problems()
    path = run(loss, "bc", 0.1 * start, [0.1] * 400)
    gap = ergodic_gap(loss, path.weights[1:], path.rates)
    assert not bool((gap <= lazy_projection_bound(loss, path, loss.box_minimizer())).all())


# The sign for P


@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_the_gap_of_bc_is_below_its_bound_at_every_step(rate: float) -> None:
    loss, start = problems()
    path = run(loss, "bc", start, [rate] * 800)
    gap, bound = ergodic_gap(loss, path.weights[:-1], path.rates), sign_bound(path, loss.box_minimizer())
    assert bool((gap <= bound).all())


def test_the_bound_of_bc_levels_off_while_signs_keep_changing() -> None:
    loss, start = problems()
    bound = sign_bound(run(loss, "bc", start, [0.3] * 1500), loss.box_minimizer()).mean(-1)
    assert -0.3 < slope_of(bound) < 0.1


def test_the_gradient_at_the_mean_of_bc_is_how_far_the_latents_went() -> None:
    """The gradient is linear: grad l(mean of w_t) = (y_0 - y_T) / (eta T), so bounded latents mean a small gap."""
    loss, start = problems()
    path = run(loss, "bc", start, [0.1] * 300)
    gone = (path.latents[0] - path.latents[-1]) / (0.1 * 300)
    assert torch.allclose(loss.gradient(path.weights[:-1].mean(0)), gone, atol=1e-12)


# The identity for P


@pytest.mark.parametrize("name", SMOOTH_COMPLETIONS)
def test_completions_at_fixed_mu_descend_within_their_bound(name: str) -> None:
    loss, start = problems()
    row, mu = QUANTIZERS[name], 2.0
    rate = 1 / transformed_smoothness(loss, row, mu)
    path = run(loss, name, 0.2 * start, [rate] * 500, Constant(mu))  # 0.2: inside 1 / mu, where none of them is flat
    assert bool((loss(path.weights).diff(dim=0) <= 1e-12).all())
    assert bool((squared_gradients(loss, row, path, mu) <= descent_bound(loss, path)).all())


@pytest.mark.parametrize("name", SMOOTH_COMPLETIONS)
def test_transformed_smoothness_bounds_every_secant_of_the_gradient(name: str) -> None:
    loss, _ = problems()
    row, mu = QUANTIZERS[name], 2.0
    u, v = 3 * torch.randn(2, 2000, NUM_PROBLEMS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v = u + 0.01 * v
    at_u, at_v = (row.backward(x, mu) * loss.gradient(row.forward(x, mu)) for x in (u, v))
    secants = (at_u - at_v).norm(dim=-1) / (u - v).norm(dim=-1)
    assert 0.05 < float(secants.max()) / transformed_smoothness(loss, row, mu) <= 1


def test_a_transform_with_a_kink_is_refused() -> None:
    loss, _ = problems()
    with pytest.raises(ValueError, match=r"^clip\+\+ at mu=2: B jumps"):
        transformed_smoothness(loss, QUANTIZERS["clip++"], 2.0)


# The picture


def test_every_drawn_curve_lies_below_its_bound() -> None:
    for curve in curves(300):
        assert bool((curve.measured <= curve.bound).all()), curve.title
