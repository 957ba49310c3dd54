#include "speculate/kernel.h"

namespace saltire::speculate {

Kernels ref_kernels() {
  return {largest, exponentials};
}

}  // namespace saltire::speculate
