// The best order of n documents, given what each gains from another before it: W [n, n], f64.
//
//   ordering  max over orders of  Σ_{a before b} W[a][b] · (1 + slope · d(a, b) / T)
//             d(a, b) tokens that lie between a and b, T tokens of all; slope 0 is the linear
//             ordering problem
//   path      max over orders of  Σ_k W[order k][order k+1]         (a Hamiltonian path)
//
// Exact, by dynamic programming over subsets. With ℓ(S) the tokens of S and s = slope / T,
// d(a, b) = ℓ(before b) - ℓ(before a) - len a, so what document j adds when it is put behind the
// set S depends on S alone, although distances span documents:
//
//   added_j(S) = in_j(S)·(1 + s·ℓ(S)) - s·(ℓ(S) + len_j)·(out_j - out_j(S))
//              = α_j(S) + ℓ(S + j) · γ_j(S)
//   α_j(S) = Σ_{i in S} W[i][j] · (1 - s·len_j)      γ_j(S) = s · (Σ_{i in S} (W[i][j] + W[j][i])
//                                                                  - Σ_i W[j][i])
//   best(S + j) = max over j of best(S) + added_j(S)
//
// α and γ are sums over members, so a table over the lowest bits plus a row for the others gives
// them by one addition. A vector holds the subsets S..S+w-1: for j above its lowest bits best(S -
// j) is one load; for its lowest bits it is a permutation of the vector itself.
//
// Work and floor, n = 16, f64, AVX-512: 2^16 · 16/2 candidates of 3 operations and 2 loads, 8 a
// vector: 0.2 M vector operations, 0.1 ms; the table of 0.5 MB stays in L2. Path: 2^16 rows of 8
// steps on two vectors, 1 M vector operations: 0.3 ms if the 8 MB of rows stayed in L2; they are in
// L3, one line a step: 0.5 M lines at ~4 ns = 2 ms.
#pragma once
#include <cstdint>
#include <vector>

namespace saltire::sequence {

constexpr int64_t kMaxOrdering = 24;  // 2^24 · 8 bytes = 128 MB
constexpr int64_t kMaxPath = 20;      // 2^20 · 24 · 8 bytes = 192 MB
constexpr int64_t kRow = 8;           // rows are padded to this many f64

inline int64_t padded(int64_t n) {
  return (n + kRow - 1) / kRow * kRow;
}

// What the recurrences read. w: [n, padded(n)], row i = W[i][:], diagonal and padding 0.
// alpha, gamma: [n, n], entry [i][j] is what member i adds to α_j and γ_j; gamma0 [n]: γ_j(∅).
struct Ordering {
  int64_t n;
  bool distance;  // false: γ = 0 and is not read
  const double* alpha;
  const double* gamma;
  const double* gamma0;
  const double* length;
};

struct Kernels {
  // Fills best [2^n]; best[S] is the best value of an order of S put first.
  void (*ordering)(const Ordering&, double* best);
  // Fills best [2^n, padded(n)]; best[S][j], j not in S, is the best path over S, then j.
  void (*path)(const double* w, int64_t n, double* best);
};

Kernels ref_kernels();
#if defined(SALTIRE_X86)
Kernels avx2_kernels();
Kernels avx512_kernels();
#endif

}  // namespace saltire::sequence
