// Registers transform_quantize (codes, scale, sums) and transform (floats), and checks what they
// get.
#include "transform_quantize/op.h"

#include <tuple>

#include "core/cpu/scratch.h"
#include "core/formats.h"
#include "core/isa.h"
#include "core/quant_linear.h"
#include "core/threads.h"
#include "transform_quantize/arguments.h"

namespace saltire::transform_quantize {
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

// Tokens a thread takes at least: under some 16K values a second thread costs more than it gives.
int64_t grain(int64_t K) {
  return 1 + 16384 / K;
}

std::tuple<Tensor, Tensor, Tensor> quantize_cpu(Tensor x, int64_t bits, std::optional<Tensor> diag,
                                                int64_t hadamard, std::optional<Tensor> left,
                                                std::optional<Tensor> right, double clip,
                                                int64_t sum_group) {
  constexpr const char* kOp = "transform_quantize";
  check_cpu(kOp, "x", x);
  const Arguments a = check(kOp, x, diag, hadamard, left, right);
  const int64_t K = a.transform.K;
  const Rounding rounding = check_rounding(kOp, K, bits, clip, sum_group);
  const int64_t G = rounding.sum_group;
  Tensor codes = new_tensor(x, {a.M, K}, ScalarType::Char);
  Tensor scale = new_tensor(x, {a.M}, ScalarType::Float);
  Tensor sums = new_tensor(x, {a.M, K / G}, ScalarType::Int);
  const Kernels k = kernels();
  const auto* in = static_cast<const uint8_t*>(a.x.data_ptr());
  const int64_t row_bytes = K * static_cast<int64_t>(a.x.element_size());
  auto* out_codes = static_cast<int8_t*>(codes.data_ptr());
  auto* out_scale = static_cast<float*>(scale.data_ptr());
  auto* out_sums = static_cast<int32_t*>(sums.data_ptr());
  parallel_for(a.M, grain(K), [&](int64_t begin, int64_t end) {
    // The rotated token and two tokens of scratch; all stay in L1 or L2.
    const int64_t stride = (K + 15) / 16 * 16;
    float* y = thread_scratch(static_cast<size_t>(3 * stride));
    for (int64_t m = begin; m < end; ++m) {
      k.transform(a.transform, in + m * row_bytes, a.dtype, y, y + stride);
      k.round(rounding, y, K, out_codes + m * K, out_scale + m, out_sums + m * (K / G));
    }
  });
  return {codes, scale, sums};
}

Tensor transform_cpu(Tensor x, std::optional<Tensor> diag, int64_t hadamard,
                     std::optional<Tensor> left, std::optional<Tensor> right) {
  check_cpu("transform", "x", x);
  const Arguments a = check("transform", x, diag, hadamard, left, right);
  const int64_t K = a.transform.K;
  Tensor y = new_tensor(x, {a.M, K}, ScalarType::Float);
  const Kernels k = kernels();
  const auto* in = static_cast<const uint8_t*>(a.x.data_ptr());
  const int64_t row_bytes = K * static_cast<int64_t>(a.x.element_size());
  auto* out = static_cast<float*>(y.data_ptr());
  parallel_for(a.M, grain(K), [&](int64_t begin, int64_t end) {
    const int64_t stride = (K + 15) / 16 * 16;
    float* scratch = thread_scratch(static_cast<size_t>(2 * stride));
    for (int64_t m = begin; m < end; ++m) {
      k.transform(a.transform, in + m * row_bytes, a.dtype, out + m * K, scratch);
    }
  });
  return y;
}

// For rooms that run whole models.
void quantize_token(const TokenQuantizer& how, const float* x, int8_t* codes, float* scale,
                    int32_t* sums, float* scratch) {
  const int64_t B = how.right != nullptr ? how.right_size : how.hadamard;
  const Transform transform = {how.k, how.k / B, B, how.diag, how.left, how.right, how.hadamard};
  const int Q = max_activation_code(how.act_bits);
  const Rounding rounding = {Q, static_cast<float>(how.clip / Q), how.sum_group};
  const Kernels k = kernels();
  const int64_t stride = (how.k + 15) / 16 * 16;
  k.transform(transform, x, Dtype::f32, scratch, scratch + stride);
  k.round(rounding, scratch, how.k, codes, scale, sums);
}

const bool registered = (quant_kernel_table().quantize_token = quantize_token, true);

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(saltire, m) {
  m.def(
      "transform_quantize(Tensor x, int bits, *, Tensor? diag=None, int hadamard=1, Tensor? "
      "left=None, "
      "Tensor? right=None, float clip=1.0, int sum_group=0) -> (Tensor, Tensor, Tensor)");
  m.def(
      "transform(Tensor x, Tensor? diag=None, int hadamard=1, Tensor? left=None, "
      "Tensor? right=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(saltire, CPU, m) {
  m.impl("transform_quantize", TORCH_BOX(&quantize_cpu));
  m.impl("transform", TORCH_BOX(&transform_cpu));
}

}  // namespace saltire::transform_quantize
