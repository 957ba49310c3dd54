// The arguments of the room's ops, checked; the same for the CPU and a device.
#pragma once
#include "core/formats.h"
#include "core/tensor.h"
#include "lowbit_gemm/op.h"

namespace saltire::lowbit_gemm {

inline void check_bits(const char* op, int64_t bits) {
  SALTIRE_CHECK(are_weight_bits(bits), op, ": bits = ", bits,
                "; weights have 2, 3, 4 or 8 bits. Choose one of them.");
}

inline void check_group(const char* op, int64_t k, int64_t group, int64_t bits) {
  SALTIRE_CHECK(k >= kKMultiple && k % kKMultiple == 0, op, ": K = ", k, " is not a multiple of ",
                kKMultiple, ". Pad the inputs to K = ", (k / kKMultiple + 1) * kKMultiple,
                " with codes of the zero point.");
  const int64_t most = max_k(static_cast<int>(bits));
  SALTIRE_CHECK(k <= most, op, ": K = ", k, "; sums of products with ", bits,
                "-bit weights are exact only up to K = ", most, ". Split the inputs.");
  SALTIRE_CHECK(group == 0 || (group > 0 && group % kKMultiple == 0 && k % group == 0), op,
                ": group = ", group, " with K = ", k,
                "; expected 0 (per channel) or a multiple of ", kKMultiple, " that divides K.");
}

inline Float table_type(const char* op, const char* name, ScalarType type, const Tensor& t) {
  if (type == ScalarType::Float) return Float::f32;
  SALTIRE_CHECK(type == ScalarType::Half, op, ": ", name, " is ", describe(t),
                "; expected float32 or float16. Convert it with .to(torch.float16).");
  return Float::f16;
}

inline ScalarType scalar_type(Float type) {
  return type == Float::f32   ? ScalarType::Float
         : type == Float::f16 ? ScalarType::Half
                              : ScalarType::BFloat16;
}

inline std::optional<Tensor> contiguous_if_given(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(as_contiguous(*t)) : std::nullopt;
}

inline const float* data_of(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// A weight in the checkpoint layout with its scales and zeros, contiguous.
struct Checkpoint {
  Tensor packed, scale;
  std::optional<Tensor> zero;
  int64_t n, k, group;  // group: K when per channel
  int bits;
  Float table;

  const void* zero_data() const { return zero.has_value() ? zero->const_data_ptr() : nullptr; }
};

inline Checkpoint check_checkpoint(const char* op, const Tensor& packed, const Tensor& scale,
                                   const std::optional<Tensor>& zero, int64_t bits, int64_t group) {
  check_bits(op, bits);
  check_same_device(op, "scale", scale, "packed", packed);
  check_dtype(op, "packed", packed, ScalarType::Byte);
  check_dim(op, "packed", packed, 2);
  check_dim(op, "scale", scale, 2);
  const int64_t n = packed.size(0);
  const int64_t k = packed.size(1) * (8 / container_bits(static_cast<int>(bits)));
  SALTIRE_CHECK(n >= 1, op, ": packed is ", describe(packed), "; N must be at least 1.");
  check_group(op, k, group, bits);
  const int64_t G = group == 0 ? k : group;
  const Float table = table_type(op, "scale", scale.scalar_type(), scale);
  check_size(op, "scale", scale, 0, n, "N");
  check_size(op, "scale", scale, 1, k / G, "K / group");
  if (zero.has_value()) {
    check_same_device(op, "zero", *zero, "packed", packed);
    check_dtype(op, "zero", *zero, scale.scalar_type());
    check_dim(op, "zero", *zero, 2);
    check_size(op, "zero", *zero, 0, n, "N");
    check_size(op, "zero", *zero, 1, k / G, "K / group");
  }
  return {as_contiguous(packed),
          as_contiguous(scale),
          contiguous_if_given(zero),
          n,
          k,
          G,
          static_cast<int>(bits),
          table};
}

// The sizes that the weight is held against, before all else that depends on them.
inline void check_codes(const char* op, const Tensor& codes, int64_t bits, int64_t group,
                        int64_t act_bits) {
  SALTIRE_CHECK(act_bits >= 3 && act_bits <= 8, op, ": act_bits = ", act_bits,
                "; activations have 3 to 8 bits. Choose one of them.");
  check_dtype(op, "codes", codes, ScalarType::Char);
  check_dim(op, "codes", codes, 2);
  check_group(op, codes.size(1), group, bits);
}

// What lowbit_gemm gets beside the weight, contiguous; after check_codes.
struct Operands {
  Tensor codes, x_scale, x_sum;
  std::optional<Tensor> bias, low_rank_x, low_rank_w;
  int64_t m, k, rank;
  int act_bits;
  Float out;
};

inline std::optional<Tensor> check_branch(const char* op, const char* name,
                                          const std::optional<Tensor>& t, int64_t dims,
                                          const Tensor& codes) {
  if (!t.has_value()) return std::nullopt;
  check_same_device(op, name, *t, "codes", codes);
  check_dtype(op, name, *t, ScalarType::Float);
  check_dim(op, name, *t, dims);
  return as_contiguous(*t);
}

inline Operands check_operands(const char* op, const Tensor& codes, const Tensor& x_scale,
                               const Tensor& x_sum, int64_t n, int64_t group, int64_t act_bits,
                               ScalarType out_dtype, const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& low_rank_x,
                               const std::optional<Tensor>& low_rank_w) {
  check_same_device(op, "x_scale", x_scale, "codes", codes);
  check_same_device(op, "x_sum", x_sum, "codes", codes);
  const int64_t m = codes.size(0), k = codes.size(1);
  check_dtype(op, "x_scale", x_scale, ScalarType::Float);
  check_dim(op, "x_scale", x_scale, 1);
  check_size(op, "x_scale", x_scale, 0, m, "M");
  check_dtype(op, "x_sum", x_sum, ScalarType::Int);
  check_dim(op, "x_sum", x_sum, 2);
  check_size(op, "x_sum", x_sum, 0, m, "M");
  check_size(op, "x_sum", x_sum, 1, k / (group == 0 ? k : group), "K / group");
  SALTIRE_CHECK(low_rank_x.has_value() == low_rank_w.has_value(), op,
                ": low_rank_x and low_rank_w must be given together or not at all.");
  const int64_t rank = low_rank_x.has_value() && low_rank_x->dim() == 2 ? low_rank_x->size(1) : 0;
  Operands o = {as_contiguous(codes),
                as_contiguous(x_scale),
                as_contiguous(x_sum),
                check_branch(op, "bias", bias, 1, codes),
                check_branch(op, "low_rank_x", low_rank_x, 2, codes),
                check_branch(op, "low_rank_w", low_rank_w, 2, codes),
                m,
                k,
                rank,
                static_cast<int>(act_bits),
                Float::f32};
  if (o.bias) check_size(op, "bias", *o.bias, 0, n, "N");
  if (o.low_rank_x) {
    check_size(op, "low_rank_x", *o.low_rank_x, 0, m, "M");
    check_size(op, "low_rank_w", *o.low_rank_w, 0, rank, "R, as in low_rank_x");
    check_size(op, "low_rank_w", *o.low_rank_w, 1, n, "N");
  }
  SALTIRE_CHECK(out_dtype == ScalarType::Float || out_dtype == ScalarType::Half ||
                    out_dtype == ScalarType::BFloat16,
                op, ": out_dtype = ", dtype_name(out_dtype),
                "; expected float32, bfloat16 or float16. Choose one of them.");
  o.out = out_dtype == ScalarType::Float  ? Float::f32
          : out_dtype == ScalarType::Half ? Float::f16
                                          : Float::bf16;
  return o;
}

}  // namespace saltire::lowbit_gemm
