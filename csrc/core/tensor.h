// What op.cpp files share: names for torch's stable types and the checks every op makes.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

#include "core/check.h"

namespace saltire {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// "float32 [4, 64]"
inline std::string describe(const Tensor& t) {
  std::ostringstream out;
  out << dtype_name(t.scalar_type()) << " [";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i > 0 ? ", " : "") << t.size(i);
  out << "]";
  return out.str();
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType want) {
  SALTIRE_CHECK(t.scalar_type() == want, op, ": ", name, " is ", describe(t), "; expected ",
                dtype_name(want), ". Convert it with .to(torch.", dtype_name(want), ").");
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t want) {
  SALTIRE_CHECK(t.dim() == want, op, ": ", name, " is ", describe(t), "; expected ", want,
                " dimensions.");
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t dim, int64_t want,
                       const char* meaning) {
  SALTIRE_CHECK(t.size(dim) == want, op, ": ", name, " is ", describe(t), "; expected dimension ",
                dim, " to be ", want, " (", meaning, ").");
}

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  SALTIRE_CHECK(t.is_cpu(), op, ": ", name,
                " is not on the CPU, but the other arguments are. Move it with .cpu().");
}

// The dispatcher looks at one argument only; the others may lie elsewhere.
inline void check_same_device(const char* op, const char* name, const Tensor& t,
                              const char* like_name, const Tensor& like) {
  const bool same = t.is_cpu() == like.is_cpu() && t.is_cuda() == like.is_cuda() &&
                    t.get_device_index() == like.get_device_index();
  SALTIRE_CHECK(same, op, ": ", name, " and ", like_name,
                " are on different devices. Move one with .to(", like_name, ".device).");
}

// Kernels walk memory in order; a view is copied once here, which costs less than striding.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A new CPU tensor of another dtype and shape than anything at hand.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes,
                         ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

}  // namespace saltire
