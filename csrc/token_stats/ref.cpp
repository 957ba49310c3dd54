// Plain loops in double: strips of one token and one row of the head.
#include <cmath>
#include <cstring>

#include "core/cpu/half.h"
#include "token_stats/op.h"
#include "token_stats/state.h"

namespace saltire::token_stats {
namespace {

double load(const void* x, int64_t k, Dtype dtype) {
  if (dtype == Dtype::f32) return static_cast<const float*>(x)[k];
  const uint16_t half = static_cast<const uint16_t*>(x)[k];
  return dtype == Dtype::f16 ? f16_to_f32(half) : bf16_to_f32(half);
}

void store(void* x, int64_t k, Dtype dtype, double value) {
  const float f = static_cast<float>(value);
  if (dtype == Dtype::f32) {
    static_cast<float*>(x)[k] = f;
  } else {
    static_cast<uint16_t*>(x)[k] = dtype == Dtype::f16 ? f32_to_f16(f) : f32_to_bf16(f);
  }
}

double cap(double x, float softcap) {
  return softcap == 0 || x == -kInfinity ? x : softcap * std::tanh(x / softcap);
}

void add_logit(State* state, double z, int64_t index, bool is_label) {
  if (is_label) state->label = static_cast<float>(z);
  if (z > state->max) {
    raise_max(state, static_cast<float>(z));
    state->argmax = index;
  }
  if (z == -kInfinity) return;
  const double d = z - state->max;
  state->sum += std::exp(d);
  state->weighted += std::exp(d) * d;
}

// dx from the capped, not yet tempered logit.
double logit_gradient(double capped, const Token& token, const Gradient& g, float softcap,
                      bool is_label) {
  if (capped == -kInfinity) return 0;
  const double log_p = capped * token.inverse_temperature - g.max - g.log_sum;
  const double p = std::exp(log_p);
  const double dz = p * (g.d_lse - g.d_logprob - g.d_entropy * (log_p + g.entropy)) +
                    (is_label ? g.d_logprob : 0.0);
  const double slope = softcap == 0 ? 1 : 1 - capped / softcap * (capped / softcap);
  return dz * token.inverse_temperature * slope;
}

void forward_row(const Row& row, const Token& token, State* state) {
  for (int64_t v = 0; v < row.V; ++v) {
    const double z = cap(load(row.x, v, row.dtype), row.softcap) * token.inverse_temperature;
    add_logit(state, z, v, v == token.label);
  }
}

void backward_row(const Row& row, const Token& token, const Gradient& g, void* dx) {
  for (int64_t v = 0; v < row.V; ++v) {
    const double capped = cap(load(row.x, v, row.dtype), row.softcap);
    store(dx, v, row.dtype, logit_gradient(capped, token, g, row.softcap, v == token.label));
  }
}

void pack_tokens(const float* plain, int64_t stride, int64_t count, int64_t D, float* packed) {
  for (int64_t t = 0; t < count; ++t) std::memcpy(packed + t * D, plain + t * stride, D * 4);
}

void pack_head(const void* head, Dtype dtype, int64_t count, int64_t D, float* packed) {
  for (int64_t i = 0; i < count * D; ++i) packed[i] = static_cast<float>(load(head, i, dtype));
}

double logit(const HeadTile& tile, const float* hidden, int64_t D, int64_t v) {
  double sum = tile.bias != nullptr ? tile.bias[v] : 0;
  for (int64_t d = 0; d < D; ++d) sum += static_cast<double>(hidden[d]) * tile.packed[v * D + d];
  return cap(sum, tile.softcap);
}

void forward_tile(const HeadTile& tile, const Tokens& tokens, float*, State* states) {
  for (int64_t t = 0; t < tokens.count; ++t) {
    const Token& token = tokens.token[t];
    for (int64_t v = 0; v < tile.count; ++v) {
      const double z = logit(tile, tokens.packed + t * tokens.D, tokens.D, v);
      add_logit(&states[t], z * token.inverse_temperature, tile.first + v,
                tile.first + v == token.label);
    }
  }
}

void backward_tile(const HeadTile& tile, const Tokens& tokens, const Gradient* gradients, float*,
                   const LinearGradients& out) {
  const int64_t D = tokens.D;
  if (out.head != nullptr && out.head_is_new) std::memset(out.head, 0, tile.count * D * 4);
  for (int64_t t = 0; t < tokens.count; ++t) {
    const Token& token = tokens.token[t];
    if (token.ignored) continue;
    const float* hidden = tokens.packed + t * D;
    for (int64_t v = 0; v < tile.count; ++v) {
      const auto dx =
          static_cast<float>(logit_gradient(logit(tile, hidden, D, v), token, gradients[t],
                                            tile.softcap, tile.first + v == token.label));
      for (int64_t d = 0; d < D; ++d) {
        if (out.hidden != nullptr) out.hidden[t * D + d] += dx * tile.packed[v * D + d];
        if (out.head != nullptr) out.head[v * D + d] += dx * hidden[d];
      }
      if (out.bias != nullptr) out.bias[v] += dx;
    }
  }
}

}  // namespace

Kernels ref_kernels() {
  return {1, 1, forward_row, backward_row, pack_tokens, pack_head, forward_tile, backward_tile};
}

}  // namespace saltire::token_stats
