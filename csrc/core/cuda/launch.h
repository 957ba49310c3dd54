// The one way a kernel is started: checked, on the caller's stream. The emulator in
// tests/cuda_on_cpu has a header of the same name that runs the kernel as fibers.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>

#include "core/check.h"

namespace saltire::cuda {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  // Start while the kernel before it on the stream still runs; the kernel must then call
  // wait_for_previous_kernel() before it touches anything that one wrote. sm_90 and later only.
  bool overlap_previous = false;
  // Neighbours in x that run together and reach each other's shared memory. sm_90 and later only.
  unsigned cluster = 1;
};

// Dynamic shared memory. 1,024 bytes: what the 128-byte swizzle of TMA and wgmma repeats after.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char saltire_shared[];
  return saltire_shared;
}

// Blocks over 48 KiB of shared memory must be asked for, once per kernel and device.
template <auto kernel>
cudaError_t allow_shared(size_t bytes) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  constexpr int kMaxDevices = 64;
  static std::atomic<size_t> allowed[kMaxDevices];
  int ordinal = 0;
  const cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess || bytes <= kWithoutAsking) return error;
  if (ordinal < kMaxDevices && allowed[ordinal].load(std::memory_order_relaxed) >= bytes) {
    return cudaSuccess;
  }
  const cudaError_t asked = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (asked == cudaSuccess && ordinal < kMaxDevices) allowed[ordinal].store(bytes);
  return asked;
}

// launch<kernel>("name", how, arguments...). Throws with the name, the sizes and CUDA's message.
template <auto kernel, typename... Arguments>
void launch(const char* name, const Launch& how, const Arguments&... arguments) {
  cudaError_t error = allow_shared<kernel>(how.shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = how.grid;
    config.blockDim = how.block;
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = how.stream;
    cudaLaunchAttribute wanted[2] = {};
    config.attrs = wanted;
    if (how.overlap_previous) {
      cudaLaunchAttribute& overlap = wanted[config.numAttrs++];
      overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      overlap.val.programmaticStreamSerializationAllowed = 1;
    }
    if (how.cluster > 1) {
      cudaLaunchAttribute& cluster = wanted[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = how.cluster;
      cluster.val.clusterDim.y = 1;
      cluster.val.clusterDim.z = 1;
    }
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  SALTIRE_CHECK(error == cudaSuccess, "CUDA kernel ", name, ", grid ", how.grid.x, "x", how.grid.y,
                "x", how.grid.z, ", block ", how.block.x, ", ", how.shared_bytes,
                " bytes of shared memory: ", cudaGetErrorString(error),
                ". If the device is busy or broken, nvidia-smi tells; otherwise please report it.");
}

}  // namespace saltire::cuda
