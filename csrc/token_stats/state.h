// Joining the sums of two parts of the vocabulary. Included by every ISA's file: nothing here may
// be shared between them by the linker, hence the unnamed namespace.
#pragma once
#include <cmath>

#include "token_stats/op.h"

namespace saltire::token_stats {
namespace {

// Moves a state's reference point to `max`, which is at least the old one.
//   Σ e^(z − m') = r·s,   Σ e^(z − m')·(z − m') = r·(u + s·(m − m')),   r = e^(m − m')
inline void raise_max(State* state, float max) {
  if (max == state->max) return;
  if (state->sum != 0) {
    const double shift = static_cast<double>(state->max) - max;
    const double r = std::exp(shift);
    state->weighted = r * (state->weighted + state->sum * shift);
    state->sum *= r;
  }
  state->max = max;
}

// Adds the part `other` of the vocabulary, whose indices are above those of `state`.
inline void merge(State* state, const State& other) {
  if (other.max > state->max) {
    raise_max(state, other.max);
    state->argmax = other.argmax;
  }
  State moved = other;
  if (other.sum != 0) raise_max(&moved, state->max);
  state->sum += moved.sum;
  state->weighted += moved.weighted;
  if (other.label > state->label || other.label != other.label) state->label = other.label;
}

}  // namespace
}  // namespace saltire::token_stats
