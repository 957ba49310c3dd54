// Registers warp_logits, draw_tokens and speculate_verify, and checks what they get.
#include "speculate/op.h"

#include <tuple>
#include <vector>

#include "core/isa.h"
#include "core/tensor.h"
#include "core/threads.h"
#include "speculate/arguments.h"
#include "speculate/draw.h"
#include "speculate/warp.h"

namespace saltire::speculate {
namespace {

Kernels kernels() {
#if defined(SALTIRE_X86)
  switch (current_isa()) {
    case Isa::avx512:
      return avx512_kernels();
    case Isa::avx2:
      return avx2_kernels();
    default:
      break;
  }
#endif
  return ref_kernels();
}

void check_matrix(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, ScalarType::Float);
  check_dim(op, name, t, 2);
  SALTIRE_CHECK(t.size(1) >= 1, op, ": ", name, " is ", describe(t),
                "; the vocabulary is empty, expected at least one token.");
}

std::vector<int64_t> read_integers(const char* op, const char* name, const Tensor& t,
                                   int64_t count) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, ScalarType::Long);
  check_dim(op, name, t, 1);
  check_size(op, name, t, 0, count, "one a row");
  const Tensor c = as_contiguous(t);
  const auto* data = static_cast<const int64_t*>(c.const_data_ptr());
  return {data, data + count};
}

Tensor warp_logits(Tensor logits, double temperature, int64_t top_k, double top_p, double min_p) {
  constexpr const char* kOp = "warp_logits";
  check_matrix(kOp, "logits", logits);
  const Warp warp = check_warp(kOp, temperature, top_k, top_p, min_p);
  const int64_t M = logits.size(0), V = logits.size(1);
  const Tensor in = as_contiguous(logits);
  Tensor out = new_tensor(logits, {M, V}, ScalarType::Float);
  const Kernels k = kernels();
  const auto* from = static_cast<const float*>(in.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  std::vector<unsigned char> good(static_cast<size_t>(M));
  parallel_for(M, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      good[static_cast<size_t>(m)] = warp_row(k, warp, from + m * V, V, to + m * V);
    }
  });
  for (int64_t m = 0; m < M; ++m) {
    SALTIRE_CHECK(
        good[static_cast<size_t>(m)] != 0, kOp, ": row ", m,
        " of logits is all -inf or holds inf or NaN; there is no token to draw. Check the "
        "mask and the model.");
  }
  return out;
}

Tensor draw_tokens(Tensor p, Tensor sequences, Tensor positions, int64_t seed, bool draft) {
  constexpr const char* kOp = "draw_tokens";
  check_matrix(kOp, "p", p);
  const int64_t M = p.size(0), V = p.size(1);
  const std::vector<int64_t> s = read_integers(kOp, "sequences", sequences, M),
                             at = read_integers(kOp, "positions", positions, M);
  const Tensor in = as_contiguous(p);
  Tensor out = new_tensor(p, {M}, ScalarType::Long);
  const auto* from = static_cast<const float*>(in.const_data_ptr());
  auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
  parallel_for(M, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const auto i = static_cast<size_t>(m);
      const double u =
          uniform(static_cast<uint64_t>(seed), static_cast<uint64_t>(s[i]),
                  static_cast<uint64_t>(at[i]), draft ? Purpose::draft : Purpose::plain);
      const float* row = from + m * V;
      to[m] = draw(V, u, [&](int64_t v) { return static_cast<double>(row[v]); });
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> speculate_verify(Tensor p, std::optional<Tensor> q, Tensor drafts,
                                            Tensor counts, Tensor sequences, Tensor positions,
                                            int64_t seed) {
  constexpr const char* kOp = "speculate_verify";
  check_matrix(kOp, "p", p);
  check_dim(kOp, "counts", counts, 1);
  const int64_t B = counts.size(0), V = p.size(1);
  const std::vector<int64_t> n = read_integers(kOp, "counts", counts, B),
                             s = read_integers(kOp, "sequences", sequences, B),
                             at = read_integers(kOp, "positions", positions, B);
  int64_t S = 0;
  for (const int64_t count : n) {
    SALTIRE_CHECK(count >= 0, kOp, ": counts holds ", count, "; expected 0 or more.");
    S += count;
  }
  check_size(kOp, "p", p, 0, S + B, "all drafts and one more a sequence");
  const std::vector<int64_t> x = read_integers(kOp, "drafts", drafts, S);
  for (const int64_t token : x) {
    SALTIRE_CHECK(token >= 0 && token < V, kOp, ": drafts holds token ", token,
                  "; the target's vocabulary has ", V,
                  ". Draft and target must have the same vocabulary.");
  }
  const Tensor p_c = as_contiguous(p);
  std::optional<Tensor> q_c;
  if (q.has_value()) {
    check_matrix(kOp, "q", *q);
    check_size(kOp, "q", *q, 0, S, "one row a draft");
    check_size(kOp, "q", *q, 1, V, "V, the target's vocabulary");
    q_c = as_contiguous(*q);
  }
  const auto* target = static_cast<const float*>(p_c.const_data_ptr());
  const float* draft = q_c ? static_cast<const float*>(q_c->const_data_ptr()) : nullptr;
  Tensor accepted = new_tensor(p, {B}, ScalarType::Long);
  Tensor next = new_tensor(p, {B}, ScalarType::Long);
  int64_t row = 0;
  for (int64_t b = 0; b < B; ++b) {
    const auto i = static_cast<size_t>(b);
    const Outcome outcome =
        verify(target + (row + b) * V, draft ? draft + row * V : nullptr, x.data() + row, n[i], V,
               static_cast<uint64_t>(seed), static_cast<uint64_t>(s[i]), at[i]);
    static_cast<int64_t*>(accepted.mutable_data_ptr())[b] = outcome.accepted;
    static_cast<int64_t*>(next.mutable_data_ptr())[b] = outcome.next;
    row += n[i];
  }
  return {accepted, next};
}

}  // namespace
}  // namespace saltire::speculate

STABLE_TORCH_LIBRARY_FRAGMENT(saltire, m) {
  m.def(
      "warp_logits(Tensor logits, float temperature, int top_k, float top_p, float min_p) -> "
      "Tensor");
  m.def(
      "draw_tokens(Tensor p, Tensor sequences, Tensor positions, int seed, bool draft) -> Tensor");
  m.def(
      "speculate_verify(Tensor p, Tensor? q, Tensor drafts, Tensor counts, Tensor sequences, "
      "Tensor "
      "positions, int seed) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(saltire, CPU, m) {
  using namespace saltire::speculate;
  m.impl("warp_logits", TORCH_BOX(&warp_logits));
  m.impl("draw_tokens", TORCH_BOX(&draw_tokens));
  m.impl("speculate_verify", TORCH_BOX(&speculate_verify));
}
