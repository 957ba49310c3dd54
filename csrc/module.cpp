// saltire._C: importing it loads libsaltire (and with it torch.ops.saltire); it tells build facts.
// `import torch` must come first: libsaltire takes its symbols from the libtorch_cpu already
// loaded.
#include <pybind11/pybind11.h>

#include "library.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loads Saltire's compiled ops and tells how they were built.";
  m.def("isa", &saltire::library_isa, "The instruction set in use: ref, avx2 or avx512.");
  m.def("best_isa", &saltire::library_best_isa, "The best instruction set this processor offers.");
  m.def("isa_reason", &saltire::library_isa_reason, "The instruction set in use and why.");
  m.def("force_isa", &saltire::library_force_isa, pybind11::arg("name"),
        "Force an instruction set by name; an empty name returns to the default.");
  m.attr("compiler") = SALTIRE_COMPILER;
  m.attr("torch_version") = SALTIRE_TORCH_VERSION;
  m.attr("cuda_archs") = SALTIRE_BUILT_CUDA_ARCHS;
}
