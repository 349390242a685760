// One pass of PC++ over a tensor: w*, and the state of its base optimizer, move along B(w*; written mu) . grad, and
// w = F(w*; mu) is written. This is one element of it; fused.cpp runs over all of them on a CPU, fused.cu on a GPU. Both
// are compiled for one pair: FORWARD and BACKWARD name two of the maps of maps.h.

#include "maps.h"

// A GPU is to ask for all that an element needs before it waits for any of it; NVRTC would read x where it is used.
#ifdef __CUDACC_RTC__
#define READ_NOW(x) asm volatile("" : "+f"(x))
#else
#define READ_NOW(x)
#endif

namespace {

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

// What Python hands over: a Group, and behind it in memory its Rows. passes.py packs both in this order.

struct Row {  // a tensor
  int64_t chunks_before, size;
  float* w_star;
  const void* gradient;
  void* weight;
  float* first;   // SGD's buffer of momentum; AdamW's means
  float* second;  // AdamW's squares
  double written_mu;
  double step_size;        // AdamW's lr / (1 - beta1^step)
  double root_correction;  // AdamW's sqrt(1 - beta2^step)
};

struct Group {
  int64_t num, clip_latents;
  double mu, lr, momentum, weight_decay, beta1, beta2, eps;
};

inline const Row* rows(const Group& group) { return reinterpret_cast<const Row*>(&group + 1); }

// The base optimizers: what they keep of element i, and where it goes from v along g.

struct Sgd {
  float minus_lr, decay;
  Sgd(const Group& group, const Row&)
      : minus_lr(static_cast<float>(-group.lr)), decay(static_cast<float>(group.weight_decay)) {}
  struct Kept {};
  Kept read(int64_t) const { return {}; }
  float operator()(int64_t, Kept, float v, float g) const { return fmaf(fmaf(v, decay, g), minus_lr, v); }
};

template <bool NESTEROV>
struct Momentum {
  float minus_lr, decay, momentum;
  float* buffer;
  Momentum(const Group& group, const Row& row)
      : minus_lr(static_cast<float>(-group.lr)),
        decay(static_cast<float>(group.weight_decay)),
        momentum(static_cast<float>(group.momentum)),
        buffer(row.first) {}
  float read(int64_t i) const {
    float kept = buffer[i];
    READ_NOW(kept);
    return kept;
  }
  float operator()(int64_t i, float kept, float v, float g) const {
    g = fmaf(v, decay, g);
    const float b = kept * momentum + g;
    buffer[i] = b;
    return fmaf(NESTEROV ? fmaf(b, momentum, g) : b, minus_lr, v);
  }
};

struct AdamW {
  float left, towards, beta2, share, eps, minus_step, correction;
  float *mean, *square;
  AdamW(const Group& group, const Row& row)
      : left(static_cast<float>(1 - group.lr * group.weight_decay)),
        towards(static_cast<float>(1 - group.beta1)),
        beta2(static_cast<float>(group.beta2)),
        share(static_cast<float>(1 - group.beta2)),
        eps(static_cast<float>(group.eps)),
        minus_step(static_cast<float>(-row.step_size)),
        correction(static_cast<float>(row.root_correction)),
        mean(row.first),
        square(row.second) {}
  struct Kept {
    float mean, square;
  };
  Kept read(int64_t i) const {
    Kept kept = {mean[i], square[i]};
    READ_NOW(kept.mean);
    READ_NOW(kept.square);
    return kept;
  }
  float operator()(int64_t i, Kept kept, float v, float g) const {
    const float m = fmaf(towards, g - kept.mean, kept.mean);
    const float u = fmaf(share * g, g, kept.square * beta2);
    mean[i] = m;
    square[i] = u;
    return v * left + minus_step * m / (sqrtf(u) / correction + eps);
  }
};

// The passes: what is done to element i.

template <class Weight>
struct Write {
  FORWARD forward;
  const float* w_star;
  Weight* weight;
  Write(const Group& group, const Row& row)
      : forward(group.mu), w_star(row.w_star), weight(static_cast<Weight*>(row.weight)) {}
  void operator()(int64_t i) const { narrow(forward(w_star[i]), weight[i]); }
};

template <class Weight, class Base>
struct Step {
  FORWARD forward;
  BACKWARD backward;
  Base base;
  float bound;
  float* w_star;
  const Weight* gradient;
  Weight* weight;
  Step(const Group& group, const Row& row)
      : forward(group.mu),
        backward(row.written_mu),
        base(group, row),
        bound(group.clip_latents ? 1.0f : bits<float>(0x7f800000u)),  // or infinity
        w_star(row.w_star),
        gradient(static_cast<const Weight*>(row.gradient)),
        weight(static_cast<Weight*>(row.weight)) {}
  void operator()(int64_t i) const {
    const float before = w_star[i];
    float g = widened(gradient[i]);
    READ_NOW(g);
    const auto kept = base.read(i);
    const float v = base(i, kept, before, backward(before) * g);
    const float after = at_least(at_most(v, bound), -bound);
    w_star[i] = after;
    narrow(forward(after), weight[i]);
  }
};

}  // namespace

// Each pass and the name by which Python asks for it, to be listed once more by who defines EXPORT(name, pass).
#define EXPORT_ALL                                           \
  EXPORT(write_float32, Write<float>)                        \
  EXPORT(write_bfloat16, Write<bfloat16>)                    \
  EXPORT(sgd_float32, Step<float, Sgd>)                      \
  EXPORT(sgd_bfloat16, Step<bfloat16, Sgd>)                  \
  EXPORT(momentum_float32, Step<float, Momentum<false>>)     \
  EXPORT(momentum_bfloat16, Step<bfloat16, Momentum<false>>) \
  EXPORT(nesterov_float32, Step<float, Momentum<true>>)      \
  EXPORT(nesterov_bfloat16, Step<bfloat16, Momentum<true>>)  \
  EXPORT(adamw_float32, Step<float, AdamW>)                  \
  EXPORT(adamw_bfloat16, Step<bfloat16, AdamW>)
