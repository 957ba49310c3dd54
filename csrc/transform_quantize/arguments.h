// The arguments of the room's ops, checked; the same for the CPU and a device.
#pragma once
#include "core/formats.h"
#include "core/tensor.h"
#include "transform_quantize/op.h"

namespace saltire::transform_quantize {

inline Dtype input_dtype(const char* op, const Tensor& x) {
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

inline std::optional<Tensor> factor(const char* op, const char* name,
                                    const std::optional<Tensor>& t, int64_t dims, const Tensor& x) {
  if (!t.has_value()) return std::nullopt;
  check_same_device(op, name, *t, "x", x);
  check_dtype(op, name, *t, ScalarType::Float);
  check_dim(op, name, *t, dims);
  return as_contiguous(*t);
}

inline const float* pointer(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const float*>(t->data_ptr()) : nullptr;
}

inline Arguments check(const char* op, const Tensor& x, const std::optional<Tensor>& diag,
                       int64_t hadamard, const std::optional<Tensor>& left,
                       const std::optional<Tensor>& right) {
  check_dim(op, "x", x, 2);
  Arguments a;
  a.dtype = input_dtype(op, x);
  a.x = as_contiguous(x);
  a.diag = factor(op, "diag", diag, 1, x);
  a.left = factor(op, "left", left, 2, x);
  a.right = factor(op, "right", right, 2, x);
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

inline Rounding check_rounding(const char* op, int64_t K, int64_t bits, double clip,
                               int64_t sum_group) {
  SALTIRE_CHECK(bits == 3 || bits == 4 || bits == 8, op, ": bits = ", bits,
                "; expected 3, 4 or 8.");
  SALTIRE_CHECK(clip > 0.0 && clip <= 1.0, op, ": clip = ", clip, "; expected a ratio in (0, 1].");
  const int64_t G = sum_group == 0 ? K : sum_group;
  SALTIRE_CHECK(G > 0 && K % G == 0, op, ": sum_group = ", sum_group,
                "; expected a divisor of K = ", K, " (0 for one sum over K).");
  const int Q = max_activation_code(static_cast<int>(bits));
  return {Q, static_cast<float>(clip / Q), G};
}

}  // namespace saltire::transform_quantize
