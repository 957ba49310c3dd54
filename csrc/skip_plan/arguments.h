// The op's arguments, checked; the same for the CPU and a device.
#pragma once
#include <utility>

#include "core/tensor.h"

namespace saltire::skip_plan {

struct Arguments {
  Tensor keep, skip, truth;
  int64_t M, D;
};

inline Arguments check(const char* op, const Tensor& keep, const Tensor& skip,
                       const Tensor& truth) {
  check_dim(op, "keep", keep, 2);
  check_dim(op, "skip", skip, 2);
  check_dim(op, "truth", truth, 1);
  const int64_t M = keep.size(0), D = keep.size(1);
  check_size(op, "skip", skip, 0, M, "the rows of keep");
  check_size(op, "skip", skip, 1, D, "D");
  check_size(op, "truth", truth, 0, D, "D");
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor*>{"keep", &keep}, {"skip", &skip}, {"truth", &truth}}) {
    check_same_device(op, name, *t, "keep", keep);
    check_dtype(op, name, *t, ScalarType::Float);
  }
  return {as_contiguous(keep), as_contiguous(skip), as_contiguous(truth), M, D};
}

}  // namespace saltire::skip_plan
