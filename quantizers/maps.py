"""Forward, backward, proximal and transform maps: scalar functions applied elementwise, `map(w_star, mu) -> Tensor`.

Every map takes a tensor of any shape and floating dtype and returns one of the same shape, dtype and device, finite
wherever its exact value is. sign(0) = +1 throughout. NaN stays NaN, in F and in B, so that a broken latent shows in the
loss; the exception is B = 1, which does not depend on w*. Operations that round run in float32 or better, so that a
bfloat16 result is rounded once. A result too large for its dtype saturates at the dtype's largest number.

mu >= 0 is the sharpness. Maps that do not depend on it take it too, so that all maps have the same signature.

On a GPU each torch operation is a kernel launch, so maps use few of them. Forward, proximal and transform maps are
differentiable by autograd; backward maps work in place on their temporaries and are not.
"""

import torch
from torch import Tensor


def identity(w_star: Tensor, _mu: float) -> Tensor:
    """F(w*) = w*. Returns its argument, not a copy. The only forward map that is infinite at infinity."""
    return w_star


def ones(w_star: Tensor, _mu: float) -> Tensor:
    """B(w*) = 1, at NaN too: the straight-through gradient of BinaryConnect (Courbariaux et al., 2015)."""
    return torch.ones_like(w_star)


def hard_sign(w_star: Tensor, _mu: float) -> Tensor:
    """F(w*) = +1 where w* >= 0, else -1 (so both zeros map to +1; NaN stays NaN). Its autograd derivative is 0."""
    w = w_star.detach()
    if torch.compiler.is_compiling():  # Inductor's C++ is compiled without signed zeros, which the line below relies on
        return torch.where(w >= 0, 1.0, w.clamp(-1, -1))
    # clamp keeps NaN; w + 0.0 turns -0.0 into +0.0.
    return w.clamp(-1, -1).copysign_(w + 0.0)


def clip(w_star: Tensor, _mu: float) -> Tensor:
    """H(w*) = min(max(w*, -1), 1), the hard tanh. Its autograd derivative at +-1 is 1, the slope inside."""
    # Not clamp, whose autograd derivative at +-1 is 0: T' o P would not be BinaryNet's B.
    return torch.where(w_star.abs() > 1, hard_sign(w_star, _mu), w_star)


def clip_derivative(w_star: Tensor, _mu: float) -> Tensor:
    """H'(w*) = 1 where |w*| <= 1, else 0; at the kinks +-1 it is 1, as in BinaryNet (Courbariaux et al., 2016)."""
    return _at_most_one(w_star.abs())


def outward(w_star: Tensor, _mu: float) -> Tensor:
    """P(w*) = sign(w*) max(1, |w*|): BinaryNet's proximal map, which moves (-1, 1) out to +-1 and keeps the rest."""
    return hard_sign(w_star, _mu) * w_star.abs().clamp(min=1)


def piecewise_linear(w_star: Tensor, mu: float) -> Tensor:
    """L(w*; rho, varrho) at rho = varrho = mu, mu clamped to [0, 1]: sign(w*) min(1, mu + |w*|).

    The general L is sign(w*) where |w*| >= 1 - rho and sign(w*) (varrho + |w*| (1 - varrho) / (1 - rho)) elsewhere
    (Dockhorn et al., 2021); rho = varrho makes the slope 1. mu = 0 gives the hard tanh, mu = 1 gives sign.
    """
    rho = min(max(mu, 0.0), 1.0)
    magnitude = _widened(w_star).abs().add(rho).clamp(max=1)
    return hard_sign(w_star, mu) * magnitude.to(w_star.dtype)


def sign_swish(w_star: Tensor, mu: float) -> Tensor:
    """SS(w*) = 2 s(x) (1 + x (1 - s(x))) - 1 with x = mu w* and s the logistic function (Darabi et al., 2018).

    Odd, steepest at 0, of modulus at most 1.19968 (at |x| = 2.39936); tends to sign(w*) as mu grows. SS(+-inf) = +-1 if
    mu > 0; mu = 0 gives 0. Computed as tanh(x / 2) + 2 x s'(x), two terms of the same sign, so that a small weight
    keeps its digits.
    """
    x = _scaled(_widened(w_star), mu)
    return torch.addcmul(torch.tanh(x / 2), x, _logistic_slope(x), value=2).to(w_star.dtype)


def sign_swish_derivative(w_star: Tensor, mu: float) -> Tensor:
    """SS'(w*) = mu (2 - x tanh(x / 2)) / (1 + cosh(x)) with x = mu w* (Darabi et al., 2018).

    Even, mu at 0, negative beyond |x| = 2.39936, 0 at infinity and for mu = 0. With n = -|x| and p = s(n) for the
    logistic function s it is mu (4 + n (2 - 4 p)) p (1 - p), which cannot overflow.
    """
    w = _widened(w_star)
    n = _scaled(w, mu).abs_().neg_()
    p = torch.sigmoid(n)
    slope = torch.rsub(p, 2, alpha=4).mul_(n).add_(4).mul_(torch.addcmul(p, p, p, value=-1))
    return _narrowed(slope.mul_(_representable(mu, w.dtype)), w_star.dtype)


def sharp_clip(w_star: Tensor, mu: float) -> Tensor:
    """H(mu w*) = min(max(mu w*, -1), 1): the integral of the clipped identity's gradient at sharpness mu."""
    return clip(_scaled(_widened(w_star), mu), mu).to(w_star.dtype)


def sharp_clip_derivative(w_star: Tensor, mu: float) -> Tensor:
    """B(w*) = mu where |mu w*| <= 1, else 0; mu = 1 gives BinaryNet's B."""
    w = _widened(w_star)
    return _narrowed(_at_most_one(_scaled(w, mu).abs_()).mul_(_representable(mu, w.dtype)), w_star.dtype)


def approx_sign(w_star: Tensor, mu: float) -> Tensor:
    """a(mu w*) with a(x) = x (2 - |x|) where |x| < 1, else sign(x): the integral of Bi-Real Net's polynomial."""
    x = _scaled(_widened(w_star), mu).clamp(-1, 1)
    return (x * (2 - x.abs())).to(w_star.dtype)


def approx_sign_derivative(w_star: Tensor, mu: float) -> Tensor:
    """B(w*) = mu a'(mu w*) with a'(x) = 2 - 2 |x| where |x| < 1, else 0; mu = 1 is Bi-Real Net's (Liu et al., 2018)."""
    w = _widened(w_star)
    x = _scaled(w, mu).abs_().clamp_(max=1)
    return _narrowed((1 - x).mul_(_representable(2 * mu, w.dtype)), w_star.dtype)


def tanh(w_star: Tensor, mu: float) -> Tensor:
    """F(w*) = hyperbolic tangent of mu w*."""
    return torch.tanh(_scaled(_widened(w_star), mu)).to(w_star.dtype)


def tanh_derivative(w_star: Tensor, mu: float) -> Tensor:
    """B(w*) = mu / cosh(mu w*)^2."""
    w = _widened(w_star)
    return _narrowed(_sech_squared(w, mu).mul_(_representable(mu, w.dtype)), w_star.dtype)


def decaying_tanh(w_star: Tensor, t: float) -> Tensor:
    """g(w*) = k tanh(t w*), k = max(1 / t, 1): slope 1 at 0 for t <= 1, tanh(t w*) for t >= 1; t = 0 gives w*.

    Its derivative is IR-Net's error decay estimator (Qin et al., CVPR 2020).
    """
    if t >= 1:
        return tanh(w_star, t)
    w = _widened(w_star)
    w = w.clamp(-torch.finfo(w.dtype).max, torch.finfo(w.dtype).max)
    x = w * t
    # w tanh(x) / x, not tanh(x) / t: t may be 0, and x may be too small to keep the digits of w.
    ratio = torch.where(x == 0, 1.0, torch.tanh(x) / torch.where(x == 0, 1.0, x))
    return _narrowed(w * ratio, w_star.dtype)


def decaying_tanh_derivative(w_star: Tensor, t: float) -> Tensor:
    """g'(w*) = k t / cosh(t w*)^2 = max(1, t) / cosh(t w*)^2."""
    w = _widened(w_star)
    return _narrowed(_sech_squared(w, t).mul_(_representable(max(t, 1.0), w.dtype)), w_star.dtype)


def bounded_tanh(w_star: Tensor, k: float) -> Tensor:
    """tanh(k w*) / tanh(k) where |w*| <= 1, else sign(w*): DSQ's curve for one bit on [-1, 1] (Gong et al., ICCV 2019).

    k = 0 gives the hard tanh.
    """
    w = _widened(w_star)
    inside = decaying_tanh(w, k) / _tanh_at_one(w, k)
    return torch.where(w.abs() > 1, hard_sign(w, k), inside).to(w_star.dtype)


def bounded_tanh_derivative(w_star: Tensor, k: float) -> Tensor:
    """B(w*) = k / (tanh(k) cosh(k w*)^2) where |w*| <= 1, else 0; k = 0 gives BinaryNet's B."""
    w = _widened(w_star)
    slope = _sech_squared(w, k).mul_(_representable(max(k, 1.0), w.dtype)).div_(_tanh_at_one(w, k))
    return _narrowed(torch.where(w.abs() > 1, 0, slope), w_star.dtype)


POWER_LINEAR_BELOW = 0.1
POWER_FLAT_ABOVE = 1.5


def power_derivative(w_star: Tensor, mu: float) -> Tensor:
    """B(w*) = |w*|^(1/o - 1) / o where 0.1 < |w*| <= 1.5, 0.1^(1/o - 1) below, 0 above; o = max(mu, 1).

    ReSTE's gradient (Wu et al., ICCV 2023), with the cut-offs of its code. For |w*| <= 0.1, where the power's slope is
    unbounded, B is the mean slope from 0 to 0.1.
    """
    w = _widened(w_star)
    p = 1 / max(mu, 1.0)
    a = w.abs()
    within = a.clamp(POWER_LINEAR_BELOW, POWER_FLAT_ABOVE)
    slope = within.pow(p).div_(within).mul_(p)  # not pow(p - 1): NaN to the power 0 is 1
    slope = torch.where(a <= POWER_LINEAR_BELOW, POWER_LINEAR_BELOW ** (p - 1), slope)
    return torch.where(a > POWER_FLAT_ABOVE, 0, slope).to(w_star.dtype)


def _at_most_one(magnitude: Tensor) -> Tensor:
    """1 where magnitude <= 1, else 0; NaN at NaN. Overwrites `magnitude`, which must not be negative."""
    # Arithmetic, since comparing NaN gives False: [0, 1] is clamped to 1, and everything above is rounded up to 2.
    return 2 - magnitude.clamp_(1, 2).ceil_()


def _scaled(w: Tensor, mu: float) -> Tensor:
    """The product mu w, clamped to about +-1000, where exp(-|mu w|) is 0 in every dtype; so 0 * inf never arises."""
    largest = torch.finfo(w.dtype).max
    mu = min(mu, largest)
    bound = min(1000 / mu, largest) if mu > 0 else largest
    return w.clamp(-bound, bound).mul_(mu)


def _logistic_slope(x: Tensor) -> Tensor:
    """s'(x) = s(x) s(-x), s the logistic function. As p - p^2 with p = s(-|x|): s(x) near 1 would lose digits."""
    p = torch.sigmoid(-x.abs())
    return torch.addcmul(p, p, p, value=-1)


def _sech_squared(w: Tensor, mu: float) -> Tensor:
    """1 / cosh(mu w)^2 = 4 s'(2 mu w), s the logistic function."""
    return _logistic_slope(_scaled(w, 2 * mu)).mul_(4)


def _tanh_at_one(w: Tensor, t: float) -> Tensor:
    """`decaying_tanh` of 1, in the dtype and on the device of w. Shape ()."""
    return decaying_tanh(w.new_ones(()), t)


def _representable(mu: float, dtype: torch.dtype) -> float:
    return min(mu, torch.finfo(dtype).max)


def _widened(w: Tensor) -> Tensor:
    """The same values in float32; float64 stays float64."""
    return w if w.dtype == torch.float64 else w.float()


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in `dtype`, clamped in modulus to the dtype's largest number."""
    if value.dtype == dtype:
        return value
    largest = torch.finfo(dtype).max
    return value.clamp(-largest, largest).to(dtype)
