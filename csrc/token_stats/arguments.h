// What every op of the room checks, and how tensors become the kernels' arguments.
#pragma once
#include <cmath>
#include <vector>

#include "core/isa.h"
#include "core/tensor.h"
#include "token_stats/op.h"

namespace saltire::token_stats {

inline Kernels kernels() {
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

inline Dtype float_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      fail(op, ": ", name, " is ", describe(t), "; expected float32, bfloat16 or float16.");
  }
}

// A contiguous f32 [M] or null.
inline const float* optional_floats(const char* op, const char* name,
                                    const std::optional<Tensor>& t, int64_t M, Tensor* keep) {
  if (!t.has_value()) return nullptr;
  check_cpu(op, name, *t);
  check_dtype(op, name, *t, ScalarType::Float);
  check_dim(op, name, *t, 1);
  check_size(op, name, *t, 0, M, "tokens");
  *keep = as_contiguous(*t);
  return static_cast<const float*>(keep->data_ptr());
}

struct Labels {
  int64_t ignore_index;  // a label of this value marks a token to leave out
  int64_t first;         // vocabulary index of this part's first row
  int64_t vocabulary;    // of all parts; 0: this part is all
};

inline std::vector<Token> make_tokens(const char* op, int64_t M, int64_t V,
                                      const std::optional<Tensor>& labels,
                                      const Tensor& temperature, const Labels& how) {
  SALTIRE_CHECK(V > 0, op, ": the vocabulary is empty; expected at least one logit a token.");
  check_cpu(op, "temperature", temperature);
  check_dtype(op, "temperature", temperature, ScalarType::Float);
  check_dim(op, "temperature", temperature, 1);
  const int64_t temperatures = temperature.size(0);
  SALTIRE_CHECK(temperatures == 1 || temperatures == M, op, ": temperature is ",
                describe(temperature), "; expected one number, or one for each of ", M, " tokens.");
  const Tensor t = as_contiguous(temperature);
  const auto* value = static_cast<const float*>(t.data_ptr());
  std::vector<Token> tokens(static_cast<size_t>(M));
  for (int64_t m = 0; m < M; ++m) {
    const float own = value[temperatures == 1 ? 0 : m];
    SALTIRE_CHECK(std::isfinite(own) && own > 0, op, ": temperature[", temperatures == 1 ? 0 : m,
                  "] is ", own, "; it must be finite and above 0.");
    tokens[static_cast<size_t>(m)].inverse_temperature = 1.0f / own;
  }
  if (!labels.has_value()) return tokens;
  check_cpu(op, "labels", *labels);
  check_dtype(op, "labels", *labels, ScalarType::Long);
  check_dim(op, "labels", *labels, 1);
  check_size(op, "labels", *labels, 0, M, "tokens");
  const Tensor l = as_contiguous(*labels);
  const auto* label = static_cast<const int64_t*>(l.data_ptr());
  const int64_t all = how.vocabulary > 0 ? how.vocabulary : V;
  SALTIRE_CHECK(how.first >= 0 && how.first + V <= all, op, ": this part holds rows ", how.first,
                " to ", how.first + V, " of a vocabulary of ", all,
                ". Correct first or vocabulary.");
  for (int64_t m = 0; m < M; ++m) {
    Token& token = tokens[static_cast<size_t>(m)];
    if (label[m] == how.ignore_index) {
      token.ignored = true;
      continue;
    }
    SALTIRE_CHECK(label[m] >= 0 && label[m] < all, op, ": labels[", m, "] is ", label[m],
                  ", outside the vocabulary of ", all, ". Use ignore_index = ", how.ignore_index,
                  " for tokens that have no label.");
    const int64_t own = label[m] - how.first;
    token.label = own >= 0 && own < V ? own : -1;
  }
  return tokens;
}

// The saved statistics and the gradients, one struct a token.
inline std::vector<Gradient> make_gradients(const char* op, int64_t M, const Tensor& max,
                                            const Tensor& log_sum, const Tensor& entropy,
                                            const std::optional<Tensor>& d_logprob,
                                            const std::optional<Tensor>& d_entropy,
                                            const std::optional<Tensor>& d_lse) {
  Tensor keep[6];
  const float* a = optional_floats(op, "max", max, M, &keep[0]);
  const float* b = optional_floats(op, "log_sum", log_sum, M, &keep[1]);
  const float* c = optional_floats(op, "entropy", entropy, M, &keep[2]);
  const float* d = optional_floats(op, "d_logprob", d_logprob, M, &keep[3]);
  const float* e = optional_floats(op, "d_entropy", d_entropy, M, &keep[4]);
  const float* f = optional_floats(op, "d_logsumexp", d_lse, M, &keep[5]);
  std::vector<Gradient> gradients(static_cast<size_t>(M));
  for (int64_t m = 0; m < M; ++m) {
    gradients[static_cast<size_t>(m)] = {a[m],
                                         b[m],
                                         c[m],
                                         d != nullptr ? d[m] : 0.0f,
                                         e != nullptr ? e[m] : 0.0f,
                                         f != nullptr ? f[m] : 0.0f};
  }
  return gradients;
}

}  // namespace saltire::token_stats
