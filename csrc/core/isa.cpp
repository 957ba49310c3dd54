#include "core/isa.h"

#include <atomic>
#include <cstdlib>

#include "core/check.h"

namespace saltire {
namespace {

constexpr int kNotForced = -1;
std::atomic<int> forced{kNotForced};

Isa detect() {
#if defined(SALTIRE_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) {
    return Isa::avx512;
  }
  // Every processor with AVX2 has F16C.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::ref;
}

Isa parse(const std::string& name, const char* from) {
  Isa isa = Isa::ref;
  if (name == "ref") {
    isa = Isa::ref;
  } else if (name == "avx2") {
    isa = Isa::avx2;
  } else if (name == "avx512") {
    isa = Isa::avx512;
  } else {
    fail(from, " = \"", name, "\" is not an instruction set. Use ref, avx2 or avx512.");
  }
  SALTIRE_CHECK(isa <= best_isa(), from, " = \"", name, "\", but this processor offers at most ",
                isa_name(best_isa()), ". Use that or a lower one.");
  return isa;
}

const char* environment() {
  static const char* const value = std::getenv("SALTIRE_ISA");
  return value != nullptr && *value != '\0' ? value : nullptr;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "ref";
  }
}

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa current_isa() {
  const int f = forced.load(std::memory_order_relaxed);
  if (f != kNotForced) return static_cast<Isa>(f);
  // A throw leaves the static unset, so a wrong SALTIRE_ISA is refused at every call, not only
  // once.
  static const Isa from_environment =
      environment() != nullptr ? parse(environment(), "SALTIRE_ISA") : best_isa();
  return from_environment;
}

void force_isa(const std::string& name) {
  forced.store(name.empty() ? kNotForced : static_cast<int>(parse(name, "force_isa")),
               std::memory_order_relaxed);
}

bool has_avx512_bf16() {
#if defined(SALTIRE_X86)
  static const bool supported = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
  }();
  return supported && current_isa() == Isa::avx512;
#else
  return false;
#endif
}

std::string isa_reason() {
  const std::string name = isa_name(current_isa());
  if (forced.load(std::memory_order_relaxed) != kNotForced)
    return name + " (forced by the program)";
  if (environment() != nullptr) return name + " (set by SALTIRE_ISA)";
  return name + " (the best this processor offers)";
}

}  // namespace saltire
