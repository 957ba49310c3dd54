// Memory that is wanted soon, asked for bit by bit while something else is computed.
#pragma once
#include <cstdint>

namespace saltire::decoder_layer {
namespace {

struct Ahead {
  const char* at;
  const char* end;

  inline void ask(int64_t lines) {
    for (; lines > 0 && at < end; --lines, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

}  // namespace
}  // namespace saltire::decoder_layer
