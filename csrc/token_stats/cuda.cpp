// Registers the room's ops for CUDA tensors.
#include <tuple>

#include "core/cuda/tensor.h"
#include "token_stats/arguments.h"
#include "token_stats/device.h"

namespace saltire::token_stats {
namespace {

using Maybe = std::optional<Tensor>;
using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What holds the tokens, and its name: all other tensors must lie beside it.
struct Input {
  const Tensor& tensor;
  const char* name;
};

// A contiguous tensor of one dimension beside `like`, or none.
Maybe vector(const char* op, const char* name, const Maybe& t, ScalarType dtype, int64_t count,
             const char* meaning, const Input& like) {
  if (!t.has_value()) return std::nullopt;
  check_same_device(op, name, *t, like.name, like.tensor);
  check_dtype(op, name, *t, dtype);
  check_dim(op, name, *t, 1);
  check_size(op, name, *t, 0, count, meaning);
  return as_contiguous(*t);
}

template <typename T>
const T* data_of(const Maybe& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

float* floats_of(Tensor& t) {
  return static_cast<float*>(t.mutable_data_ptr());
}

// The tensors that DeviceTokens points into, kept.
struct TokenArguments {
  DeviceTokens tokens;
  Maybe labels, temperature;

  TokenArguments(const char* op, const Input& like, int64_t V, const Maybe& labels_,
                 const Tensor& temperature_, double softcap, const Labels& how) {
    const int64_t M = like.tensor.size(0);
    SALTIRE_CHECK(V > 0, op, ": the vocabulary is empty; expected at least one logit a token.");
    SALTIRE_CHECK(std::isfinite(softcap) && softcap >= 0, op, ": softcap is ", softcap,
                  "; expected a number above 0, or 0 for none.");
    check_dim(op, "temperature", temperature_, 1);
    const int64_t count = temperature_.size(0);
    SALTIRE_CHECK(count == 1 || count == M, op, ": temperature is ", describe(temperature_),
                  "; expected one number, or one for each of ", M, " tokens.");
    temperature = vector(op, "temperature", temperature_, ScalarType::Float, count, "tokens", like);
    labels = vector(op, "labels", labels_, ScalarType::Long, M, "tokens", like);
    const int64_t all = how.vocabulary > 0 ? how.vocabulary : V;
    SALTIRE_CHECK(!labels || (how.first >= 0 && how.first + V <= all), op,
                  ": this part holds rows ", how.first, " to ", how.first + V,
                  " of a vocabulary of ", all, ". Correct first or vocabulary.");
    tokens.M = M;
    tokens.labels = data_of<int64_t>(labels);
    tokens.temperature = data_of<float>(temperature);
    tokens.own_temperature = count == M;
    tokens.ignore_index = how.ignore_index;
    tokens.first = how.first;
    tokens.vocabulary = how.vocabulary;
    tokens.softcap = static_cast<float>(softcap);
  }
};

struct GradientArguments {
  DeviceGradients gradients;
  Maybe keep[6];

  GradientArguments(const char* op, const Input& like, const Tensor& max, const Tensor& log_sum,
                    const Tensor& entropy, const Maybe& d_logprob, const Maybe& d_entropy,
                    const Maybe& d_lse) {
    const Maybe given[6] = {max, log_sum, entropy, d_logprob, d_entropy, d_lse};
    const char* const names[6] = {"max",       "log_sum",   "entropy",
                                  "d_logprob", "d_entropy", "d_logsumexp"};
    for (int i = 0; i < 6; ++i) {
      keep[i] =
          vector(op, names[i], given[i], ScalarType::Float, like.tensor.size(0), "tokens", like);
    }
    gradients = {data_of<float>(keep[0]), data_of<float>(keep[1]), data_of<float>(keep[2]),
                 data_of<float>(keep[3]), data_of<float>(keep[4]), data_of<float>(keep[5])};
  }
};

struct Outputs {
  Tensor floats[5];
  Tensor argmax;

  Outputs(const Tensor& like, int64_t M) {
    for (Tensor& t : floats) t = new_tensor(like, {M}, ScalarType::Float);
    argmax = new_tensor(like, {M}, ScalarType::Long);
  }
  DeviceStats pointers() {
    return {floats_of(floats[0]), floats_of(floats[1]),
            floats_of(floats[2]), floats_of(floats[3]),
            floats_of(floats[4]), static_cast<int64_t*>(argmax.mutable_data_ptr())};
  }
  Stats stats() const { return {floats[0], floats[1], floats[2], floats[3], floats[4], argmax}; }
};

// --- from logits --------------------------------------------------------------------------------

RowsProblem rows_problem(const char* op, const Tensor& logits, const Tensor& x,
                         const DeviceTokens& tokens) {
  RowsProblem p;
  p.tokens = tokens;
  p.x = x.const_data_ptr();
  p.dtype = float_dtype(op, "logits", logits);
  p.V = x.size(1);
  return p;
}

Stats token_stats_cuda(Tensor logits, Maybe labels, Tensor temperature, double softcap,
                       int64_t ignore_index, int64_t first, int64_t vocabulary) {
  constexpr const char* kOp = "token_stats";
  check_dim(kOp, "logits", logits, 2);
  const TokenArguments a(kOp, {logits, "logits"}, logits.size(1), labels, temperature, softcap,
                         {ignore_index, first, vocabulary});
  const Tensor x = as_contiguous(logits);
  const RowsProblem p = rows_problem(kOp, logits, x, a.tokens);
  Outputs out(x, a.tokens.M);
  const cuda::Place place(x);
  stats_of_logits(p, out.pointers(), place.stream);
  return out.stats();
}

Tensor token_stats_backward_cuda(Tensor logits, Maybe labels, Tensor temperature, double softcap,
                                 int64_t ignore_index, int64_t first, int64_t vocabulary,
                                 Tensor max, Tensor log_sum, Tensor entropy, Maybe d_logprob,
                                 Maybe d_entropy, Maybe d_logsumexp) {
  constexpr const char* kOp = "token_stats_backward";
  check_dim(kOp, "logits", logits, 2);
  const TokenArguments a(kOp, {logits, "logits"}, logits.size(1), labels, temperature, softcap,
                         {ignore_index, first, vocabulary});
  const GradientArguments g(kOp, {logits, "logits"}, max, log_sum, entropy, d_logprob, d_entropy,
                            d_logsumexp);
  const Tensor x = as_contiguous(logits);
  RowsProblem p = rows_problem(kOp, logits, x, a.tokens);
  Tensor dx = new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type());
  p.dx = dx.mutable_data_ptr();
  const cuda::Place place(x);
  gradient_of_logits(p, g.gradients, place.stream);
  return dx;
}

// --- from hidden states and the head ------------------------------------------------------------

// Tensor cores are fed 16 bytes at a time; a view may start anywhere.
Tensor as_aligned(const Tensor& t) {
  const Tensor whole = as_contiguous(t);
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0
             ? whole
             : torch::stable::clone(whole);
}

struct LinearArguments {
  Tensor hidden, head;
  Maybe bias;
  TokenArguments tokens;
  LinearProblem p;

  LinearArguments(const char* op, const Tensor& hidden_, const Tensor& head_, const Maybe& bias_,
                  const Maybe& labels, const Tensor& temperature, double softcap, const Labels& how)
      : hidden(checked(op, hidden_, head_)),
        head(as_aligned(head_)),
        tokens(op, {hidden_, "hidden"}, head_.size(0), labels, temperature, softcap, how) {
    p.tokens = tokens.tokens;
    p.D = hidden.size(1);
    p.V = head.size(0);
    p.hidden = hidden.const_data_ptr();
    p.head = head.const_data_ptr();
    p.hidden_dtype = float_dtype(op, "hidden", hidden);
    p.head_dtype = float_dtype(op, "head", head);
    bias = vector(op, "bias", bias_, ScalarType::Float, p.V, "the vocabulary", {hidden_, "hidden"});
    p.bias = data_of<float>(bias);
  }

  static Tensor checked(const char* op, const Tensor& hidden, const Tensor& head) {
    check_same_device(op, "head", head, "hidden", hidden);
    check_dim(op, "hidden", hidden, 2);
    check_dim(op, "head", head, 2);
    check_size(op, "head", head, 1, hidden.size(1), "the width of hidden");
    SALTIRE_CHECK(hidden.size(1) > 0, op, ": hidden is ", describe(hidden), "; expected D >= 1.");
    return as_aligned(hidden);
  }
};

Stats linear_token_stats_cuda(Tensor hidden, Tensor head, Maybe bias, Maybe labels,
                              Tensor temperature, double softcap, int64_t ignore_index,
                              int64_t first, int64_t vocabulary) {
  const LinearArguments a("linear_token_stats", hidden, head, bias, labels, temperature, softcap,
                          {ignore_index, first, vocabulary});
  Outputs out(hidden, a.p.tokens.M);
  const cuda::Place place(hidden);
  const LinearPlan plan = make_plan(a.p, place.device);
  Tensor workspace = new_tensor(hidden, {plan.forward_bytes}, ScalarType::Byte);
  stats_of_linear(a.p, plan, out.pointers(), workspace.mutable_data_ptr(), place.stream);
  return out.stats();
}

std::tuple<Tensor, Tensor, Tensor> linear_token_stats_backward_cuda(
    Tensor hidden, Tensor head, Maybe bias, Maybe labels, Tensor temperature, double softcap,
    int64_t ignore_index, int64_t first, int64_t vocabulary, Tensor max, Tensor log_sum,
    Tensor entropy, Maybe d_logprob, Maybe d_entropy, Maybe d_logsumexp, bool wants_hidden,
    bool wants_head, bool wants_bias) {
  constexpr const char* kOp = "linear_token_stats_backward";
  const LinearArguments a(kOp, hidden, head, bias, labels, temperature, softcap,
                          {ignore_index, first, vocabulary});
  const GradientArguments g(kOp, {hidden, "hidden"}, max, log_sum, entropy, d_logprob, d_entropy,
                            d_logsumexp);
  const LinearProblem& p = a.p;
  Tensor dh = new_tensor(hidden, {wants_hidden ? p.tokens.M : 0, p.D}, ScalarType::Float);
  // Its sums over all tokens are complete before they are stored, so they are rounded here, once.
  Tensor dw = new_tensor(hidden, {wants_head ? p.V : 0, p.D}, head.scalar_type());
  Tensor db = new_tensor(hidden, {wants_bias ? p.V : 0}, ScalarType::Float);
  const cuda::Place place(hidden);
  const LinearPlan plan = make_plan(p, place.device);
  Tensor workspace = new_tensor(hidden, {plan.backward_bytes}, ScalarType::Byte);
  DeviceLinearGradients out;
  if (wants_hidden) out.hidden = floats_of(dh);
  if (wants_head) out.head = dw.mutable_data_ptr();
  if (wants_bias) out.bias = floats_of(db);
  gradient_of_linear(p, plan, g.gradients, out, workspace.mutable_data_ptr(), place.stream);
  return {dh, dw, db};
}

}  // namespace
}  // namespace saltire::token_stats

STABLE_TORCH_LIBRARY_IMPL(saltire, CUDA, m) {
  using namespace saltire::token_stats;
  m.impl("token_stats", TORCH_BOX(&token_stats_cuda));
  m.impl("token_stats_backward", TORCH_BOX(&token_stats_backward_cuda));
  m.impl("linear_token_stats", TORCH_BOX(&linear_token_stats_cuda));
  m.impl("linear_token_stats_backward", TORCH_BOX(&linear_token_stats_backward_cuda));
}
