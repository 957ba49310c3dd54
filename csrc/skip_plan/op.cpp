// Registers skip_plan_select and checks what it gets.
#include "skip_plan/op.h"

#include <tuple>

#include "core/isa.h"
#include "core/tensor.h"

namespace saltire::skip_plan {
namespace {

Select select() {
#if defined(SALTIRE_X86)
  switch (current_isa()) {
    case Isa::avx512:
      return avx512_select();
    case Isa::avx2:
      return avx2_select();
    default:
      break;
  }
#endif
  return ref_select();
}

std::tuple<Tensor, Tensor, Tensor> skip_plan_select(Tensor keep, Tensor skip, Tensor truth) {
  constexpr const char* kOp = "skip_plan_select";
  check_dim(kOp, "keep", keep, 2);
  check_dim(kOp, "skip", skip, 2);
  check_dim(kOp, "truth", truth, 1);
  const int64_t M = keep.size(0), D = keep.size(1);
  check_size(kOp, "skip", skip, 0, M, "the rows of keep");
  check_size(kOp, "skip", skip, 1, D, "D");
  check_size(kOp, "truth", truth, 0, D, "D");
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor*>{"keep", &keep}, {"skip", &skip}, {"truth", &truth}}) {
    check_cpu(kOp, name, *t);
    check_dtype(kOp, name, *t, ScalarType::Float);
  }
  const Tensor keep_c = as_contiguous(keep), skip_c = as_contiguous(skip),
               truth_c = as_contiguous(truth);
  Tensor chosen = new_tensor(keep, {M, D}, ScalarType::Float);
  Tensor kept = new_tensor(keep, {M}, ScalarType::Byte);
  Tensor cosine = new_tensor(keep, {M}, ScalarType::Float);
  const Select row = select();
  for (int64_t m = 0; m < M; ++m) {
    const Choice choice = row(static_cast<const float*>(keep_c.const_data_ptr()) + m * D,
                              static_cast<const float*>(skip_c.const_data_ptr()) + m * D,
                              static_cast<const float*>(truth_c.const_data_ptr()), D,
                              static_cast<float*>(chosen.mutable_data_ptr()) + m * D);
    static_cast<uint8_t*>(kept.mutable_data_ptr())[m] = choice.kept ? 1 : 0;
    static_cast<float*>(cosine.mutable_data_ptr())[m] = choice.cosine;
  }
  return {chosen, kept, cosine};
}

}  // namespace
}  // namespace saltire::skip_plan

STABLE_TORCH_LIBRARY_FRAGMENT(saltire, m) {
  m.def("skip_plan_select(Tensor keep, Tensor skip, Tensor truth) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(saltire, CPU, m) {
  m.impl("skip_plan_select", TORCH_BOX(&saltire::skip_plan::skip_plan_select));
}
