#include "decoder_layer/kernel.h"

namespace saltire::decoder_layer {

Kernels avx2_kernels() {
  return all_kernels();
}

}  // namespace saltire::decoder_layer
