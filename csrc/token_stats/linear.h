// From hidden states and the head: a tile of the head against strips of S = 2·W tokens.
//
// The vocabulary lies along rows and tokens along lanes, so the statistics of a strip need no sums
// across lanes, and dx comes out as the very operand that both backward products read:
//
//   z [vocabulary][token] = W·hᵀ        rows of W packed R at a time, tokens packed S at a time
//   dhᵀ[d][token]        += Wᵀ·dx       the same packed W: R columns by R rows are one run of it
//   dW [vocabulary][d]   += dx·h        h in panels of S columns
//
// One loop serves all three: R·2 registers of sums, one broadcast and two products a row and step.
// D = 576: a tile of 192 rows is 442 KB and a strip of 32 tokens 74 KB, both in L2; z is 24 KB.
#pragma once
#include <algorithm>

#include "core/cpu/half.h"
#include "token_stats/rows.h"
#include "token_stats/state.h"
#include "token_stats/vector_math.h"

namespace saltire::token_stats {
namespace {

template <typename V>
struct Linear {
  using reg = typename V::reg;
  using Math = VectorMath<V>;
  static constexpr int64_t W = V::width, S = 2 * W;
  static constexpr int R = V::rows;
  static constexpr int64_t kStripBytes = 20 << 10;  // of 32 KB of L1

  // A and B of C[i][0..S) (+)= Σ a[i·AI + k·a_step]·b[k·b_step + 0..S), k in `outer` runs of
  // `inner` steps, a run a_run and b_run floats after the one before.
  struct Operands {
    const float* a;
    int64_t a_step, a_run;
    const float* b;
    int64_t b_step, b_run;
    int64_t outer, inner;
  };

  template <int I, int AI>
  static inline void multiply(const Operands& o, float* c, int64_t c_stride, bool add) {
    reg sum[I][2];
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      sum[i][0] = add ? V::load(c + i * c_stride) : V::set1(0.0f);
      sum[i][1] = add ? V::load(c + i * c_stride + W) : V::set1(0.0f);
    }
    for (int64_t run = 0; run < o.outer; ++run) {
      const float* a = o.a + run * o.a_run;
      const float* b = o.b + run * o.b_run;
      for (int64_t k = 0; k < o.inner; ++k, a += o.a_step, b += o.b_step) {
        const reg b0 = V::load(b), b1 = V::load(b + W);
#pragma GCC unroll 16
        for (int i = 0; i < I; ++i) {
          const reg s = V::set1(a[i * AI]);
          sum[i][0] = V::fma(s, b0, sum[i][0]);
          sum[i][1] = V::fma(s, b1, sum[i][1]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      V::store(c + i * c_stride, sum[i][0]);
      V::store(c + i * c_stride + W, sum[i][1]);
    }
  }

  // multiply<rows>, for a number of rows known at run time.
  template <int AI, int I = R>
  static inline void multiply_rows(int64_t rows, const Operands& o, float* c, int64_t c_stride,
                                   bool add) {
    if constexpr (I > 1) {
      if (rows < I) return multiply_rows<AI, I - 1>(rows, o, c, c_stride, add);
    }
    multiply<I, AI>(o, c, c_stride, add);
  }

  static inline float load_one(const void* x, int64_t k, Dtype dtype) {
    if (dtype == Dtype::f32) return static_cast<const float*>(x)[k];
    const uint16_t half = static_cast<const uint16_t*>(x)[k];
    return dtype == Dtype::f16 ? f16_to_f32(half) : bf16_to_f32(half);
  }

  static void pack_tokens(const float* plain, int64_t stride, int64_t count, int64_t D,
                          float* packed) {
    for (int64_t t = 0; t < round_up(count, S); ++t) {
      float* out = packed + t / S * S * D + t % S;
      for (int64_t d = 0; d < D; ++d) out[d * S] = t < count ? plain[t * stride + d] : 0.0f;
    }
  }

  static void pack_head(const void* head, Dtype dtype, int64_t count, int64_t D, float* packed) {
    for (int64_t v = 0; v < round_up(count, R); ++v) {
      float* out = packed + v / R * R * D + v % R;
      for (int64_t d = 0; d < D; ++d) {
        out[d * R] = v < count ? load_one(head, v * D + d, dtype) : 0.0f;
      }
    }
  }

  // In runs of D whose part of the strip stays in L1 beside the rows: each group of R rows reads
  // all of it again, which from L2 costs a quarter of the speed. The order of the sums is the same.
  static inline void logits_of_strip(const HeadTile& tile, const float* strip, int64_t D,
                                     float* z) {
    const int64_t runs = (D * S * 4 + kStripBytes - 1) / kStripBytes, depth = (D + runs - 1) / runs;
    for (int64_t d = 0; d < D; d += depth) {
      for (int64_t v = 0; v < tile.count; v += R) {
        multiply<R, 1>(
            {tile.packed + v * D + d * R, R, 0, strip + d * S, S, 0, 1, std::min(depth, D - d)},
            z + v * S, S, d > 0);
      }
    }
  }

  // Bias and cap, in place.
  static inline void finish_logits(const HeadTile& tile, float* z) {
    if (tile.bias == nullptr && tile.softcap == 0) return;
    for (int64_t v = 0; v < tile.count; ++v) {
      for (int64_t half = 0; half < S; half += W) {
        reg x = V::load(z + v * S + half);
        if (tile.bias != nullptr) x = V::add(x, V::set1(tile.bias[v]));
        if (tile.softcap != 0) x = Math::cap(x, tile.softcap);
        V::store(z + v * S + half, x);
      }
    }
  }

  // Adds a tile to the states of W tokens, of which `count` are real.
  static inline void add_lanes(const HeadTile& tile, const float* z, const Token* token,
                               int64_t count, State* states) {
    alignas(64) float lane[W], index[W], sums[W], weights[W];
    for (int64_t i = 0; i < W; ++i) lane[i] = i < count ? token[i].inverse_temperature : 1.0f;
    const reg it = V::load(lane);
    reg m = V::set1(-kInfinity), where = V::set1(0.0f);
    for (int64_t v = 0; v < tile.count; ++v) {
      const reg x = V::mul(V::load(z + v * S), it);
      where = V::where_greater(x, m, V::set1(static_cast<float>(v)), where);
      m = V::max(x, m);
    }
    V::store(lane, m);
    V::store(index, where);
    for (int64_t i = 0; i < W; ++i) {
      if (i < count) {
        if (lane[i] > states[i].max) {
          raise_max(&states[i], lane[i]);
          states[i].argmax = tile.first + static_cast<int64_t>(index[i]);
        }
        lane[i] = states[i].max;
      }
      if (lane[i] == -kInfinity) lane[i] = 0;  // all masked so far: any finite reference will do
    }
    m = V::load(lane);
    reg sum = V::set1(0.0f), weighted = sum;
    for (int64_t v = 0; v < tile.count; ++v) {
      const reg d = V::sub(V::mul(V::load(z + v * S), it), m);
      const reg e = Math::exp(d);
      sum = V::add(sum, e);
      weighted = V::fma(e, V::max(V::set1(Math::kLeast), d), weighted);
    }
    V::store(sums, sum);
    V::store(weights, weighted);
    for (int64_t i = 0; i < count; ++i) {
      states[i].sum += sums[i];
      states[i].weighted += weights[i];
      const int64_t v = token[i].label - tile.first;
      if (token[i].label >= 0 && v >= 0 && v < tile.count) {
        states[i].label = z[v * S + i] * token[i].inverse_temperature;
      }
    }
  }

  static void forward_tile(const HeadTile& tile, const Tokens& tokens, float* z, State* states) {
    for (int64_t t = 0; t < tokens.count; t += S) {
      logits_of_strip(tile, tokens.packed + t * tokens.D, tokens.D, z);
      finish_logits(tile, z);
      for (int64_t half = 0; half < S && t + half < tokens.count; half += W) {
        add_lanes(tile, z + half, tokens.token + t + half, std::min(W, tokens.count - t - half),
                  states + t + half);
      }
    }
  }

  // z becomes dx for W tokens, of which `count` are real; the others get 0.
  static inline void gradient_lanes(const HeadTile& tile, float* z, const Token* token,
                                    const Gradient* gradients, int64_t count) {
    alignas(64) float it_[W] = {}, max_[W] = {}, log_sum_[W] = {}, a_[W] = {}, b_[W] = {};
    float label[W];
    for (int64_t i = 0; i < count; ++i) {
      const Gradient& g = gradients[i];
      it_[i] = token[i].inverse_temperature;
      max_[i] = g.max;
      log_sum_[i] = g.log_sum;
      a_[i] = g.d_lse - g.d_logprob - g.d_entropy * g.entropy;
      b_[i] = g.d_entropy;
      const int64_t v = token[i].label - tile.first;
      const bool here = token[i].label >= 0 && v >= 0 && v < tile.count;
      label[i] = here ? z[v * S + i] : -kInfinity;
    }
    const reg it = V::load(it_), max = V::load(max_), log_sum = V::load(log_sum_);
    const reg a = V::load(a_), b = V::load(b_);
    for (int64_t v = 0; v < tile.count; ++v) {
      const reg x = V::load(z + v * S);
      const reg log_p = V::sub(V::sub(V::mul(x, it), max), log_sum);
      reg d = V::mul(Math::spread(log_p, a, b), it);
      if (tile.softcap != 0) {
        d = V::where_equal(x, V::set1(-kInfinity), V::set1(0.0f),
                           V::mul(d, Math::cap_slope(x, tile.softcap)));
      }
      V::store(z + v * S, d);
    }
    for (int64_t i = 0; i < W; ++i) {
      if (i >= count || token[i].ignored) {
        for (int64_t v = 0; v < tile.count; ++v) z[v * S + i] = 0;
      } else if (label[i] != -kInfinity) {
        const float t = tile.softcap == 0 ? 0 : label[i] / tile.softcap;
        z[(token[i].label - tile.first) * S + i] +=
            gradients[i].d_logprob * token[i].inverse_temperature * (1 - t * t);
      }
    }
  }

  static inline void add_to_head(const HeadTile& tile, const Tokens& tokens, const float* dx,
                                 int64_t dx_strip, const LinearGradients& out) {
    const int64_t D = tokens.D, strips = round_up(tokens.count, S) / S;
    alignas(64) float part[R * S];
    for (int64_t d = 0; d < D; d += S) {
      for (int64_t v = 0; v < tile.count; v += R) {
        const int64_t rows = std::min<int64_t>(R, tile.count - v);
        const Operands o{dx + v * S, 1,     dx_strip, tokens.panels + d / S * tokens.panel,
                         S,          S * S, strips,   S};
        float* c = out.head + v * D + d;
        if (d + S <= D) {
          multiply_rows<S>(rows, o, c, D, !out.head_is_new);
          continue;
        }
        multiply_rows<S>(rows, o, part, S, false);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < D - d; ++j) {
            c[i * D + j] = (out.head_is_new ? 0.0f : c[i * D + j]) + part[i * S + j];
          }
        }
      }
    }
  }

  static void backward_tile(const HeadTile& tile, const Tokens& tokens, const Gradient* gradients,
                            float* z, const LinearGradients& out) {
    const int64_t D = tokens.D, dx_strip = round_up(tile.count, R) * S;
    for (int64_t t = 0; t < tokens.count; t += S) {
      float* dx = z + t / S * dx_strip;
      logits_of_strip(tile, tokens.packed + t * D, D, dx);
      finish_logits(tile, dx);
      for (int64_t half = 0; half < S; half += W) {
        const int64_t first = std::min(t + half, tokens.count);
        gradient_lanes(tile, dx + half, tokens.token + first, gradients + first,
                       std::min(W, tokens.count - first));
      }
      for (int64_t d = 0; out.hidden != nullptr && d < D; d += R) {
        multiply_rows<R>(
            std::min<int64_t>(R, D - d),
            {tile.packed + d * R, 1, R * D, dx, S, R * S, round_up(tile.count, R) / R, R},
            out.hidden + t * D + d * S, S, true);
      }
      for (int64_t v = 0; out.bias != nullptr && v < tile.count; ++v) {
        out.bias[v] += V::sum(V::add(V::load(dx + v * S), V::load(dx + v * S + W)));
      }
    }
    if (out.head != nullptr) add_to_head(tile, tokens, z, dx_strip, out);
  }
};

template <typename V>
Kernels make_kernels() {
  return {Linear<V>::S,
          Linear<V>::R,
          Rows<V>::forward,
          Rows<V>::backward,
          Linear<V>::pack_tokens,
          Linear<V>::pack_head,
          Linear<V>::forward_tile,
          Linear<V>::backward_tile};
}

}  // namespace
}  // namespace saltire::token_stats
