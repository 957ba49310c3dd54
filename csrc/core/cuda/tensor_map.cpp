#include "core/cuda/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

#include "core/check.h"

namespace saltire::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Asked of the runtime, so that the library does not link to the driver and loads without one.
Encode encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  constexpr unsigned int kSince = 12000;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             kSince, cudaEnableDefault, &found);
  SALTIRE_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess && function != nullptr,
                "CUDA driver: it has no cuTensorMapEncodeTiled. Install a driver for CUDA 12 or "
                "later.");
  return reinterpret_cast<Encode>(function);
}

}  // namespace

TensorMap map_bytes(const void* base, int64_t rows, int64_t columns, int box_rows) {
  static const Encode encode = encode_function();
  CUtensorMap map;
  static_assert(sizeof(map) == sizeof(TensorMap), "a tensor map is 128 bytes");
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(base), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  SALTIRE_CHECK(result == CUDA_SUCCESS, "CUDA driver: a tensor map of [", rows, ", ", columns,
                "] bytes failed with error ", static_cast<int>(result), ". Please report it.");
  TensorMap out;
  std::memcpy(&out, &map, sizeof(out));
  return out;
}

}  // namespace saltire::cuda
