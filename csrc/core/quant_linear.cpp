#include "core/quant_linear.h"

#include "core/check.h"

namespace saltire {

QuantKernels& quant_kernel_table() {
  static QuantKernels table = {};
  return table;
}

const QuantKernels& quant_kernels() {
  const QuantKernels& table = quant_kernel_table();
  SALTIRE_CHECK(table.quantize_token != nullptr,
                "this build has no room transform_quantize; quantised layers cannot run.");
  SALTIRE_CHECK(table.multiply != nullptr,
                "this build has no room lowbit_gemm; quantised layers cannot run.");
  return table;
}

}  // namespace saltire
