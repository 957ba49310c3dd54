// Models that were opened, by handle.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "core/tensor.h"
#include "decoder_layer/model.h"

namespace saltire::decoder_layer {

// A model that has been opened: its tensors stay alive for as long as their pointers are used.
struct Open {
  std::vector<Tensor> tensors;
  Model model;
  Workspace work;
  std::mutex busy;  // a step owns the workspace
};

// The open model of a handle; throws std::runtime_error naming `op`.
std::shared_ptr<Open> find(const char* op, const Tensor& handle);

inline Format weight_format(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Format::f32;
    case ScalarType::BFloat16:
      return Format::bf16;
    case ScalarType::Half:
      return Format::f16;
    default:
      fail(op, ": ", name, " is ", describe(t), "; expected float32, bfloat16 or float16.");
  }
}

}  // namespace saltire::decoder_layer
