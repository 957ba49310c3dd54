// The algorithm, once, for any vector type V; avx2.cpp and avx512.cpp bring the instructions.
//
// V has: `reg`, `width` lanes; load(float*), load(const void*, index, Dtype), store, set1, add,
// sub, mul, fma; butterfly<h>(reg) for h < width; int_max_abs; round_codes.
#pragma once
#include <cmath>
#include <cstring>

#include "core/token_scale.h"
#include "transform_quantize/op.h"

namespace saltire::transform_quantize {
namespace {

template <typename V>
struct Vectorised {
  using reg = typename V::reg;
  static constexpr int64_t W = V::width;

  // The stages inside one register: h = 1, 2, ... W/2.
  template <int h = 1>
  static inline reg inner_stages(reg v) {
    if constexpr (h < W) {
      return inner_stages<2 * h>(V::template butterfly<h>(v));
    } else {
      return v;
    }
  }

  static inline void pair(reg& a, reg& b) {
    const reg sum = V::add(a, b);
    b = V::sub(a, b);
    a = sum;
  }

  // Stages h and 2h together, so that each value is loaded and stored once for two stages.
  static inline void two_stages(float* block, int64_t B, int64_t h) {
    for (int64_t i = 0; i < B; i += 4 * h) {
      for (int64_t j = i; j < i + h; j += W) {
        reg a = V::load(block + j), b = V::load(block + j + h);
        reg c = V::load(block + j + 2 * h), d = V::load(block + j + 3 * h);
        pair(a, b);
        pair(c, d);
        pair(a, c);
        pair(b, d);
        V::store(block + j, a);
        V::store(block + j + h, b);
        V::store(block + j + 2 * h, c);
        V::store(block + j + 3 * h, d);
      }
    }
  }

  static inline void one_stage(float* block, int64_t B, int64_t h) {
    for (int64_t i = 0; i < B; i += 2 * h) {
      for (int64_t j = i; j < i + h; j += W) {
        reg a = V::load(block + j), b = V::load(block + j + h);
        pair(a, b);
        V::store(block + j, a);
        V::store(block + j + h, b);
      }
    }
  }

  static inline reg load_scaled(const Transform& t, const void* x, int64_t k, Dtype dtype) {
    const reg v = V::load(x, k, dtype);
    return t.diag != nullptr ? V::mul(v, V::load(t.diag + k)) : v;
  }

  // Loads x ∘ diag and does the Hadamard's inner stages (and the two next ones, where B allows)
  // on the way. Leaves out the factor 1/√B.
  static void load_and_rotate(const Transform& t, const void* x, Dtype dtype, float* now) {
    const int64_t B = t.hadamard;
    int64_t h = W;  // the first stage not yet done
    if (B >= 4 * W) {
      for (int64_t k = 0; k < t.K; k += 4 * W) {
        reg a = inner_stages(load_scaled(t, x, k, dtype));
        reg b = inner_stages(load_scaled(t, x, k + W, dtype));
        reg c = inner_stages(load_scaled(t, x, k + 2 * W, dtype));
        reg d = inner_stages(load_scaled(t, x, k + 3 * W, dtype));
        pair(a, b);
        pair(c, d);
        pair(a, c);
        pair(b, d);
        V::store(now + k, a);
        V::store(now + k + W, b);
        V::store(now + k + 2 * W, c);
        V::store(now + k + 3 * W, d);
      }
      h = 4 * W;
    } else {
      for (int64_t k = 0; k < t.K; k += W) {
        V::store(now + k, inner_stages(load_scaled(t, x, k, dtype)));
      }
    }
    for (int64_t block = 0; block < t.K; block += B) {
      int64_t stage = h;
      for (; 2 * stage < B; stage *= 4) two_stages(now + block, B, stage);
      if (stage < B) one_stage(now + block, B, stage);
    }
  }

  // A Hadamard smaller than a register: the plain butterflies of the reference.
  static void rotate_small(float* now, int64_t K, int64_t B) {
    for (int64_t base = 0; base < K; base += B) {
      for (int64_t h = 1; h < B; h *= 2) {
        for (int64_t i = base; i < base + B; i += 2 * h) {
          for (int64_t j = i; j < i + h; ++j) {
            const float a = now[j], b = now[j + h];
            now[j] = a + b;
            now[j + h] = a - b;
          }
        }
      }
    }
  }

  // C[i, j] = Σ_k P(i, k)·Q[k, j] for `I` rows i: P(i, k) = p[i·p_row + k·p_depth], Q and C of
  // `cols` columns. Rows share each load of Q.
  template <int I>
  static void multiply_rows(const float* p, int64_t p_row, int64_t p_depth, const float* q,
                            float* c, int64_t depth, int64_t cols) {
    int64_t j = 0;
    for (; j + W <= cols; j += W) {
      reg acc[I];
      for (int i = 0; i < I; ++i) acc[i] = V::set1(0.0f);
      for (int64_t k = 0; k < depth; ++k) {
        const reg row = V::load(q + k * cols + j);
        for (int i = 0; i < I; ++i)
          acc[i] = V::fma(V::set1(p[i * p_row + k * p_depth]), row, acc[i]);
      }
      for (int i = 0; i < I; ++i) V::store(c + i * cols + j, acc[i]);
    }
    for (; j < cols; ++j) {
      for (int i = 0; i < I; ++i) {
        float sum = 0;
        for (int64_t k = 0; k < depth; ++k) {
          sum = std::fma(p[i * p_row + k * p_depth], q[k * cols + j], sum);
        }
        c[i * cols + j] = sum;
      }
    }
  }

  static void multiply(const float* p, int64_t p_row, int64_t p_depth, const float* q, float* c,
                       int64_t rows, int64_t depth, int64_t cols) {
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) {
      multiply_rows<8>(p + i * p_row, p_row, p_depth, q, c + i * cols, depth, cols);
    }
    for (; i + 2 <= rows; i += 2) {
      multiply_rows<2>(p + i * p_row, p_row, p_depth, q, c + i * cols, depth, cols);
    }
    for (; i < rows; ++i) {
      multiply_rows<1>(p + i * p_row, p_row, p_depth, q, c + i * cols, depth, cols);
    }
  }

  static void transform(const Transform& t, const void* x, Dtype dtype, float* y, float* scratch) {
    const int64_t K = t.K;
    float* now = t.left != nullptr ? scratch : y;
    const bool vector_hadamard = t.hadamard >= W;  // then W divides K
    if (vector_hadamard) {
      load_and_rotate(t, x, dtype, now);
    } else {
      float* loaded = t.right != nullptr ? scratch + K : now;
      int64_t k = 0;
      for (; k + W <= K; k += W) V::store(loaded + k, load_scaled(t, x, k, dtype));
      for (; k < K; ++k) {
        loaded[k] = V::load_one(x, k, dtype) * (t.diag != nullptr ? t.diag[k] : 1.0f);
      }
      if (t.right != nullptr) {
        multiply(loaded, t.B, 1, t.right, now, t.A, t.B, t.B);
      } else if (t.hadamard > 1) {
        rotate_small(now, K, t.hadamard);
      }
    }
    if (t.hadamard > 1) {
      const float norm = 1.0f / std::sqrt(static_cast<float>(t.hadamard));
      int64_t k = 0;
      for (; k + W <= K; k += W) V::store(now + k, V::mul(V::load(now + k), V::set1(norm)));
      for (; k < K; ++k) now[k] *= norm;
    }
    if (t.left != nullptr) multiply(t.left, 1, t.A, now, y, t.A, t.A, t.B);
  }

  static void round_token(const Rounding& r, const float* y, int64_t K, int8_t* codes, float* scale,
                          int32_t* sums) {
    uint32_t largest = V::largest_magnitude(y, K);
    const float inverse = choose_scale(largest, r.clip_over_q, scale);
    for (int64_t g = 0; g < K / r.sum_group; ++g) {
      const int64_t start = g * r.sum_group;
      sums[g] = inverse == 0.0f
                    ? zeros(codes + start, r.sum_group)
                    : V::round_codes(y + start, r.sum_group, inverse, r.Q, codes + start);
    }
  }

  static int32_t zeros(int8_t* codes, int64_t count) {
    std::memset(codes, 0, static_cast<size_t>(count));
    return 0;
  }
};

}  // namespace
}  // namespace saltire::transform_quantize
