// Registers skip_plan_select and checks what it gets.
#include "skip_plan/op.h"

#include <tuple>

#include "core/isa.h"
#include "core/tensor.h"
#include "skip_plan/arguments.h"

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
  check_cpu(kOp, "keep", keep);
  const auto [keep_c, skip_c, truth_c, M, D] = check(kOp, keep, skip, truth);
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
