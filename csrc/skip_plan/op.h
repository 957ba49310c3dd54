// skip_plan: the choice of CLaSp's dynamic programme at one layer, for all numbers of skipped
// layers at once. Torch-free.
//
//   chosen[j] = cos(keep[j], truth) > cos(skip[j], truth) ? keep[j] : skip[j]
//
// keep[j] has run the layer, skip[j] has not, truth is the state that the whole model has there.
// One pass reads the three rows and makes four sums. M = 15 rows of D = 576 f32 are 69 kB: they lie
// in L2, where the step that made `keep` left them; 4 FMA an element, 35 k FMA, about 1 µs.
#pragma once
#include <cstdint>

namespace saltire::skip_plan {

struct Choice {
  float cosine;  // of what was chosen; 0 where a state is all zeros
  bool kept;
};

using Select = Choice (*)(const float* keep, const float* skip, const float* truth, int64_t D,
                          float* chosen);

Select ref_select();
#if defined(SALTIRE_X86)
Select avx2_select();
Select avx512_select();
#endif

}  // namespace saltire::skip_plan
