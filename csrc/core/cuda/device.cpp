#include "core/cuda/device.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "core/check.h"

namespace saltire::cuda {
namespace {

int attribute(cudaDeviceAttr which, int ordinal) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, ordinal);
  SALTIRE_CHECK(error == cudaSuccess, "CUDA device ", ordinal, ": ", cudaGetErrorString(error),
                ". Check with nvidia-smi that the device and its driver work.");
  return value;
}

Device read(int ordinal) {
  Device d;
  d.sm = 10 * attribute(cudaDevAttrComputeCapabilityMajor, ordinal) +
         attribute(cudaDevAttrComputeCapabilityMinor, ordinal);
  d.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, ordinal);
  d.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  d.l2_bytes = attribute(cudaDevAttrL2CacheSize, ordinal);
  return d;
}

}  // namespace

Device device_facts(int ordinal) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(ordinal);
  if (found != known.end()) return found->second;
  return known[ordinal] = read(ordinal);
}

}  // namespace saltire::cuda
