// Registers transform_quantize and transform for CUDA tensors.
#include <tuple>

#include "core/cuda/tensor.h"
#include "transform_quantize/arguments.h"
#include "transform_quantize/device.h"

namespace saltire::transform_quantize {
namespace {

DeviceProblem problem(const Arguments& a) {
  DeviceProblem p;
  p.M = a.M;
  p.transform = a.transform;
  p.dtype = a.dtype;
  p.x = a.x.data_ptr();
  return p;
}

std::tuple<Tensor, Tensor, Tensor> quantize_cuda(Tensor x, int64_t bits, std::optional<Tensor> diag,
                                                 int64_t hadamard, std::optional<Tensor> left,
                                                 std::optional<Tensor> right, double clip,
                                                 int64_t sum_group) {
  constexpr const char* kOp = "transform_quantize";
  const Arguments a = check(kOp, x, diag, hadamard, left, right);
  const int64_t K = a.transform.K;
  DeviceProblem p = problem(a);
  p.rounding = check_rounding(kOp, K, bits, clip, sum_group);
  Tensor codes = new_tensor(x, {a.M, K}, ScalarType::Char);
  Tensor scale = new_tensor(x, {a.M}, ScalarType::Float);
  Tensor sums = new_tensor(x, {a.M, K / p.rounding.sum_group}, ScalarType::Int);
  p.codes = static_cast<int8_t*>(codes.data_ptr());
  p.scale = static_cast<float*>(scale.data_ptr());
  p.sums = static_cast<int32_t*>(sums.data_ptr());
  const cuda::Place place(x);
  run(p, place.device, place.stream);
  return {codes, scale, sums};
}

Tensor transform_cuda(Tensor x, std::optional<Tensor> diag, int64_t hadamard,
                      std::optional<Tensor> left, std::optional<Tensor> right) {
  const Arguments a = check("transform", x, diag, hadamard, left, right);
  DeviceProblem p = problem(a);
  Tensor y = new_tensor(x, {a.M, a.transform.K}, ScalarType::Float);
  p.y = static_cast<float*>(y.data_ptr());
  const cuda::Place place(x);
  run(p, place.device, place.stream);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saltire, CUDA, m) {
  m.impl("transform_quantize", TORCH_BOX(&quantize_cuda));
  m.impl("transform", TORCH_BOX(&transform_cuda));
}

}  // namespace saltire::transform_quantize
