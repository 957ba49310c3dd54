// Registers transform_quantize (codes, scale, sums) and transform (floats), and checks what they
// get.
#include "transform_quantize/op.h"

#include <tuple>

#include "core/cpu/scratch.h"
#include "core/formats.h"
#include "core/isa.h"
#include "core/tensor.h"
#include "core/threads.h"

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

Dtype input_dtype(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      fail(op, ": x is ", describe(x), "; expected float32, bfloat16 or float16.");
  }
}

// Checked and contiguous arguments; keeps the tensors alive while the kernels hold their pointers.
struct Arguments {
  Tensor x;
  std::optional<Tensor> diag, left, right;
  Transform transform;
  Dtype dtype;
  int64_t M;
};

std::optional<Tensor> factor(const char* op, const char* name, const std::optional<Tensor>& t,
                             int64_t dims) {
  if (!t.has_value()) return std::nullopt;
  check_cpu(op, name, *t);
  check_dtype(op, name, *t, ScalarType::Float);
  check_dim(op, name, *t, dims);
  return as_contiguous(*t);
}

const float* pointer(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const float*>(t->data_ptr()) : nullptr;
}

Arguments check(const char* op, const Tensor& x, const std::optional<Tensor>& diag,
                int64_t hadamard, const std::optional<Tensor>& left,
                const std::optional<Tensor>& right) {
  check_dim(op, "x", x, 2);
  check_cpu(op, "x", x);
  Arguments a;
  a.dtype = input_dtype(op, x);
  a.x = as_contiguous(x);
  a.diag = factor(op, "diag", diag, 1);
  a.left = factor(op, "left", left, 2);
  a.right = factor(op, "right", right, 2);
  a.M = x.size(0);
  const int64_t K = x.size(1);
  SALTIRE_CHECK(K > 0, op, ": x is ", describe(x), "; expected K >= 1.");
  if (a.diag) check_size(op, "diag", *a.diag, 0, K, "K");
  SALTIRE_CHECK(hadamard >= 1 && (hadamard & (hadamard - 1)) == 0 && K % hadamard == 0, op,
                ": hadamard = ", hadamard, "; expected a power of two that divides K = ", K,
                " (1 for no Hadamard).");
  int64_t B = hadamard;
  if (a.right) {
    SALTIRE_CHECK(hadamard == 1, op, ": hadamard = ", hadamard,
                  " and right are both given; they take the same place. Leave one out.");
    B = a.right->size(0);
    check_size(op, "right", *a.right, 1, B, "square");
    SALTIRE_CHECK(B > 0 && K % B == 0, op, ": right is ", describe(*a.right),
                  "; expected [B, B] with B dividing K = ", K, ".");
  }
  const int64_t A = K / B;
  if (a.left) {
    check_size(op, "left", *a.left, 0, A, "K / block");
    check_size(op, "left", *a.left, 1, A, "K / block");
  }
  a.transform = {K, A, B, pointer(a.diag), pointer(a.left), pointer(a.right), hadamard};
  return a;
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
  const Arguments a = check(kOp, x, diag, hadamard, left, right);
  const int64_t K = a.transform.K;
  SALTIRE_CHECK(bits == 3 || bits == 4 || bits == 8, kOp, ": bits = ", bits,
                "; expected 3, 4 or 8.");
  SALTIRE_CHECK(clip > 0.0 && clip <= 1.0, kOp, ": clip = ", clip, "; expected a ratio in (0, 1].");
  const int64_t G = sum_group == 0 ? K : sum_group;
  SALTIRE_CHECK(G > 0 && K % G == 0, kOp, ": sum_group = ", sum_group,
                "; expected a divisor of K = ", K, " (0 for one sum over K).");
  Tensor codes = new_tensor(x, {a.M, K}, ScalarType::Char);
  Tensor scale = new_tensor(x, {a.M}, ScalarType::Float);
  Tensor sums = new_tensor(x, {a.M, K / G}, ScalarType::Int);
  const int Q = max_activation_code(static_cast<int>(bits));
  const Rounding rounding{Q, static_cast<float>(clip / Q), G};
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
