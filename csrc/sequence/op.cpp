// Registers the exact and the searched orders, and checks what they get.
#include "sequence/op.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <vector>

#include "core/isa.h"
#include "core/tensor.h"
#include "sequence/ordering_search.h"
#include "sequence/path_search.h"

namespace saltire::sequence {
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

// W without its diagonal, which no objective reads: f64 [n, n].
std::vector<double> weights(const char* op, const Tensor& w, int64_t most) {
  check_cpu(op, "w", w);
  check_dtype(op, "w", w, ScalarType::Double);
  check_dim(op, "w", w, 2);
  const int64_t n = w.size(0);
  SALTIRE_CHECK(w.size(1) == n && n >= 1, op, ": w is ", describe(w),
                "; expected a square matrix of at least one document.");
  SALTIRE_CHECK(n <= most, op, ": n = ", n, " documents, but the exact order takes at most ", most,
                ". Use the search for more.");
  const Tensor contiguous = as_contiguous(w);
  const auto* data = static_cast<const double*>(contiguous.data_ptr());
  std::vector<double> copy(data, data + n * n);
  for (int64_t i = 0; i < n; ++i) copy[static_cast<size_t>(i * n + i)] = 0;
  for (int64_t i = 0; i < n * n; ++i) {
    SALTIRE_CHECK(std::isfinite(copy[static_cast<size_t>(i)]), op, ": w[", i / n, "][", i % n,
                  "] is not finite. Give 0 where a pair has no score.");
  }
  return copy;
}

std::vector<double> lengths(const char* op, const Tensor& length, int64_t n, double slope) {
  check_cpu(op, "length", length);
  check_dtype(op, "length", length, ScalarType::Double);
  check_dim(op, "length", length, 1);
  check_size(op, "length", length, 0, n, "documents");
  SALTIRE_CHECK(std::isfinite(slope), op, ": slope = ", slope, "; expected a finite number.");
  const Tensor contiguous = as_contiguous(length);
  const auto* data = static_cast<const double*>(contiguous.data_ptr());
  std::vector<double> copy(data, data + n);
  for (double tokens : copy) {
    SALTIRE_CHECK(std::isfinite(tokens) && tokens > 0, op, ": a length of ", tokens,
                  " tokens; expected positive lengths.");
  }
  return copy;
}

double slope_a_token(const std::vector<double>& length, double slope) {
  double all = 0;
  for (double tokens : length) all += tokens;
  return slope / all;
}

// order int64 [n]; value f64 [2]: the objective and an upper bound of it.
std::tuple<Tensor, Tensor> result(const Tensor& like, const Order& order, double value,
                                  double bound) {
  Tensor out = new_tensor(like, {static_cast<int64_t>(order.size())}, ScalarType::Long);
  std::copy(order.begin(), order.end(), static_cast<int64_t*>(out.data_ptr()));
  Tensor values = new_tensor(like, {2}, ScalarType::Double);
  auto* pair = static_cast<double*>(values.data_ptr());
  pair[0] = value;
  pair[1] = std::max(value, bound);
  return {out, values};
}

// A table too large for the stack and for clearing first.
std::unique_ptr<double, decltype(&std::free)> table(const char* op, int64_t doubles) {
  auto* memory = static_cast<double*>(
      std::aligned_alloc(64, static_cast<size_t>((doubles * 8 + 63) / 64 * 64)));
  SALTIRE_CHECK(memory != nullptr, op, ": no memory for a table of ", doubles * 8,
                " bytes. Use the search.");
  return {memory, &std::free};
}

std::tuple<Tensor, Tensor> exact_ordering(Tensor w, Tensor length, double slope) {
  constexpr const char* kOp = "sequence_exact_ordering";
  const std::vector<double> weight = weights(kOp, w, kMaxOrdering);
  const int64_t n = w.size(0);
  const std::vector<double> tokens = lengths(kOp, length, n, slope);
  const double s = slope_a_token(tokens, slope);
  std::vector<double> alpha(weight.size()), gamma(weight.size()), gamma0(tokens.size());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const auto ij = static_cast<size_t>(i * n + j), ji = static_cast<size_t>(j * n + i);
      alpha[ij] = weight[ij] * (1 - s * tokens[static_cast<size_t>(j)]);
      gamma[ij] = s * (weight[ij] + weight[ji]);
      gamma0[static_cast<size_t>(i)] -= s * weight[ij];
    }
  }
  const Ordering problem{n, slope != 0, alpha.data(), gamma.data(), gamma0.data(), tokens.data()};
  const int64_t count = int64_t{1} << n;
  const auto best = table(kOp, std::max<int64_t>(count, 8));
  kernels().ordering(problem, best.get());
  // From the full set back: the last document is one whose removal leaves the best value. Equal
  // ones go to the larger index, so that a matrix of zeros keeps the given order.
  Order order(static_cast<size_t>(n));
  int64_t subset = count - 1;
  for (int64_t place = n - 1; place >= 0; --place) {
    double most = -INFINITY, all = 0;
    int64_t last = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (subset >> i & 1) all += tokens[static_cast<size_t>(i)];
    }
    for (int64_t j = n - 1; j >= 0; --j) {
      if ((subset >> j & 1) == 0) continue;
      double a = 0, g = gamma0[static_cast<size_t>(j)];
      for (int64_t i = 0; i < n; ++i) {
        if ((subset >> i & 1) == 0) continue;
        a += alpha[static_cast<size_t>(i * n + j)];
        g += gamma[static_cast<size_t>(i * n + j)];
      }
      const double value = best.get()[subset - (int64_t{1} << j)] + a + all * g;
      if (last < 0 || value > most + 1e-13 * std::fabs(most)) {
        most = value;
        last = j;
      }
    }
    order[static_cast<size_t>(place)] = last;
    subset -= int64_t{1} << last;
  }
  const double value = OrderingSearch(weight.data(), tokens.data(), s, n).value(order);
  return result(w, order, value, value);
}

std::tuple<Tensor, Tensor> exact_path(Tensor w) {
  constexpr const char* kOp = "sequence_exact_path";
  const std::vector<double> weight = weights(kOp, w, kMaxPath);
  const int64_t n = w.size(0), stride = padded(n);
  std::vector<double> rows(static_cast<size_t>(n * stride));
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(weight.begin() + i * n, n, rows.begin() + i * stride);
  }
  const auto best = table(kOp, (int64_t{1} << n) * stride);
  kernels().path(rows.data(), n, best.get());
  Order order;
  int64_t subset = (int64_t{1} << n) - 1, next = -1;
  while (subset != 0) {  // from the end; equal ones go to the larger index
    double most = -INFINITY;
    int64_t last = -1;
    for (int64_t i = n - 1; i >= 0; --i) {
      if ((subset >> i & 1) == 0) continue;
      const double step = next < 0 ? 0 : weight[static_cast<size_t>(i * n + next)];
      const double value = best.get()[(subset - (int64_t{1} << i)) * stride + i] + step;
      if (last < 0 || value > most) {
        most = value;
        last = i;
      }
    }
    order.push_back(last);
    next = last;
    subset -= int64_t{1} << last;
  }
  std::reverse(order.begin(), order.end());
  const double value = PathSearch(weight.data(), n).value(order);
  return result(w, order, value, value);
}

void check_effort(const char* op, int64_t starts, int64_t kicks) {
  SALTIRE_CHECK(starts >= 1 && kicks >= 0, op, ": starts = ", starts, ", kicks = ", kicks,
                "; expected at least 1 start and 0 kicks.");
}

std::tuple<Tensor, Tensor> search_ordering(Tensor w, Tensor length, double slope, int64_t starts,
                                           int64_t kicks, int64_t seed) {
  constexpr const char* kOp = "sequence_search_ordering";
  const std::vector<double> weight = weights(kOp, w, INT32_MAX);
  const int64_t n = w.size(0);
  const std::vector<double> tokens = lengths(kOp, length, n, slope);
  check_effort(kOp, starts, kicks);
  OrderingSearch search(weight.data(), tokens.data(), slope_a_token(tokens, slope), n);
  const Order order = search.best(starts, kicks, static_cast<uint64_t>(seed));
  // Each pair at its better direction and its better distance: between 0 and all tokens.
  double bound = 0;
  for (int64_t a = 0; a < n; ++a) {
    for (int64_t b = a + 1; b < n; ++b) {
      const double ab = weight[static_cast<size_t>(a * n + b)];
      const double ba = weight[static_cast<size_t>(b * n + a)];
      bound += std::max(std::max(ab, ba), std::max(ab * (1 + slope), ba * (1 + slope)));
    }
  }
  return result(w, order, search.value(order), bound);
}

std::tuple<Tensor, Tensor> search_path(Tensor w, int64_t starts, int64_t kicks, int64_t seed) {
  constexpr const char* kOp = "sequence_search_path";
  const std::vector<double> weight = weights(kOp, w, INT32_MAX);
  const int64_t n = w.size(0);
  check_effort(kOp, starts, kicks);
  PathSearch search(weight.data(), n);
  const Order order = search.best(starts, kicks, static_cast<uint64_t>(seed));
  // All documents but one are entered once, and all but one are left once.
  double bound = 0;
  if (n > 1) {
    double sums[2], least[2];
    for (int side = 0; side < 2; ++side) {
      sums[side] = 0;
      least[side] = INFINITY;
      for (int64_t i = 0; i < n; ++i) {
        double most = -INFINITY;
        for (int64_t j = 0; j < n; ++j) {
          if (i != j)
            most = std::max(most, weight[static_cast<size_t>(side ? i * n + j : j * n + i)]);
        }
        sums[side] += most;
        least[side] = std::min(least[side], most);
      }
    }
    bound = std::min(sums[0] - least[0], sums[1] - least[1]);
  }
  return result(w, order, search.value(order), bound);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(saltire, m) {
  m.def("sequence_exact_ordering(Tensor w, Tensor length, float slope) -> (Tensor, Tensor)");
  m.def("sequence_exact_path(Tensor w) -> (Tensor, Tensor)");
  m.def(
      "sequence_search_ordering(Tensor w, Tensor length, float slope, int starts, int kicks, "
      "int seed) -> (Tensor, Tensor)");
  m.def("sequence_search_path(Tensor w, int starts, int kicks, int seed) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(saltire, CPU, m) {
  m.impl("sequence_exact_ordering", TORCH_BOX(&exact_ordering));
  m.impl("sequence_exact_path", TORCH_BOX(&exact_path));
  m.impl("sequence_search_ordering", TORCH_BOX(&search_ordering));
  m.impl("sequence_search_path", TORCH_BOX(&search_path));
}

}  // namespace saltire::sequence
