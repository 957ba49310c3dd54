// Registers the room's ops for CUDA tensors.
#include <tuple>

#include "core/cuda/tensor.h"
#include "speculate/arguments.h"
#include "speculate/device.h"

namespace saltire::speculate {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 30;  // 32-bit indices

Tensor matrix(const char* op, const char* name, const Tensor& t) {
  check_dtype(op, name, t, ScalarType::Float);
  check_dim(op, name, t, 2);
  SALTIRE_CHECK(t.size(1) >= 1 && t.size(1) <= kMostTokens, op, ": ", name, " is ", describe(t),
                "; expected a vocabulary of 1 to ", kMostTokens, " tokens.");
  return as_contiguous(t);
}

Tensor integers(const char* op, const char* name, const Tensor& t, int64_t count,
                const Tensor& like) {
  check_same_device(op, name, t, "p", like);
  check_dtype(op, name, t, ScalarType::Long);
  check_dim(op, name, t, 1);
  check_size(op, name, t, 0, count, "one a row");
  return as_contiguous(t);
}

const float* floats_of(const Tensor& t) {
  return static_cast<const float*>(t.const_data_ptr());
}
const int64_t* integers_of(const Tensor& t) {
  return static_cast<const int64_t*>(t.const_data_ptr());
}
int64_t* results_of(Tensor& t) {
  return static_cast<int64_t*>(t.mutable_data_ptr());
}

Tensor warp_logits_cuda(Tensor logits, double temperature, int64_t top_k, double top_p,
                        double min_p) {
  constexpr const char* kOp = "warp_logits";
  const Tensor in = matrix(kOp, "logits", logits);
  const Warp how = check_warp(kOp, temperature, top_k, top_p, min_p);
  Tensor out = new_tensor(in, {in.size(0), in.size(1)}, ScalarType::Float);
  WarpProblem p;
  p.M = in.size(0);
  p.V = in.size(1);
  p.logits = floats_of(in);
  p.p = static_cast<float*>(out.mutable_data_ptr());
  p.warp = how;
  const cuda::Place place(in);
  warp(p, place.device, place.stream);
  return out;
}

Tensor draw_tokens_cuda(Tensor p, Tensor sequences, Tensor positions, int64_t seed, bool is_draft) {
  constexpr const char* kOp = "draw_tokens";
  const Tensor in = matrix(kOp, "p", p);
  const int64_t M = in.size(0);
  const Tensor s = integers(kOp, "sequences", sequences, M, p);
  const Tensor at = integers(kOp, "positions", positions, M, p);
  Tensor out = new_tensor(in, {M}, ScalarType::Long);
  DrawProblem problem;
  problem.M = M;
  problem.V = in.size(1);
  problem.p = floats_of(in);
  problem.sequences = integers_of(s);
  problem.positions = integers_of(at);
  problem.seed = static_cast<uint64_t>(seed);
  problem.draft = is_draft;
  problem.tokens = results_of(out);
  const cuda::Place place(in);
  draw(problem, place.stream);
  return out;
}

std::tuple<Tensor, Tensor> speculate_verify_cuda(Tensor p, std::optional<Tensor> q, Tensor drafts,
                                                 Tensor counts, Tensor sequences, Tensor positions,
                                                 int64_t seed) {
  constexpr const char* kOp = "speculate_verify";
  const Tensor target = matrix(kOp, "p", p);
  check_dim(kOp, "counts", counts, 1);
  check_dim(kOp, "drafts", drafts, 1);
  const int64_t B = counts.size(0), S = drafts.size(0);
  check_size(kOp, "p", target, 0, S + B, "all drafts and one more a sequence");
  const Tensor n = integers(kOp, "counts", counts, B, p);
  const Tensor s = integers(kOp, "sequences", sequences, B, p);
  const Tensor at = integers(kOp, "positions", positions, B, p);
  const Tensor x = integers(kOp, "drafts", drafts, S, p);
  std::optional<Tensor> draft;
  if (q.has_value()) {
    check_same_device(kOp, "q", *q, "p", p);
    draft = matrix(kOp, "q", *q);
    check_size(kOp, "q", *draft, 0, S, "one row a draft");
    check_size(kOp, "q", *draft, 1, target.size(1), "V, the target's vocabulary");
  }
  Tensor accepted = new_tensor(p, {B}, ScalarType::Long);
  Tensor next = new_tensor(p, {B}, ScalarType::Long);
  VerifyProblem problem;
  problem.B = B;
  problem.S = S;
  problem.V = target.size(1);
  problem.p = floats_of(target);
  problem.q = draft ? floats_of(*draft) : nullptr;
  problem.drafts = integers_of(x);
  problem.counts = integers_of(n);
  problem.sequences = integers_of(s);
  problem.positions = integers_of(at);
  problem.seed = static_cast<uint64_t>(seed);
  problem.accepted = results_of(accepted);
  problem.next = results_of(next);
  const cuda::Place place(target);
  verify(problem, place.stream);
  return {accepted, next};
}

}  // namespace
}  // namespace saltire::speculate

STABLE_TORCH_LIBRARY_IMPL(saltire, CUDA, m) {
  using namespace saltire::speculate;
  m.impl("warp_logits", TORCH_BOX(&warp_logits_cuda));
  m.impl("draw_tokens", TORCH_BOX(&draw_tokens_cuda));
  m.impl("speculate_verify", TORCH_BOX(&speculate_verify_cuda));
}
