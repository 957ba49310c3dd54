// The one definition of torch.ops.saltire; every room adds its fragment in its op.cpp.
#include "library.h"

#include <torch/csrc/stable/library.h>

#include "core/isa.h"

STABLE_TORCH_LIBRARY(saltire, m) {
  (void)m;
}

namespace saltire {

std::string library_isa() {
  return isa_name(current_isa());
}
std::string library_best_isa() {
  return isa_name(best_isa());
}
std::string library_isa_reason() {
  return isa_reason();
}
void library_force_isa(const std::string& name) {
  force_isa(name);
}

}  // namespace saltire
