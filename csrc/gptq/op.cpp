// Registers gptq_round and checks what it gets.
#include "gptq/op.h"

#include <vector>

#include "core/cpu/scratch.h"
#include "core/isa.h"
#include "core/tensor.h"
#include "core/threads.h"

namespace saltire::gptq {
namespace {

Kernel kernel() {
#if defined(SALTIRE_X86)
  switch (current_isa()) {
    case Isa::avx512:
      return avx512_kernel();
    case Isa::avx2:
      return avx2_kernel();
    default:
      break;
  }
#endif
  return ref_kernel();
}

void check_order(const char* op, const int64_t* order, int64_t K) {
  std::vector<bool> seen(static_cast<size_t>(K));
  for (int64_t j = 0; j < K; ++j) {
    const int64_t k = order[j];
    SALTIRE_CHECK(k >= 0 && k < K && !seen[static_cast<size_t>(k)], op, ": order[", j, "] = ", k,
                  "; expected every column of 0..", K - 1, " once.");
    seen[static_cast<size_t>(k)] = true;
  }
}

Tensor gptq_round(Tensor w, Tensor order, Tensor lower, Tensor scale, Tensor zero, int64_t bits) {
  constexpr const char* kOp = "gptq_round";
  SALTIRE_CHECK(bits >= 1 && bits <= 8, kOp, ": bits = ", bits, "; expected 1 to 8.");
  const auto checked = [&](const char* name, const Tensor& t, ScalarType dtype, int64_t dims) {
    check_cpu(kOp, name, t);
    check_dtype(kOp, name, t, dtype);
    check_dim(kOp, name, t, dims);
    return as_contiguous(t);
  };
  const Tensor weights = checked("w", w, ScalarType::Float, 2);
  const int64_t N = w.size(0), K = w.size(1);
  const Tensor columns = checked("order", order, ScalarType::Long, 1);
  check_size(kOp, "order", order, 0, K, "the columns of w");
  const Tensor factor = checked("factor", lower, ScalarType::Float, 2);
  for (int64_t dim = 0; dim < 2; ++dim) {
    check_size(kOp, "factor", lower, dim, K, "the columns of w");
  }
  const Tensor scales = checked("scale", scale, ScalarType::Float, 2);
  check_size(kOp, "scale", scale, 0, N, "the rows of w");
  const int64_t groups = scale.size(1);
  SALTIRE_CHECK(groups >= 1 && K % groups == 0, kOp, ": scale is ", describe(scale), " for K = ", K,
                "; expected a number of groups that divides K.");
  const Tensor zeros = checked("zero", zero, ScalarType::Float, 2);
  check_size(kOp, "zero", zero, 0, N, "the rows of w");
  check_size(kOp, "zero", zero, 1, groups, "the groups of scale");
  const auto* order_data = static_cast<const int64_t*>(columns.const_data_ptr());
  check_order(kOp, order_data, K);
  Tensor codes = new_tensor(w, {N, K}, ScalarType::Byte);
  const Problem problem{N,
                        K,
                        groups,
                        static_cast<const float*>(weights.const_data_ptr()),
                        order_data,
                        static_cast<const float*>(factor.const_data_ptr()),
                        static_cast<const float*>(scales.const_data_ptr()),
                        static_cast<const float*>(zeros.const_data_ptr()),
                        static_cast<float>((1 << bits) - 1),
                        static_cast<uint8_t*>(codes.mutable_data_ptr())};
  const Kernel k = kernel();
  const int64_t slabs = (N + k.outputs - 1) / k.outputs;
  parallel_for(slabs, 1, [&](int64_t begin, int64_t end) {
    float* errors = thread_scratch(static_cast<size_t>(K * k.outputs));
    k.round(problem, begin * k.outputs, end * k.outputs < N ? end * k.outputs : N, errors);
  });
  return codes;
}

}  // namespace
}  // namespace saltire::gptq

STABLE_TORCH_LIBRARY_FRAGMENT(saltire, m) {
  m.def(
      "gptq_round(Tensor w, Tensor order, Tensor lower, Tensor scale, Tensor zero, int bits) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(saltire, CPU, m) {
  m.impl("gptq_round", TORCH_BOX(&saltire::gptq::gptq_round));
}
