// What every cuda.cpp shares: where the work of a call goes. One copy of these names also serves
// torch 2.10, whose stable ABI has no streams but a C function for CUDA's.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "core/cuda/device.h"
#include "core/tensor.h"

namespace saltire::cuda {

// Makes the tensor's device the current one for as long as it lives, and finds the caller's stream.
class Place {
 public:
  explicit Place(const Tensor& x)
      : guard_(x.get_device_index()), device(device_facts(x.get_device_index())) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  Device device;
  cudaStream_t stream = nullptr;
};

}  // namespace saltire::cuda
