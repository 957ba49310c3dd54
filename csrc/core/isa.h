// Which instruction set the CPU kernels use: found once at run time, forced by SALTIRE_ISA or, so
// that one process can test every path, by force_isa().
#pragma once
#include <string>

namespace saltire {

// Ordered: a later one may use everything of an earlier one.
enum class Isa {
  ref = 0,     // plain loops, any processor
  avx2 = 1,    // AVX2, FMA, F16C
  avx512 = 2,  // AVX-512 F, BW, VL, DQ, VBMI and VNNI (Ice Lake, Zen 4 and later)
};

const char* isa_name(Isa isa);

// The best set that this processor and this build support.
Isa best_isa();

// The set in use: forced, else SALTIRE_ISA's, else best_isa().
// Throws if SALTIRE_ISA names an unknown or an unsupported set.
Isa current_isa();

// Forces a set by name ("ref", "avx2", "avx512"); "" returns to the default.
// Throws std::runtime_error for an unknown or unsupported name.
void force_isa(const std::string& name);

// AVX512-BF16 (vdpbf16ps), beside Isa::avx512; false whenever a lower set is in use.
bool has_avx512_bf16();

// One line for a person: the set in use and why, e.g. "avx512 (best this processor offers)".
std::string isa_reason();

}  // namespace saltire
