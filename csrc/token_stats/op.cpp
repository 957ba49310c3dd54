// Registers token_stats and linear_token_stats with their backward ops.
#include "token_stats/op.h"

#include <cstring>
#include <tuple>

#include "core/cpu/half.h"
#include "core/threads.h"
#include "token_stats/arguments.h"
#include "token_stats/drive.h"
#include "token_stats/state.h"

namespace saltire::token_stats {
namespace {

using Maybe = std::optional<Tensor>;
// logprob, entropy, logsumexp, max, log_sum, argmax
using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Statistics of finished states. Double until the last step: ln s − u/s of near-equal numbers.
Stats finish(const Tensor& like, const std::vector<Token>& tokens, const std::vector<State>& states,
             int64_t first) {
  const auto M = static_cast<int64_t>(tokens.size());
  Tensor out[5];
  float* to[5];
  for (int i = 0; i < 5; ++i) {
    out[i] = new_tensor(like, {M}, ScalarType::Float);
    to[i] = static_cast<float*>(out[i].data_ptr());
  }
  Tensor argmax = new_tensor(like, {M}, ScalarType::Long);
  auto* index = static_cast<int64_t*>(argmax.data_ptr());
  for (int64_t m = 0; m < M; ++m) {
    const State& s = states[static_cast<size_t>(m)];
    if (tokens[static_cast<size_t>(m)].ignored) {
      for (auto* values : to) values[m] = 0;
      index[m] = 0;
      continue;
    }
    const double log_sum = std::log(s.sum);  // NaN where a logit is; −∞ where all are masked
    const bool defined = std::isfinite(log_sum);
    const double entropy = std::max(0.0, log_sum - s.weighted / s.sum);
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    to[0][m] = defined ? static_cast<float>(static_cast<double>(s.label) - s.max - log_sum) : kNan;
    to[1][m] = defined ? static_cast<float>(entropy) : kNan;
    to[2][m] = defined ? static_cast<float>(s.max + log_sum) : kNan;
    to[3][m] = s.max;
    to[4][m] = defined ? static_cast<float>(log_sum) : kNan;
    index[m] = first + s.argmax;
  }
  return {out[0], out[1], out[2], out[3], out[4], argmax};
}

struct Logits {
  Tensor x;
  Dtype dtype;
  int64_t M, V, row_bytes;

  Logits(const char* op, const Tensor& logits) {
    check_cpu(op, "logits", logits);
    check_dim(op, "logits", logits, 2);
    dtype = float_dtype(op, "logits", logits);
    x = as_contiguous(logits);
    M = x.size(0);
    V = x.size(1);
    row_bytes = V * static_cast<int64_t>(x.element_size());
  }

  Row row(int64_t m, double softcap) const {
    return {static_cast<const uint8_t*>(x.data_ptr()) + m * row_bytes, dtype, V,
            static_cast<float>(softcap)};
  }

  // Tokens a thread takes at least.
  int64_t grain() const { return 1 + 16384 / V; }
};

void check_softcap(const char* op, double softcap) {
  SALTIRE_CHECK(std::isfinite(softcap) && softcap >= 0, op, ": softcap is ", softcap,
                "; expected a number above 0, or 0 for none.");
}

Stats token_stats_cpu(Tensor logits, Maybe labels, Tensor temperature, double softcap,
                      int64_t ignore_index, int64_t first, int64_t vocabulary) {
  constexpr const char* kOp = "token_stats";
  const Logits in(kOp, logits);
  check_softcap(kOp, softcap);
  const auto tokens =
      make_tokens(kOp, in.M, in.V, labels, temperature, {ignore_index, first, vocabulary});
  std::vector<State> states(tokens.size());
  const Kernels k = kernels();
  parallel_for(in.M, in.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const auto i = static_cast<size_t>(m);
      if (!tokens[i].ignored) k.forward_row(in.row(m, softcap), tokens[i], &states[i]);
    }
  });
  return finish(logits, tokens, states, first);
}

Tensor token_stats_backward_cpu(Tensor logits, Maybe labels, Tensor temperature, double softcap,
                                int64_t ignore_index, int64_t first, int64_t vocabulary, Tensor max,
                                Tensor log_sum, Tensor entropy, Maybe d_logprob, Maybe d_entropy,
                                Maybe d_logsumexp) {
  constexpr const char* kOp = "token_stats_backward";
  const Logits in(kOp, logits);
  const auto tokens =
      make_tokens(kOp, in.M, in.V, labels, temperature, {ignore_index, first, vocabulary});
  const auto gradients =
      make_gradients(kOp, in.M, max, log_sum, entropy, d_logprob, d_entropy, d_logsumexp);
  Tensor out = new_tensor(in.x, {in.M, in.V}, in.x.scalar_type());
  auto* dx = static_cast<uint8_t*>(out.data_ptr());
  const Kernels k = kernels();
  parallel_for(in.M, in.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const auto i = static_cast<size_t>(m);
      uint8_t* to = dx + m * in.row_bytes;
      if (tokens[i].ignored) {
        std::memset(to, 0, static_cast<size_t>(in.row_bytes));
      } else {
        k.backward_row(in.row(m, softcap), tokens[i], gradients[i], to);
      }
    }
  });
  return out;
}

// Hidden states and head, checked, with the plan for them.
struct Problem {
  Tensor hidden, head, keep_bias;
  Dtype hidden_dtype, head_dtype;
  const float* bias = nullptr;
  int64_t M, D, V;
  float softcap;
  Kernels k;
  Plan plan;

  Problem(const char* op, const Tensor& hidden_, const Tensor& head_, const Maybe& bias_,
          double softcap_)
      : softcap(static_cast<float>(softcap_)), k(kernels()) {
    check_cpu(op, "hidden", hidden_);
    check_cpu(op, "head", head_);
    check_dim(op, "hidden", hidden_, 2);
    check_dim(op, "head", head_, 2);
    check_softcap(op, softcap_);
    hidden_dtype = float_dtype(op, "hidden", hidden_);
    head_dtype = float_dtype(op, "head", head_);
    hidden = as_contiguous(hidden_);
    head = as_contiguous(head_);
    M = hidden.size(0);
    D = hidden.size(1);
    V = head.size(0);
    check_size(op, "head", head, 1, D, "the width of hidden");
    bias = optional_floats(op, "bias", bias_, V, &keep_bias);
    plan = make_plan(M, D, V, thread_count(), k);
  }

  int64_t tile_rows() const { return round_up(plan.tile, k.rows); }

  const void* head_row(int64_t v) const {
    return static_cast<const uint8_t*>(head.data_ptr()) +
           v * D * static_cast<int64_t>(head.element_size());
  }

  int64_t panels() const { return round_up(D, k.strip) / k.strip; }
  int64_t panel() const { return plan.chunk * k.strip; }

  // Tokens [start, start + count) as panels and as packed strips, both padded with zeros.
  void load_tokens(int64_t start, int64_t count, float* to_panels, float* packed) const {
    const int64_t S = k.strip, stride = panels() * S;
    parallel_for(round_up(count, S) / S, 1, [&](int64_t begin, int64_t end) {
      const Floats rows = new_floats(S * stride);
      for (int64_t t0 = begin * S; t0 < end * S; t0 += S) {
        for (int64_t t = t0; t < t0 + S; ++t) {
          float* row = rows.get() + (t - t0) * stride;
          for (int64_t d = 0; d < stride; ++d) {
            row[d] = t < count && d < D ? one(hidden, hidden_dtype, (start + t) * D + d) : 0.0f;
          }
          for (int64_t d = 0; d < stride; d += S) {
            std::memcpy(to_panels + d / S * panel() + t * S, row + d, static_cast<size_t>(S) * 4);
          }
        }
        k.pack_tokens(rows.get(), stride, std::min(S, count - t0), D, packed + t0 * D);
      }
    });
  }

  static float one(const Tensor& x, Dtype dtype, int64_t i) {
    if (dtype == Dtype::f32) return static_cast<const float*>(x.data_ptr())[i];
    const uint16_t half = static_cast<const uint16_t*>(x.data_ptr())[i];
    return dtype == Dtype::f16 ? f16_to_f32(half) : bf16_to_f32(half);
  }

  // Tile `index` of the head, packed.
  HeadTile load_tile(int64_t index, float* packed) const {
    const int64_t v = index * plan.tile, n = std::min(plan.tile, V - v);
    k.pack_head(head_row(v), head_dtype, n, D, packed);
    return {v, n, packed, bias != nullptr ? bias + v : nullptr, softcap};
  }
};

Stats linear_token_stats_cpu(Tensor hidden, Tensor head, Maybe bias, Maybe labels,
                             Tensor temperature, double softcap, int64_t ignore_index,
                             int64_t first, int64_t vocabulary) {
  constexpr const char* kOp = "linear_token_stats";
  const Problem p(kOp, hidden, head, bias, softcap);
  const auto tokens =
      make_tokens(kOp, p.M, p.V, labels, temperature, {ignore_index, first, vocabulary});
  const Plan& plan = p.plan;
  std::vector<State> states(tokens.size());
  const Floats panels = new_floats(p.panels() * p.panel());
  const Floats packed = new_floats(plan.chunk * p.D);
  for (int64_t start = 0; start < p.M; start += plan.chunk) {
    const int64_t count = std::min(plan.chunk, p.M - start);
    p.load_tokens(start, count, panels.get(), packed.get());
    const Tokens chunk{count, p.D, packed.get(), panels.get(), p.panel(), tokens.data() + start};
    std::vector<State> parts(static_cast<size_t>(plan.parts * count));
    parallel_for(plan.parts, 1, [&](int64_t begin, int64_t end) {
      const Floats tile_packed = new_floats(p.tile_rows() * p.D);
      const Floats z = new_floats(p.tile_rows() * p.k.strip);
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t i = plan.first_tile(part); i < plan.first_tile(part + 1); ++i) {
          const HeadTile tile = p.load_tile(i, tile_packed.get());
          p.k.forward_tile(tile, chunk, z.get(), parts.data() + part * count);
        }
      }
    });
    for (int64_t part = 0; part < plan.parts; ++part) {
      for (int64_t t = 0; t < count; ++t) {
        merge(&states[static_cast<size_t>(start + t)],
              parts[static_cast<size_t>(part * count + t)]);
      }
    }
  }
  return finish(hidden, tokens, states, first);
}

// Sums the parts' dhᵀ strips into rows of dh.
void gather_hidden(const Problem& p, const float* partial, int64_t part_size, int64_t count,
                   float* dh) {
  const int64_t S = p.k.strip;
  parallel_for(round_up(count, S) / S, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin * S; t < std::min(end * S, count); ++t) {
      const float* from = partial + t / S * S * p.D + t % S;
      for (int64_t d = 0; d < p.D; ++d) {
        float sum = 0;
        for (int64_t part = 0; part < p.plan.parts; ++part) sum += from[part * part_size + d * S];
        dh[t * p.D + d] = sum;
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_token_stats_backward_cpu(
    Tensor hidden, Tensor head, Maybe bias, Maybe labels, Tensor temperature, double softcap,
    int64_t ignore_index, int64_t first, int64_t vocabulary, Tensor max, Tensor log_sum,
    Tensor entropy, Maybe d_logprob, Maybe d_entropy, Maybe d_logsumexp, bool wants_hidden,
    bool wants_head, bool wants_bias) {
  constexpr const char* kOp = "linear_token_stats_backward";
  const Problem p(kOp, hidden, head, bias, softcap);
  const auto tokens =
      make_tokens(kOp, p.M, p.V, labels, temperature, {ignore_index, first, vocabulary});
  const auto gradients =
      make_gradients(kOp, p.M, max, log_sum, entropy, d_logprob, d_entropy, d_logsumexp);
  const Plan& plan = p.plan;
  Tensor dh = new_tensor(p.hidden, {wants_hidden ? p.M : 0, p.D}, ScalarType::Float);
  Tensor dw = new_tensor(p.hidden, {wants_head ? p.V : 0, p.D}, ScalarType::Float);
  Tensor db = new_tensor(p.hidden, {wants_bias ? p.V : 0}, ScalarType::Float);
  auto* to_dw = static_cast<float*>(dw.data_ptr());
  auto* to_db = static_cast<float*>(db.data_ptr());
  if (wants_bias) std::memset(to_db, 0, static_cast<size_t>(p.V) * 4);
  if (wants_head && p.M == 0) std::memset(to_dw, 0, static_cast<size_t>(p.V * p.D) * 4);

  const Floats panels = new_floats(p.panels() * p.panel());
  const Floats packed = new_floats(plan.chunk * p.D);
  const int64_t part_size = plan.chunk * p.D;
  const Floats partial = new_floats(wants_hidden ? plan.parts * part_size : 0);
  for (int64_t start = 0; start < p.M; start += plan.chunk) {
    const int64_t count = std::min(plan.chunk, p.M - start);
    p.load_tokens(start, count, panels.get(), packed.get());
    parallel_for(plan.parts, 1, [&](int64_t begin, int64_t end) {
      const Floats tile_packed = new_floats(p.tile_rows() * p.D);
      const Floats z = new_floats(p.tile_rows() * plan.group);
      for (int64_t part = begin; part < end; ++part) {
        float* own = partial.get() + part * part_size;
        if (wants_hidden) std::memset(own, 0, static_cast<size_t>(part_size) * 4);
        for (int64_t i = plan.first_tile(part); i < plan.first_tile(part + 1); ++i) {
          const HeadTile tile = p.load_tile(i, tile_packed.get());
          for (int64_t t = 0; t < count; t += plan.group) {
            const Tokens group{
                std::min(plan.group, count - t), p.D,       packed.get() + t * p.D,
                panels.get() + t * p.k.strip,    p.panel(), tokens.data() + start + t};
            p.k.backward_tile(tile, group, gradients.data() + start + t, z.get(),
                              {wants_hidden ? own + t * p.D : nullptr,
                               wants_head ? to_dw + tile.first * p.D : nullptr,
                               wants_bias ? to_db + tile.first : nullptr, start + t == 0});
          }
        }
      }
    });
    if (wants_hidden) {
      gather_hidden(p, partial.get(), part_size, count,
                    static_cast<float*>(dh.data_ptr()) + start * p.D);
    }
  }
  return {dh, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(saltire, m) {
  m.def(
      "token_stats(Tensor logits, Tensor? labels, Tensor temperature, float softcap, int "
      "ignore_index, int first, int vocabulary) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "token_stats_backward(Tensor logits, Tensor? labels, Tensor temperature, float softcap, int "
      "ignore_index, int first, int vocabulary, Tensor max, Tensor log_sum, Tensor entropy, "
      "Tensor? d_logprob, Tensor? d_entropy, Tensor? d_logsumexp) -> Tensor");
  m.def(
      "linear_token_stats(Tensor hidden, Tensor head, Tensor? bias, Tensor? labels, Tensor "
      "temperature, float softcap, int ignore_index, int first, int vocabulary) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_token_stats_backward(Tensor hidden, Tensor head, Tensor? bias, Tensor? labels, "
      "Tensor temperature, float softcap, int ignore_index, int first, int vocabulary, Tensor max, "
      "Tensor log_sum, Tensor entropy, Tensor? d_logprob, Tensor? d_entropy, Tensor? d_logsumexp, "
      "bool wants_hidden, bool wants_head, bool wants_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(saltire, CPU, m) {
  m.impl("token_stats", TORCH_BOX(&token_stats_cpu));
  m.impl("token_stats_backward", TORCH_BOX(&token_stats_backward_cpu));
  m.impl("linear_token_stats", TORCH_BOX(&linear_token_stats_cpu));
  m.impl("linear_token_stats_backward", TORCH_BOX(&linear_token_stats_backward_cpu));
}

}  // namespace saltire::token_stats
