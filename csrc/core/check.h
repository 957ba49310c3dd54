// Checks whose message says what was expected, what came and what to do.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace saltire {

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  throw std::runtime_error(out.str());
}

}  // namespace saltire

// SALTIRE_CHECK(k % 32 == 0, "lowbit_gemm: K = ", k, " must be a multiple of 32. Pad K to ", ...);
// The message's parts are evaluated only when the check fails.
#define SALTIRE_CHECK(condition, ...) \
  do {                                \
    if (!(condition)) {               \
      ::saltire::fail(__VA_ARGS__);   \
    }                                 \
  } while (0)
