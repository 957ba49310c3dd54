// Registers skip_plan_select for CUDA tensors.
#include <tuple>

#include "core/cuda/tensor.h"
#include "skip_plan/arguments.h"
#include "skip_plan/device.h"

namespace saltire::skip_plan {
namespace {

std::tuple<Tensor, Tensor, Tensor> skip_plan_select_cuda(Tensor keep, Tensor skip, Tensor truth) {
  const Arguments a = check("skip_plan_select", keep, skip, truth);
  Tensor chosen = new_tensor(keep, {a.M, a.D}, ScalarType::Float);
  Tensor kept = new_tensor(keep, {a.M}, ScalarType::Byte);
  Tensor cosine = new_tensor(keep, {a.M}, ScalarType::Float);
  DeviceProblem p;
  p.M = a.M;
  p.D = a.D;
  p.keep = static_cast<const float*>(a.keep.const_data_ptr());
  p.skip = static_cast<const float*>(a.skip.const_data_ptr());
  p.truth = static_cast<const float*>(a.truth.const_data_ptr());
  p.chosen = static_cast<float*>(chosen.mutable_data_ptr());
  p.kept = static_cast<uint8_t*>(kept.mutable_data_ptr());
  p.cosine = static_cast<float*>(cosine.mutable_data_ptr());
  const cuda::Place place(keep);
  select(p, place.stream);
  return {chosen, kept, cosine};
}

}  // namespace
}  // namespace saltire::skip_plan

STABLE_TORCH_LIBRARY_IMPL(saltire, CUDA, m) {
  m.impl("skip_plan_select", TORCH_BOX(&saltire::skip_plan::skip_plan_select_cuda));
}
