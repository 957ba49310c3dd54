// What the Python stub may ask of the library. Kept free of torch so that _C links to nothing else.
#pragma once
#include <string>

#define SALTIRE_EXPORT __attribute__((visibility("default")))

namespace saltire {

SALTIRE_EXPORT std::string library_isa();
SALTIRE_EXPORT std::string library_best_isa();
SALTIRE_EXPORT std::string library_isa_reason();
SALTIRE_EXPORT void library_force_isa(const std::string& name);

}  // namespace saltire
