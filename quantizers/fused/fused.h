// One pass of PC++ over a tensor: the base optimizer updates w* and its own state with B(w*; written mu) * grad, then
// w = F(w*; mu) is written. This file does the work for one element; fused.cpp loops over all elements. Both are
// compiled once per (F, B): FORWARD and BACKWARD name two of the maps in maps.h.

#include "maps.h"

namespace {

// The precisions of w and its gradient; w* and the base's state are float32.

struct bfloat16 {
  uint16_t upper;
};

inline float widened(float x) { return x; }
inline float widened(bfloat16 x) { return bits<float>(static_cast<uint32_t>(x.upper) << 16); }

inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, bfloat16& to) {  // to nearest, ties to even; rounding could make NaN infinite
  const uint32_t all = bits<uint32_t>(x);
  const uint32_t rounded = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;
  to.upper = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// The argument from Python: a Group, followed in memory by its Rows. passes.py packs both in this order.

struct Row {  // one tensor
  int64_t size;
  float* w_star;
  const void* gradient;
  float* product;  // B(w*) * grad
  void* weight;
  float* first;   // SGD's momentum buffer; AdamW's first moment
  float* second;  // AdamW's second moment
  double written_mu;
  double step_size;        // AdamW's lr / (1 - beta1^step)
  double root_correction;  // AdamW's sqrt(1 - beta2^step)
};

struct Group {
  int64_t num, clip_latents;
  double mu, scale, lr, momentum, weight_decay, beta1, beta2, eps;
};

inline const Row* rows(const Group& group) { return reinterpret_cast<const Row*>(&group + 1); }

// The base optimizers: the state of element i, and its new value from v and the gradient g.

// g + decay v. Without decay it is g, even where v is infinite, as in torch.
inline float decayed(float v, float decay, float g) { return decay == 0.0f ? g : fmaf(v, decay, g); }

struct Sgd {
  float minus_lr, decay;
  Sgd(const Group& group, const Row&)
      : minus_lr(static_cast<float>(-group.lr)), decay(static_cast<float>(group.weight_decay)) {}
  struct Kept {};
  Kept read(int64_t) const { return {}; }
  float operator()(int64_t, Kept, float v, float g) const { return fmaf(decayed(v, decay, g), minus_lr, v); }
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
    return buffer[i];
  }
  float operator()(int64_t i, float kept, float v, float g) const {
    g = decayed(v, decay, g);
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
    return {mean[i], square[i]};
  }
  float operator()(int64_t i, Kept kept, float v, float g) const {
    const float m = fmaf(towards, g - kept.mean, kept.mean);
    const float u = fmaf(share * g, g, kept.square * beta2);
    mean[i] = m;
    square[i] = u;
    return v * left + minus_step * m / (sqrtf(u) / correction + eps);
  }
};

// The passes: each one's work on element i.

template <class Weight>
struct Write {
  FORWARD forward;
  const float* w_star;
  Weight* weight;
  Write(const Group& group, const Row& row)
      : forward(group.mu), w_star(row.w_star), weight(static_cast<Weight*>(row.weight)) {}
  void operator()(int64_t i) const { narrow(forward(w_star[i]), weight[i]); }
};

template <class Weight>
struct Product {
  BACKWARD backward;
  const float* w_star;
  const Weight* gradient;
  float* product;
  Product(const Group&, const Row& row)
      : backward(row.written_mu),
        w_star(row.w_star),
        gradient(static_cast<const Weight*>(row.gradient)),
        product(row.product) {}
  void operator()(int64_t i) const { product[i] = backward(w_star[i]) * widened(gradient[i]); }
};

// The direction of a step: B(w*) * grad, or a product computed earlier, times a scale.

template <class Weight>
struct FromGradients {
  BACKWARD backward;
  const Weight* gradient;
  FromGradients(const Group&, const Row& row)
      : backward(row.written_mu), gradient(static_cast<const Weight*>(row.gradient)) {}
  float operator()(int64_t i, float w_star) const { return backward(w_star) * widened(gradient[i]); }
};

struct FromProducts {
  float scale;
  const float* product;
  FromProducts(const Group& group, const Row& row) : scale(static_cast<float>(group.scale)), product(row.product) {}
  float operator()(int64_t i, float) const { return scale * product[i]; }
};

template <class Weight, class Base, class Direction = FromGradients<Weight>>
struct Step {
  FORWARD forward;
  Direction direction;
  Base base;
  float bound;
  float* w_star;
  Weight* weight;
  Step(const Group& group, const Row& row)
      : forward(group.mu),
        direction(group, row),
        base(group, row),
        bound(group.clip_latents ? 1.0f : bits<float>(0x7f800000u)),  // or infinity
        w_star(row.w_star),
        weight(static_cast<Weight*>(row.weight)) {}
  void operator()(int64_t i) const {
    const float before = w_star[i];
    const float v = base(i, base.read(i), before, direction(i, before));
    const float after = at_least(at_most(v, bound), -bound);
    w_star[i] = after;
    narrow(forward(after), weight[i]);
  }
};

}  // namespace

// Define EXPORT(name, pass), then expand EXPORT_ALL: it lists each pass with the name that passes.py looks up.
#define EXPORT_STEPS(NAME, ...)                                                     \
  EXPORT(NAME##_float32, Step<float, __VA_ARGS__>)                                  \
  EXPORT(NAME##_bfloat16, Step<bfloat16, __VA_ARGS__>)                              \
  EXPORT(NAME##_float32_along_products, Step<float, __VA_ARGS__, FromProducts>)     \
  EXPORT(NAME##_bfloat16_along_products, Step<bfloat16, __VA_ARGS__, FromProducts>)
#define EXPORT_ALL                             \
  EXPORT(write_float32, Write<float>)          \
  EXPORT(write_bfloat16, Write<bfloat16>)      \
  EXPORT(product_float32, Product<float>)      \
  EXPORT(product_bfloat16, Product<bfloat16>)  \
  EXPORT_STEPS(sgd, Sgd)                       \
  EXPORT_STEPS(momentum, Momentum<false>)      \
  EXPORT_STEPS(nesterov, Momentum<true>)       \
  EXPORT_STEPS(adamw, AdamW)
