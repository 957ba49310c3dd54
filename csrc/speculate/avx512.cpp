#include "speculate/kernel.h"

namespace saltire::speculate {

Kernels avx512_kernels() {
  return {largest, exponentials};
}

}  // namespace saltire::speculate
