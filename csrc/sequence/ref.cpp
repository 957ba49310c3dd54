#include "sequence/exact.h"

namespace saltire::sequence {
namespace {

struct Plain {
  using reg = double;
  static constexpr int width = 1;
  static constexpr int bits = 0;

  static inline reg load(const double* p) { return *p; }
  static inline void store(double* p, reg v) { *p = v; }
  static inline reg set1(double v) { return v; }
  static inline reg first(double v, double) { return v; }
  static inline reg add(reg a, reg b) { return a + b; }
  static inline reg mul(reg a, reg b) { return a * b; }
  static inline reg max(reg a, reg b) { return a > b ? a : b; }
};

}  // namespace

Kernels ref_kernels() {
  return {&fill_ordering<Plain>, &fill_path<Plain>};
}

}  // namespace saltire::sequence
