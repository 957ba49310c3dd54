// Rounding a matrix column by column, each column making up for the errors of those before it
// (GPTQ). With UᵀU = H⁻¹, U upper-triangular, L = Uᵀ, and W [N, K] in the order that is given:
//
//   w_j <- W_j - Σ_{i<j} L[j][i] · e_i        e_j = (w_j - grid(w_j)) / L[j][j]
//
// The sum is taken when a column is reached (left-looking), so that a column is written once, and
// always over i = 0, 1, 2, ... by one fused multiply-add each: every instruction set gives the same
// codes.
//
// Outputs do not meet: a thread takes two vectors of them through all columns, four columns at a
// time. Their errors, K · 64 bytes (AVX2), stay in L2 (K = 1,536: 98 KB), and L streams by.
//
// Work and floor, [N, K] = [3072, 576] and [576, 1536], AVX2: N·K²/2 = 0.51 and 0.68 G
// multiply-adds at 16 a cycle: 11 and 14 ms of one core at 3 GHz. L, K²/2 floats, is read once for
// 16 outputs: 4 bytes a cycle, from L3.
#pragma once
#include <cstdint>

namespace saltire::gptq {

struct Problem {
  int64_t N, K, groups;  // outputs, inputs, groups of inputs
  const float* w;        // [N, K]
  const int64_t* order;  // [K]: the column that is rounded j-th
  const float* lower;    // [K, K] in that order
  const float* scale;    // [N, groups]
  const float* zero;     // [N, groups]
  float top;             // the largest code
  uint8_t* codes;        // [N, K]
};

// Rounds outputs [begin, end). errors: scratch of K · outputs floats, 64-byte aligned.
struct Kernel {
  int64_t outputs;  // taken at once
  void (*round)(const Problem&, int64_t begin, int64_t end, float* errors);
};

Kernel ref_kernel();
#if defined(SALTIRE_X86)
Kernel avx2_kernel();
Kernel avx512_kernel();
#endif

}  // namespace saltire::gptq
