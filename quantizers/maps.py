"""Forward, backward, proximal and transform maps: scalar functions applied elementwise, `map(w_star, mu) -> Tensor`.

Every map takes a tensor of any shape and any floating dtype and returns one of the same shape, dtype and device, finite
wherever its value is. What rounds is computed in float32 or better, so that a bfloat16 result is rounded once. A result
too large for its dtype saturates at the dtype's largest number. sign(0) = +1 throughout.

mu >= 0 is the sharpness; a map that has none takes it all the same, so that all maps are called alike.
"""

import torch
from torch import Tensor


def identity(w_star: Tensor, _mu: float) -> Tensor:
    """F(w*) = w*. The very tensor it was given, not a copy; at infinity it is infinite, alone of all forward maps."""
    return w_star


def ones(w_star: Tensor, _mu: float) -> Tensor:
    """B(w*) = 1: the straight-through gradient of BinaryConnect (Courbariaux et al., 2015)."""
    return torch.ones_like(w_star)


def hard_sign(w_star: Tensor, _mu: float) -> Tensor:
    """F(w*) = +1 where w* >= 0, else -1 (so both zeros map to +1)."""
    return (w_star >= 0).to(w_star.dtype).mul_(2).sub_(1)


def clip(w_star: Tensor, _mu: float) -> Tensor:
    """H(w*) = min(max(w*, -1), 1), the hard tanh."""
    # Not clamp, whose autograd has slope 0 at +-1: there T' is to be 1, so that T' o P is BinaryNet's B.
    return torch.where(w_star.abs() > 1, hard_sign(w_star, _mu), w_star)


def clip_derivative(w_star: Tensor, _mu: float) -> Tensor:
    """H'(w*) = 1 where |w*| <= 1, else 0; at the kinks +-1 it is 1, as in BinaryNet (Courbariaux et al., 2016)."""
    return (w_star.abs() <= 1).to(w_star.dtype)


def outward(w_star: Tensor, _mu: float) -> Tensor:
    """P(w*) = sign(w*) max(1, |w*|): BinaryNet's proximal map, which moves (-1, 1) out to +-1 and leaves the rest."""
    return hard_sign(w_star, _mu) * w_star.abs().clamp(min=1)


def piecewise_linear(w_star: Tensor, mu: float) -> Tensor:
    """L(w*; rho, varrho) at rho = varrho = mu, mu clamped to [0, 1]: sign(w*) min(1, mu + |w*|).

    The general L is sign(w*) where |w*| >= 1 - rho and sign(w*) (varrho + |w*| (1 - varrho) / (1 - rho)) elsewhere
    (Dockhorn et al., 2021); equal parameters cancel its slope. mu = 0 is the hard tanh, mu = 1 is sign.
    """
    rho = min(max(mu, 0.0), 1.0)
    magnitude = _widened(w_star).abs().add(rho).clamp(max=1)
    return hard_sign(w_star, mu) * magnitude.to(w_star.dtype)


def sign_swish(w_star: Tensor, mu: float) -> Tensor:
    """SS(w*) = 2 s(x) (1 + x (1 - s(x))) - 1 with x = mu w* and s the logistic function (Darabi et al., 2018).

    Odd, steepest at 0, of modulus at most 1.19968 (at |x| = 2.39936); tends to sign(w*) as mu grows. SS(+-inf) = +-1 if
    mu > 0; mu = 0 gives 0. With a = |x| and e = exp(-a) it is sign(w*) ((1 - e) / (1 + e) + 2 a e / (1 + e)^2): one
    exponential of a negative number, which cannot overflow.
    """
    w = _widened(w_star)
    a = _modulus(w, mu)
    # expm1 and not exp: the difference 1 - e would lose every digit of a small weight.
    m = torch.expm1(-a / 2)
    # Half the exponent: the m + 1 below, short of digits, is squared before the large a multiplies it.
    e = (m + 1).square()
    value = -m * (m + 2) / (1 + e) + 2 * a * e / (1 + e).square()
    return torch.copysign(value, w).to(w_star.dtype)


def sign_swish_derivative(w_star: Tensor, mu: float) -> Tensor:
    """SS'(w*) = mu (2 - x tanh(x / 2)) / (1 + cosh(x)) with x = mu w* (Darabi et al., 2018).

    Even, mu at 0, negative beyond |x| = 2.39936, 0 at infinity and for mu = 0. With a = |x| and e = exp(-a) it is
    2 mu e (2 - a (1 - e) / (1 + e)) / (1 + e)^2, in which cosh, infinite past 89 in float32, does not appear.
    """
    w = _widened(w_star)
    a = _modulus(w, mu)
    e = torch.exp(-a)
    slope = 2 * e * (2 - a * (1 - e) / (1 + e)) / (1 + e).square()
    return _narrowed(slope * _representable(mu, w.dtype), w_star.dtype)


def sharp_clip(w_star: Tensor, mu: float) -> Tensor:
    """H(mu w*) = min(max(mu w*, -1), 1): the integral of the clipped identity's gradient at sharpness mu."""
    w = _widened(w_star)
    return clip(w.clamp(-torch.finfo(w.dtype).max, torch.finfo(w.dtype).max) * _representable(mu, w.dtype), mu).to(
        w_star.dtype
    )


def sharp_clip_derivative(w_star: Tensor, mu: float) -> Tensor:
    """B(w*) = mu where |mu w*| <= 1, else 0: at mu = 1 BinaryNet's B."""
    w = _widened(w_star)
    return _narrowed((_modulus(w, mu) <= 1).to(w.dtype) * _representable(mu, w.dtype), w_star.dtype)


def approx_sign(w_star: Tensor, mu: float) -> Tensor:
    """a(mu w*) with a(x) = x (2 - |x|) where |x| < 1, else sign(x): the integral of Bi-Real Net's polynomial."""
    w = _widened(w_star)
    x = _modulus(w, mu).clamp(max=1)
    return torch.copysign(x * (2 - x), w).to(w_star.dtype)


def approx_sign_derivative(w_star: Tensor, mu: float) -> Tensor:
    """B(w*) = mu a'(mu w*) with a'(x) = 2 - 2 |x| where |x| < 1, else 0; mu = 1 is Bi-Real Net's (Liu et al., 2018)."""
    w = _widened(w_star)
    x = _modulus(w, mu).clamp(max=1)
    return _narrowed((1 - x) * _representable(2 * mu, w.dtype), w_star.dtype)


def tanh(w_star: Tensor, mu: float) -> Tensor:
    """F(w*) = hyperbolic tangent of mu w*."""
    w = _widened(w_star)
    return torch.copysign(torch.tanh(_modulus(w, mu)), w).to(w_star.dtype)


def tanh_derivative(w_star: Tensor, mu: float) -> Tensor:
    """B(w*) = mu / cosh(mu w*)^2."""
    w = _widened(w_star)
    return _narrowed(_sech_squared(w, mu) * _representable(mu, w.dtype), w_star.dtype)


def decaying_tanh(w_star: Tensor, t: float) -> Tensor:
    """g(w*) = k tanh(t w*) with k = max(1 / t, 1): of slope 1 at 0 up to t = 1, tanh(t w*) from there; t = 0 gives w*.

    Its derivative is IR-Net's error decay estimator (Qin et al., CVPR 2020).
    """
    if t >= 1:
        return tanh(w_star, t)
    w = _widened(w_star)
    w = w.clamp(-torch.finfo(w.dtype).max, torch.finfo(w.dtype).max)
    x = w * t
    # w tanh(x) / x and not tanh(x) / t: t may be 0, and x too small to carry the digits of w.
    ratio = torch.where(x == 0, 1.0, torch.tanh(x) / torch.where(x == 0, 1.0, x))
    return _narrowed(w * ratio, w_star.dtype)


def decaying_tanh_derivative(w_star: Tensor, t: float) -> Tensor:
    """g'(w*) = k t / cosh(t w*)^2 = max(1, t) / cosh(t w*)^2."""
    w = _widened(w_star)
    return _narrowed(_sech_squared(w, t) * _representable(max(t, 1.0), w.dtype), w_star.dtype)


def bounded_tanh(w_star: Tensor, k: float) -> Tensor:
    """tanh(k w*) / tanh(k) where |w*| <= 1, else sign(w*): DSQ's curve for one bit on [-1, 1] (Gong et al., ICCV 2019).

    k = 0 is the hard tanh.
    """
    w = _widened(w_star)
    inside = decaying_tanh(w, k) / _tanh_at_one(w, k)
    return torch.where(w.abs() > 1, hard_sign(w, k), inside).to(w_star.dtype)


def bounded_tanh_derivative(w_star: Tensor, k: float) -> Tensor:
    """B(w*) = k / (tanh(k) cosh(k w*)^2) where |w*| <= 1, else 0; k = 0 gives BinaryNet's B."""
    w = _widened(w_star)
    slope = _sech_squared(w, k) * _representable(max(k, 1.0), w.dtype) / _tanh_at_one(w, k)
    return _narrowed(torch.where(w.abs() > 1, 0, slope), w_star.dtype)


POWER_LINEAR_BELOW = 0.1
POWER_FLAT_ABOVE = 1.5


def power(w_star: Tensor, mu: float) -> Tensor:
    """sign(w*) min(|w*|, 1.5)^(1/o) with o = max(mu, 1), and linear through 0 where |w*| <= 0.1.

    The integral of the gradient of ReSTE (Wu et al., ICCV 2023), which is cut off beyond 1.5 and replaced within 0.1,
    where the power's slope has no bound, by the slope from 0 to 0.1. o = 1 is w* up to 1.5.
    """
    w = _widened(w_star)
    p = 1 / max(mu, 1.0)
    a = w.abs()
    middle = (a > POWER_LINEAR_BELOW) & (a <= POWER_FLAT_ABOVE)
    # The inner where keeps autograd from the power's infinite slope at 0, which 0 times would be NaN.
    curve = torch.where(middle, a, POWER_FLAT_ABOVE).pow(p)
    line = a * POWER_LINEAR_BELOW ** (p - 1)
    return torch.copysign(torch.where(a > POWER_LINEAR_BELOW, curve, line), w).to(w_star.dtype)


def power_derivative(w_star: Tensor, mu: float) -> Tensor:
    """B(w*) = |w*|^(1/o - 1) / o where 0.1 < |w*| <= 1.5, 0.1^(1/o - 1) within, 0 beyond; o = max(mu, 1) (ReSTE)."""
    w = _widened(w_star)
    p = 1 / max(mu, 1.0)
    a = w.abs()
    slope = p * a.clamp(min=POWER_LINEAR_BELOW, max=POWER_FLAT_ABOVE).pow(p - 1)
    slope = torch.where(a > POWER_LINEAR_BELOW, slope, POWER_LINEAR_BELOW ** (p - 1))
    return torch.where(a > POWER_FLAT_ABOVE, 0, slope).to(w_star.dtype)


def _modulus(w: Tensor, mu: float) -> Tensor:
    """|mu w|, cut at 1000, where exp(-|mu w|) has long been 0 in every dtype: neither 0 inf nor inf 0 ever arises."""
    largest = torch.finfo(w.dtype).max
    return w.abs().clamp(max=largest).mul(_representable(mu, w.dtype)).clamp(max=1000)


def _sech_squared(w: Tensor, mu: float) -> Tensor:
    """1 / cosh(mu w)^2, by an exponential that cannot overflow."""
    e = torch.exp(-2 * _modulus(w, mu))
    return 4 * e / (1 + e).square()


def _tanh_at_one(w: Tensor, t: float) -> Tensor:
    """`decaying_tanh` of 1, in the dtype and on the device of w. Shape ()."""
    return decaying_tanh(w.new_ones(()), t)


def _representable(mu: float, dtype: torch.dtype) -> float:
    return min(mu, torch.finfo(dtype).max)


def _widened(w: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 if they are float64."""
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Value in dtype, at most its largest number in modulus."""
    if value.dtype == dtype:
        return value
    largest = torch.finfo(dtype).max
    return value.clamp(-largest, largest).to(dtype)
