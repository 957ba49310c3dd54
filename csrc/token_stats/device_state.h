// What the room's kernels share: a token's facts, its running sums in units of 2, what becomes of
// them, and the gradient of a logit. Device code; each file compiles its own copy.
#pragma once
#include "core/cuda/number.h"
#include "core/cuda/ptx.h"
#include "token_stats/device.h"

namespace saltire::token_stats {
namespace {

using namespace saltire::cuda;

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;
constexpr float kLeast2 = -150.0f;  // 2^x is 0 from here on down, and x is finite
constexpr float kMasked = -kInfinity;

// --- tokens -------------------------------------------------------------------------------------

struct TokenFacts {
  float inverse_temperature;  // NaN: the temperature or the label is none
  int label;                  // in this part of the vocabulary; -1: none here
  bool ignored;
};

SALTIRE_DEVICE TokenFacts facts_of(const DeviceTokens& tokens, int64_t m, int64_t V) {
  TokenFacts facts = {1.0f, -1, false};
  const float temperature = tokens.temperature[tokens.own_temperature ? m : 0];
  const bool good = temperature > 0.0f && temperature < kInfinity;
  facts.inverse_temperature = reciprocal_fast(good ? temperature : float_of(0x7fc00000u));
  if (tokens.labels == nullptr) return facts;
  const int64_t label = tokens.labels[m];
  facts.ignored = label == tokens.ignore_index;
  if (facts.ignored) return facts;
  const int64_t all = tokens.vocabulary > 0 ? tokens.vocabulary : V;
  if (label < 0 || label >= all) facts.inverse_temperature = float_of(0x7fc00000u);
  const int64_t own = label - tokens.first;
  if (own >= 0 && own < V) facts.label = static_cast<int>(own);
  return facts;
}

// c·tanh(x / c) = c·(1 - e) / (1 + e), e = e^(-2|x| / c), with x's sign; -∞ says "masked".
SALTIRE_DEVICE float cap(float x, float softcap) {
  const float e = exp2_fast(fabsf(x) * (-2.0f * kLog2E * reciprocal_fast(softcap)));
  const float t = softcap * ((1.0f - e) * reciprocal_fast(1.0f + e));
  return x == kMasked ? x : copysignf(t, x);
}

// --- running sums -------------------------------------------------------------------------------
// Of capped logits x, relative to the largest so far; z = x / T and c = log2(e) / T:
//   sum = Σ 2^d,  weighted = Σ 2^d·d,  d = (x - max)·c
// The difference comes first: it is exact near the largest, under any common offset.

struct Part {
  float max, sum, weighted;
  int at;  // of the largest
};

SALTIRE_DEVICE Part empty_part() {
  return {kMasked, 0.0f, 0.0f, 0};
}

// Moves the sums' reference point to `max`, which is at least the old one.
SALTIRE_DEVICE void raise_max(Part& p, float max, float c) {
  const float shift = p.max == max ? 0.0f : fmaxf((p.max - max) * c, kLeast2);
  const float r = exp2_fast(shift);
  p.weighted = r * fmaf(p.sum, shift, p.weighted);
  p.sum *= r;
  p.max = max;
}

// Adds the sums of other logits; of equal largest ones the lower index stays.
SALTIRE_DEVICE void merge(Part& p, Part other, float c) {
  if (other.max > p.max || (other.max == p.max && other.at < p.at)) p.at = other.at;
  const float max = max_or_nan(p.max, other.max);
  raise_max(p, max, c);
  raise_max(other, max, c);
  p.sum += other.sum;
  p.weighted += other.weighted;
}

// Adds logits; `at` names them if the largest of all is among them.
template <int count>
SALTIRE_DEVICE void add_logits(Part& p, const float (&x)[count], float c, int at) {
  float max = x[0];
#pragma unroll
  for (int i = 1; i < count; ++i) max = max_or_nan(max, x[i]);
  if (max > p.max) p.at = at;
  raise_max(p, max_or_nan(p.max, max), c);
  // All masked so far: any finite reference point makes each a 0.
  const float from = p.max == kMasked ? 0.0f : p.max;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const float d = fmaxf((x[i] - from) * c, kLeast2);
    const float e = exp2_fast(d);
    p.sum += e;
    p.weighted = fmaf(e, d, p.weighted);
  }
}

// The sums of lanes that differ in the bits below `lanes`, in each of them.
template <int lanes>
SALTIRE_DEVICE Part merge_lanes(Part p, float c) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    const Part other = {shuffle_xor(p.max, mask), shuffle_xor(p.sum, mask),
                        shuffle_xor(p.weighted, mask), shuffle_xor(p.at, mask)};
    merge(p, other, c);
  }
  return p;
}

// Writes token m's statistics. label: its capped logit, -∞ if it is not here.
SALTIRE_DEVICE void write_stats(const DeviceStats& out, int64_t m, const TokenFacts& token,
                                const Part& p, float label, int64_t first) {
  const float it = token.inverse_temperature;
  const bool defined = fabsf(p.max) < kInfinity && it == it;
  const float nan = float_of(0x7fc00000u);
  const float max = p.max * it, log_sum = logf(p.sum);
  const float entropy = fmaxf(log_sum - p.weighted * kLn2 / p.sum, 0.0f);
  float values[5] = {(label - p.max) * it - log_sum, entropy, max + log_sum, max, log_sum};
  for (int i = 0; i < 5; ++i) {
    if (!defined && i != 3) values[i] = nan;
    if (token.ignored) values[i] = 0.0f;
  }
  out.logprob[m] = values[0];
  out.entropy[m] = values[1];
  out.logsumexp[m] = values[2];
  out.max[m] = values[3];
  out.log_sum[m] = values[4];
  out.argmax[m] = token.ignored ? 0 : first + p.at;
}

// --- gradients ----------------------------------------------------------------------------------

// dx = it·slope·(p·(a - b·ln p) + [label]·d_logprob), with `it` multiplied into the factors.
struct GradientFacts {
  float it, max, log_sum;
  float a, b;  // b in units of 2
  float d_logprob;
  int label;
  bool live;  // neither ignored nor beyond the last token
};

SALTIRE_DEVICE GradientFacts gradient_facts(const DeviceTokens& tokens, const DeviceGradients& g,
                                            int64_t m, int64_t V) {
  GradientFacts facts = {};
  facts.label = -1;
  if (m >= tokens.M) return facts;
  const TokenFacts token = facts_of(tokens, m, V);
  if (token.ignored) return facts;
  const float d_logprob = g.d_logprob != nullptr ? g.d_logprob[m] : 0.0f;
  const float d_entropy = g.d_entropy != nullptr ? g.d_entropy[m] : 0.0f;
  const float d_lse = g.d_lse != nullptr ? g.d_lse[m] : 0.0f;
  facts.it = token.inverse_temperature;
  facts.max = g.max[m];
  facts.log_sum = g.log_sum[m];
  facts.a = (d_lse - d_logprob - d_entropy * g.entropy[m]) * facts.it;
  facts.b = d_entropy * kLn2 * facts.it;
  facts.d_logprob = d_logprob * facts.it;
  facts.label = token.label;
  facts.live = true;
  return facts;
}

// x: the capped logit. inverse_cap: 1 / softcap, 0 for none.
SALTIRE_DEVICE float gradient_of(const GradientFacts& f, float x, bool is_label,
                                 float inverse_cap) {
  if (x == kMasked) return 0.0f;
  const float log_p = max_or_nan(((x * f.it - f.max) - f.log_sum) * kLog2E, kLeast2);
  const float p = exp2_fast(log_p);
  const float all = p * fmaf(-f.b, log_p, f.a);
  const float t = x * inverse_cap;
  return (is_label ? all + f.d_logprob : all) * fmaf(-t, t, 1.0f);
}

}  // namespace
}  // namespace saltire::token_stats
