// One pass of PC++ over each tensor: w*, and the state of its base optimizer, move along B(w*; written mu) . grad, and
// w = F(w*; mu) is written. Compiled by native.py for one pair: FORWARD and BACKWARD name two of the maps below.
//
// The maps are those of maps.py under the same names, each a struct whose constructor takes mu and which is called with
// one w*. What rounds does so in the order of torch's own operations, fused multiply-adds included, so that rows without
// a transcendental function step to the bits of the eager path. All loops vectorise: no branches, no calls into libm.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// NaN stays NaN, as in torch's clamp.
inline float at_most(float x, float most) { return x > most ? most : x; }
inline float at_least(float x, float least) { return x < least ? least : x; }

constexpr float LARGEST = std::numeric_limits<float>::max();

// A mu of float64 as the float32 that multiplies.
inline float representable(double mu) { return static_cast<float>(std::min(mu, static_cast<double>(LARGEST))); }

struct Exponential {
  float value, minus_one;
};

// exp(x) and exp(x) - 1 for x <= 88, each to a few units of its own last place; 0 and -1 below -87.
inline Exponential exponential(float x) {
  const float cut = at_least(x, -87.0f);
  // Adding 1.5 * 2^23 rounds x / ln 2 to a whole number n, which is then in the lowest bits.
  const float shifted = __builtin_fmaf(cut, 1.44269504f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  // exp(x) = 2^n exp(r) with |r| <= ln(2) / 2; ln 2 is taken away in two parts, the first of them exactly.
  const float r = __builtin_fmaf(n, 2.12194440e-4f, __builtin_fmaf(n, -0.693359375f, cut));
  float series = 1.0f / 5040;
  series = __builtin_fmaf(series, r, 1.0f / 720);
  series = __builtin_fmaf(series, r, 1.0f / 120);
  series = __builtin_fmaf(series, r, 1.0f / 24);
  series = __builtin_fmaf(series, r, 1.0f / 6);
  series = __builtin_fmaf(series, r, 0.5f);
  series = __builtin_fmaf(series * r, r, r);  // exp(r) - 1
  const float scale = bits<float>((bits<uint32_t>(shifted) << 23) + bits<uint32_t>(1.0f));
  const float value = __builtin_fmaf(scale, series, scale);
  const float minus_one = __builtin_fmaf(scale, series, scale - 1.0f);
  return {x < -87.0f ? 0.0f : value, x < -87.0f ? -1.0f : minus_one};
}

// ln(x) for normal x > 0: ln(m) + k ln 2 with m in [sqrt(1/2), sqrt(2)), by the series of the area tangent.
inline float logarithm(float x) {
  const uint32_t from_root = bits<uint32_t>(x) - bits<uint32_t>(0.70710678f);
  const float k = static_cast<float>(static_cast<int32_t>(from_root) >> 23);
  const float m = bits<float>((from_root & 0x007fffffu) + bits<uint32_t>(0.70710678f));
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  float series = 1.0f / 9;
  series = __builtin_fmaf(series, z, 1.0f / 7);
  series = __builtin_fmaf(series, z, 1.0f / 5);
  series = __builtin_fmaf(series, z, 1.0f / 3);
  return __builtin_fmaf(k, 0.69314718f, 2.0f * __builtin_fmaf(series * z, s, s));
}

inline float hyperbolic_tangent(float a) {  // a >= 0
  const float m = exponential(-2.0f * a).minus_one;
  return -m / (m + 2.0f);
}

// |mu w|, cut at 1000, where exp(-|mu w|) has long been 0: neither 0 inf nor inf 0 ever arises.
inline float modulus(float w, float mu) { return at_most(at_most(std::fabs(w), LARGEST) * mu, 1000.0f); }

inline float sech_squared(float w, float mu) {
  const float e = exponential(-2.0f * modulus(w, mu)).value;
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}

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
  float operator()(float w) const { return w >= 0.0f ? 1.0f : -1.0f; }
};

struct clip {
  explicit clip(double) {}
  float operator()(float w) const { return at_least(at_most(w, 1.0f), -1.0f); }
};

struct clip_derivative {
  explicit clip_derivative(double) {}
  float operator()(float w) const { return std::fabs(w) <= 1.0f ? 1.0f : 0.0f; }
};

struct piecewise_linear {
  float rho;
  explicit piecewise_linear(double mu) : rho(static_cast<float>(std::min(std::max(mu, 0.0), 1.0))) {}
  float operator()(float w) const { return hard_sign(0)(w) * at_most(std::fabs(w) + rho, 1.0f); }
};

struct sign_swish {
  float mu;
  explicit sign_swish(double mu) : mu(representable(mu)) {}
  float operator()(float w) const {
    const float a = modulus(w, mu);
    const Exponential e = exponential(-a);
    const float d = 1.0f / (1.0f + e.value);
    return std::copysign((2.0f * a * e.value * d - e.minus_one) * d, w);
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
  float operator()(float w) const { return modulus(w, mu) <= 1.0f ? mu : 0.0f; }
};

struct approx_sign {
  float mu;
  explicit approx_sign(double mu) : mu(representable(mu)) {}
  float operator()(float w) const {
    const float x = at_most(modulus(w, mu), 1.0f);
    return std::copysign(x * (2.0f - x), w);
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
  float operator()(float w) const { return std::copysign(hyperbolic_tangent(modulus(w, mu)), w); }
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
    const float a = at_most(std::fabs(w), LARGEST), x = a * t;
    const float curve = hyperbolic_tangent(x);
    // a tanh(x) / x and not tanh(x) / t: t may be 0, and x too small to carry the digits of a.
    const float line = a * (x == 0.0f ? 1.0f : curve / x);
    return std::copysign(steep ? curve : line, w);
  }
};

struct decaying_tanh_derivative {
  float t, largest;
  explicit decaying_tanh_derivative(double t) : t(representable(t)), largest(representable(std::max(t, 1.0))) {}
  float operator()(float w) const { return sech_squared(w, t) * largest; }
};

struct bounded_tanh {
  decaying_tanh curve;
  float at_one;
  explicit bounded_tanh(double k) : curve(k), at_one(curve(1.0f)) {}
  float operator()(float w) const { return std::fabs(w) > 1.0f ? hard_sign(0)(w) : curve(w) / at_one; }
};

struct bounded_tanh_derivative {
  decaying_tanh_derivative slope;
  float at_one;
  explicit bounded_tanh_derivative(double k) : slope(k), at_one(decaying_tanh(k)(1.0f)) {}
  float operator()(float w) const { return std::fabs(w) > 1.0f ? 0.0f : slope(w) / at_one; }
};

constexpr float POWER_LINEAR_BELOW = 0.1f, POWER_FLAT_ABOVE = 1.5f;

struct power {
  float p, slope;
  explicit power(double mu)
      : p(static_cast<float>(1 / std::max(mu, 1.0))),
        slope(static_cast<float>(std::pow(0.1, 1 / std::max(mu, 1.0) - 1))) {}
  float operator()(float w) const {
    const float a = std::fabs(w);
    const float within = at_least(at_most(a, POWER_FLAT_ABOVE), POWER_LINEAR_BELOW);
    const float curve = exponential(p * logarithm(within)).value;
    return std::copysign(a > POWER_LINEAR_BELOW ? curve : a * slope, w);
  }
};

struct power_derivative {
  float p, less_one, slope;
  explicit power_derivative(double mu)
      : p(static_cast<float>(1 / std::max(mu, 1.0))),
        less_one(static_cast<float>(1 / std::max(mu, 1.0) - 1)),
        slope(static_cast<float>(std::pow(0.1, 1 / std::max(mu, 1.0) - 1))) {}
  float operator()(float w) const {
    const float a = std::fabs(w);
    const float within = at_least(at_most(a, POWER_FLAT_ABOVE), POWER_LINEAR_BELOW);
    const float curve = p * exponential(less_one * logarithm(within)).value;
    return a > POWER_FLAT_ABOVE ? 0.0f : a > POWER_LINEAR_BELOW ? curve : slope;
  }
};

// The precisions of w and its gradient; w* and the base's state are float32.

struct bfloat16 {
  uint16_t upper;
};

inline float widened(float x) { return x; }
inline float widened(bfloat16 x) { return bits<float>(static_cast<uint32_t>(x.upper) << 16); }

inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, bfloat16& to) {  // to nearest, ties to even; NaN, which rounding might make infinite, apart
  const uint32_t all = bits<uint32_t>(x);
  const uint32_t rounded = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;
  to.upper = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// The pass. `move(t, i, v, g)` is the base optimizer: where element i of tensor t, at v, goes along g.

struct Tensors {
  int64_t num;
  const int64_t* sizes;
  float* const* w_star;
  const void* const* gradients;
  void* const* weights;
  const double* written_mus;
  double mu;
  int64_t clip_latents;
};

template <class Weight, class Move>
void pass(const Tensors& all, const Move& move) {
  const float bound = all.clip_latents ? 1.0f : std::numeric_limits<float>::infinity();
#pragma omp parallel
  for (int64_t t = 0; t < all.num; ++t) {
    const FORWARD forward(all.mu);
    const BACKWARD backward(all.written_mus[t]);
    const auto moved = move(t);
    float* const w_star = all.w_star[t];
    const Weight* const gradient = static_cast<const Weight*>(all.gradients[t]);
    Weight* const weight = static_cast<Weight*>(all.weights[t]);
    const int64_t size = all.sizes[t];
#pragma omp for simd nowait schedule(static)
    for (int64_t i = 0; i < size; ++i) {
      const float v = moved(i, w_star[i], backward(w_star[i]) * widened(gradient[i]));
      w_star[i] = at_least(at_most(v, bound), -bound);
      narrow(forward(w_star[i]), weight[i]);
    }
  }
}

struct Sgd {
  float* const* buffers;  // null: no momentum
  double lr, momentum, weight_decay;
  int64_t nesterov;
};

template <class Weight, bool NESTEROV>
void sgd_with_momentum(const Tensors& all, const Sgd& options) {
  const float minus_lr = static_cast<float>(-options.lr), decay = static_cast<float>(options.weight_decay);
  const float momentum = static_cast<float>(options.momentum);
  pass<Weight>(all, [=](int64_t t) {
    float* const buffer = options.buffers[t];
    return [=](int64_t i, float v, float g) {
      g = __builtin_fmaf(v, decay, g);
      const float b = buffer[i] * momentum + g;
      buffer[i] = b;
      return __builtin_fmaf(NESTEROV ? __builtin_fmaf(b, momentum, g) : b, minus_lr, v);
    };
  });
}

template <class Weight>
void sgd(const Tensors& all, const Sgd& options) {
  if (options.buffers != nullptr)
    return options.nesterov ? sgd_with_momentum<Weight, true>(all, options)
                            : sgd_with_momentum<Weight, false>(all, options);
  const float minus_lr = static_cast<float>(-options.lr), decay = static_cast<float>(options.weight_decay);
  pass<Weight>(all, [=](int64_t) {
    return [=](int64_t, float v, float g) { return __builtin_fmaf(__builtin_fmaf(v, decay, g), minus_lr, v); };
  });
}

struct AdamW {
  float* const* means;
  float* const* squares;
  const double* step_sizes;        // lr / (1 - beta1^step), of each tensor
  const double* root_corrections;  // sqrt(1 - beta2^step)
  double lr, beta1, beta2, eps, weight_decay;
};

template <class Weight>
void adamw(const Tensors& all, const AdamW& options) {
  const float kept = static_cast<float>(1 - options.lr * options.weight_decay);
  const float towards = static_cast<float>(1 - options.beta1), beta2 = static_cast<float>(options.beta2);
  const float share = static_cast<float>(1 - options.beta2), eps = static_cast<float>(options.eps);
  pass<Weight>(all, [=](int64_t t) {
    float* const mean = options.means[t];
    float* const square = options.squares[t];
    const float minus_step = static_cast<float>(-options.step_sizes[t]);
    const float correction = static_cast<float>(options.root_corrections[t]);
    return [=](int64_t i, float v, float g) {
      const float m = __builtin_fmaf(towards, g - mean[i], mean[i]);
      const float u = __builtin_fmaf(share * g, g, square[i] * beta2);
      mean[i] = m;
      square[i] = u;
      return v * kept + minus_step * m / (std::sqrt(u) / correction + eps);
    };
  });
}

template <class Weight>
void write(const Tensors& all) {
#pragma omp parallel
  for (int64_t t = 0; t < all.num; ++t) {
    const FORWARD forward(all.mu);
    const float* const w_star = all.w_star[t];
    Weight* const weight = static_cast<Weight*>(all.weights[t]);
    const int64_t size = all.sizes[t];
#pragma omp for simd nowait schedule(static)
    for (int64_t i = 0; i < size; ++i) narrow(forward(w_star[i]), weight[i]);
  }
}

}  // namespace

extern "C" {
void write_float32(const Tensors* all) { write<float>(*all); }
void write_bfloat16(const Tensors* all) { write<bfloat16>(*all); }
void sgd_float32(const Tensors* all, const Sgd* options) { sgd<float>(*all, *options); }
void sgd_bfloat16(const Tensors* all, const Sgd* options) { sgd<bfloat16>(*all, *options); }
void adamw_float32(const Tensors* all, const AdamW* options) { adamw<float>(*all, *options); }
void adamw_bfloat16(const Tensors* all, const AdamW* options) { adamw<bfloat16>(*all, *options); }
}
