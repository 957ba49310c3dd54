// From logits: a row of the vocabulary, in blocks that stay in L1 between their two passes.
#pragma once
#include <algorithm>

#include "core/cpu/half.h"
#include "token_stats/state.h"
#include "token_stats/vector_math.h"

namespace saltire::token_stats {
namespace {

template <typename V>
struct Rows {
  using reg = typename V::reg;
  using Math = VectorMath<V>;
  static constexpr int64_t W = V::width;
  static constexpr int64_t kBlock = 2048;

  // z of logits k .. k + W; those beyond V are masked.
  template <bool capped>
  static inline reg logit(const Row& row, int64_t k, reg inverse_temperature) {
    reg x = k + W <= row.V ? V::load(row.x, k, row.dtype)
                           : V::load_part(row.x, k, row.V - k, row.dtype, -kInfinity);
    if constexpr (capped) x = Math::cap(x, row.softcap);
    return V::mul(x, inverse_temperature);
  }

  static float label_logit(const Row& row, const Token& token) {
    alignas(64) float lanes[W];
    const reg it = V::set1(token.inverse_temperature);
    const int64_t k = token.label / W * W;
    V::store(lanes, row.softcap == 0 ? logit<false>(row, k, it) : logit<true>(row, k, it));
    return lanes[token.label - k];
  }

  template <bool capped>
  static void forward_blocks(const Row& row, const Token& token, State* state) {
    const reg it = V::set1(token.inverse_temperature);
    for (int64_t start = 0; start < row.V; start += kBlock) {
      const int64_t end = std::min(start + kBlock, row.V);
      reg m0 = V::set1(-kInfinity), m1 = m0;
      int64_t k = start;
      for (; k + 2 * W <= end; k += 2 * W) {
        m0 = V::max(logit<capped>(row, k, it), m0);
        m1 = V::max(logit<capped>(row, k + W, it), m1);
      }
      for (; k < end; k += W) m0 = V::max(logit<capped>(row, k, it), m0);
      const float largest = V::largest(V::max(m0, m1));
      if (largest > state->max) {
        raise_max(state, largest);
        k = start;
        while (k < end && V::equal_lanes(logit<capped>(row, k, it), V::set1(largest)) == 0) k += W;
        if (k < end) {
          state->argmax =
              k + __builtin_ctz(V::equal_lanes(logit<capped>(row, k, it), V::set1(largest)));
        }
      }
      // Everything masked so far: any finite reference point makes each e^(−∞ − m) a 0.
      const reg m = V::set1(state->max == -kInfinity ? 0.0f : state->max);
      reg sum = V::set1(0.0f), weighted = sum;
      for (k = start; k < end; k += W) {
        const reg d = V::sub(logit<capped>(row, k, it), m);
        const reg e = Math::exp(d);
        sum = V::add(sum, e);
        weighted = V::fma(e, V::max(V::set1(Math::kLeast), d), weighted);
      }
      state->sum += V::sum(sum);
      state->weighted += V::sum(weighted);
    }
  }

  static void forward(const Row& row, const Token& token, State* state) {
    if (token.label >= 0) state->label = label_logit(row, token);
    if (row.softcap == 0) {
      forward_blocks<false>(row, token, state);
    } else {
      forward_blocks<true>(row, token, state);
    }
  }

  template <bool capped>
  static void backward_blocks(const Row& row, const Token& token, const Gradient& g, void* dx) {
    const reg it = V::set1(token.inverse_temperature);
    const reg a = V::set1(g.d_lse - g.d_logprob - g.d_entropy * g.entropy);
    const reg b = V::set1(g.d_entropy);
    const reg max = V::set1(g.max), log_sum = V::set1(g.log_sum);
    for (int64_t k = 0; k < row.V; k += W) {
      const reg z = logit<capped>(row, k, it);
      reg d = V::mul(Math::spread(V::sub(V::sub(z, max), log_sum), a, b), it);
      if constexpr (capped) {
        const reg untempered = V::mul(z, V::set1(1 / token.inverse_temperature));
        const reg slope = Math::cap_slope(untempered, row.softcap);
        // Masked: 0, not 0·∞.
        d = V::where_equal(z, V::set1(-kInfinity), V::set1(0.0f), V::mul(d, slope));
      }
      if (k + W <= row.V) {
        V::store(dx, k, d, row.dtype);
      } else {
        V::store_part(dx, k, row.V - k, d, row.dtype);
      }
    }
  }

  // The label's own term is added in f32 before the one rounding to the output's dtype: p is
  // computed again for that logit.
  static void backward(const Row& row, const Token& token, const Gradient& g, void* dx) {
    if (row.softcap == 0) {
      backward_blocks<false>(row, token, g, dx);
    } else {
      backward_blocks<true>(row, token, g, dx);
    }
    if (token.label < 0 || g.d_logprob == 0) return;
    const float z = label_logit(row, token);
    if (z == -kInfinity) return;
    alignas(64) float lanes[W];
    const reg log_p = V::sub(V::sub(V::set1(z), V::set1(g.max)), V::set1(g.log_sum));
    const reg a = V::set1(g.d_lse - g.d_logprob - g.d_entropy * g.entropy);
    V::store(lanes, Math::spread(log_p, a, V::set1(g.d_entropy)));
    const float capped = z / token.inverse_temperature;
    const float slope = row.softcap == 0 ? 1 : 1 - capped / row.softcap * (capped / row.softcap);
    const float d = (lanes[0] + g.d_logprob) * token.inverse_temperature * slope;
    if (row.dtype == Dtype::f32) {
      static_cast<float*>(dx)[token.label] = d;
    } else {
      static_cast<uint16_t*>(dx)[token.label] =
          row.dtype == Dtype::f16 ? f32_to_f16(d) : f32_to_bf16(d);
    }
  }
};

}  // namespace
}  // namespace saltire::token_stats
