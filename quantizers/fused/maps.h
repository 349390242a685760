// The maps of maps.py under the same names: structs whose constructor takes mu, called with one w*.
//
// Operations round in the same order as torch's, including fused multiply-adds, so rows without a transcendental
// function give the same bits as torch's vectorised kernels. NaN stays NaN, except in ones. All loops vectorise: there
// are no branches, and no calls into libm except fmaf on processors without that instruction.

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// NaN stays NaN, as in torch's clamp.
template <class Number>
inline Number at_most(Number x, Number most) {
  return x > most ? most : x;
}
template <class Number>
inline Number at_least(Number x, Number least) {
  return x < least ? least : x;
}

constexpr float LARGEST = 3.40282347e+38f;

// mu, a float64, rounded to the float32 factor.
inline float representable(double mu) { return static_cast<float>(at_most(mu, static_cast<double>(LARGEST))); }

struct Exponential {
  float value, minus_one;
};

// exp(x) and exp(x) - 1 for x <= 88, each accurate to a few units in the last place; 0 and -1 below -87.
inline Exponential exponential(float x) {
  const float cut = at_least(x, -87.0f);
  // Adding 1.5 * 2^23 rounds x / ln 2 to a whole number n, which is then in the lowest bits.
  const float shifted = fmaf(cut, 1.44269504f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  // exp(x) = 2^n exp(r) with |r| <= ln(2) / 2; ln 2 is subtracted in two parts, the first exactly.
  const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, cut));
  float series = 1.0f / 5040;
  series = fmaf(series, r, 1.0f / 720);
  series = fmaf(series, r, 1.0f / 120);
  series = fmaf(series, r, 1.0f / 24);
  series = fmaf(series, r, 1.0f / 6);
  series = fmaf(series, r, 0.5f);
  series = fmaf(series * r, r, r);  // exp(r) - 1
  const float scale = bits<float>((bits<uint32_t>(shifted) << 23) + bits<uint32_t>(1.0f));
  const float value = fmaf(scale, series, scale);
  const float minus_one = fmaf(scale, series, scale - 1.0f);
  return {x < -87.0f ? 0.0f : value, x < -87.0f ? -1.0f : minus_one};
}

// ln(x) for normal x > 0: ln(m) + k ln 2 with m in [sqrt(1/2), sqrt(2)), by the series of artanh.
inline float logarithm(float x) {
  const uint32_t from_root = bits<uint32_t>(x) - bits<uint32_t>(0.70710678f);
  const float k = static_cast<float>(static_cast<int32_t>(from_root) >> 23);
  const float m = bits<float>((from_root & 0x007fffffu) + bits<uint32_t>(0.70710678f));
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  float series = 1.0f / 9;
  series = fmaf(series, z, 1.0f / 7);
  series = fmaf(series, z, 1.0f / 5);
  series = fmaf(series, z, 1.0f / 3);
  return fmaf(k, 0.69314718f, 2.0f * fmaf(series * z, s, s));
}

inline float hyperbolic_tangent(float a) {  // a >= 0
  const float m = exponential(-2.0f * a).minus_one;
  return -m / (m + 2.0f);
}

// |mu w|, clamped to 1000, far beyond where exp(-|mu w|) is 0, so that no product of 0 and infinity arises.
inline float modulus(float w, float mu) { return at_most(at_most(fabsf(w), LARGEST) * mu, 1000.0f); }

inline float sech_squared(float w, float mu) {
  const float e = exponential(-2.0f * modulus(w, mu)).value;
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}

// 1 where a <= 1, else 0; NaN stays NaN.
inline float at_most_one(float a) { return a <= 1.0f ? 1.0f : a > 1.0f ? 0.0f : a; }

// Maps

struct identity {
  explicit identity(double) {}
  float operator()(float w) const { return w; }
};

struct ones {
  explicit ones(double) {}
  float operator()(float) const { return 1.0f; }
};

struct hard_sign {
  explicit hard_sign(double) {}
  float operator()(float w) const { return w >= 0.0f ? 1.0f : w < 0.0f ? -1.0f : w; }
};

struct clip {
  explicit clip(double) {}
  float operator()(float w) const { return at_least(at_most(w, 1.0f), -1.0f); }
};

struct clip_derivative {
  explicit clip_derivative(double) {}
  float operator()(float w) const { return at_most_one(fabsf(w)); }
};

struct piecewise_linear {
  float rho;
  explicit piecewise_linear(double mu) : rho(static_cast<float>(at_most(at_least(mu, 0.0), 1.0))) {}
  float operator()(float w) const { return hard_sign(0)(w) * at_most(fabsf(w) + rho, 1.0f); }
};

struct sign_swish {
  float mu;
  explicit sign_swish(double mu) : mu(representable(mu)) {}
  float operator()(float w) const {
    const float a = modulus(w, mu);
    const Exponential e = exponential(-a);
    const float d = 1.0f / (1.0f + e.value);
    return copysignf((2.0f * a * e.value * d - e.minus_one) * d, w);
  }
};

struct sign_swish_derivative {
  float mu;
  explicit sign_swish_derivative(double mu) : mu(representable(mu)) {}
  float operator()(float w) const {
    const float a = modulus(w, mu);
    const Exponential e = exponential(-a);
    const float d = 1.0f / (1.0f + e.value);
    return 2.0f * e.value * (2.0f + a * e.minus_one * d) * (d * d) * mu;
  }
};

struct sharp_clip {
  float mu;
  explicit sharp_clip(double mu) : mu(representable(mu)) {}
  float operator()(float w) const { return clip(0)(at_least(at_most(w, LARGEST), -LARGEST) * mu); }
};

struct sharp_clip_derivative {
  float mu;
  explicit sharp_clip_derivative(double mu) : mu(representable(mu)) {}
  float operator()(float w) const { return at_most_one(modulus(w, mu)) * mu; }
};

struct approx_sign {
  float mu;
  explicit approx_sign(double mu) : mu(representable(mu)) {}
  float operator()(float w) const {
    const float x = at_most(modulus(w, mu), 1.0f);
    return copysignf(x * (2.0f - x), w);
  }
};

struct approx_sign_derivative {
  float mu, twice_mu;
  explicit approx_sign_derivative(double mu) : mu(representable(mu)), twice_mu(representable(2 * mu)) {}
  float operator()(float w) const { return (1.0f - at_most(modulus(w, mu), 1.0f)) * twice_mu; }
};

struct tanh {
  float mu;
  explicit tanh(double mu) : mu(representable(mu)) {}
  float operator()(float w) const { return copysignf(hyperbolic_tangent(modulus(w, mu)), w); }
};

struct tanh_derivative {
  float mu;
  explicit tanh_derivative(double mu) : mu(representable(mu)) {}
  float operator()(float w) const { return sech_squared(w, mu) * mu; }
};

struct decaying_tanh {
  float t;
  bool steep;
  explicit decaying_tanh(double t) : t(representable(t)), steep(t >= 1) {}
  float operator()(float w) const {
    const float a = at_most(fabsf(w), LARGEST), x = a * t;
    const float curve = hyperbolic_tangent(x);
    // a tanh(x) / x rather than tanh(x) / t: t may be 0, and x too small to keep the digits of a.
    const float line = a * (x == 0.0f ? 1.0f : curve / x);
    return copysignf(steep ? curve : line, w);
  }
};

struct decaying_tanh_derivative {
  float t, largest;
  explicit decaying_tanh_derivative(double t) : t(representable(t)), largest(representable(at_least(t, 1.0))) {}
  float operator()(float w) const { return sech_squared(w, t) * largest; }
};

struct bounded_tanh {
  decaying_tanh curve;
  float at_one;
  explicit bounded_tanh(double k) : curve(k), at_one(curve(1.0f)) {}
  float operator()(float w) const { return fabsf(w) > 1.0f ? hard_sign(0)(w) : curve(w) / at_one; }
};

struct bounded_tanh_derivative {
  decaying_tanh_derivative slope;
  float at_one;
  explicit bounded_tanh_derivative(double k) : slope(k), at_one(decaying_tanh(k)(1.0f)) {}
  float operator()(float w) const { return fabsf(w) > 1.0f ? 0.0f : slope(w) / at_one; }
};

constexpr float POWER_LINEAR_BELOW = 0.1f, POWER_FLAT_ABOVE = 1.5f;

struct power_derivative {
  float p, less_one, slope;
  explicit power_derivative(double mu)
      : p(static_cast<float>(1 / at_least(mu, 1.0))),
        less_one(static_cast<float>(1 / at_least(mu, 1.0) - 1)),
        slope(static_cast<float>(pow(0.1, 1 / at_least(mu, 1.0) - 1))) {}
  float operator()(float w) const {
    const float a = fabsf(w);
    const float within = at_least(at_most(a, POWER_FLAT_ABOVE), POWER_LINEAR_BELOW);
    const float curve = p * exponential(less_one * logarithm(within)).value;
    // ln above returns some number for NaN.
    return a <= POWER_LINEAR_BELOW ? slope : a <= POWER_FLAT_ABOVE ? curve : a > POWER_FLAT_ABOVE ? 0.0f : a;
  }
};

}  // namespace
