#include "speculate/kernel.h"

namespace saltire::speculate {

Kernels avx2_kernels() {
  return {largest, exponentials};
}

}  // namespace saltire::speculate
