// Random numbers and draws; plain loops in double, the same on every instruction set.
#pragma once
#include <cstdint>

#include "core/both.h"
#include "speculate/op.h"

namespace saltire::speculate {

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
SALTIRE_BOTH double uniform(uint64_t seed, uint64_t sequence, uint64_t position, Purpose purpose) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                   static_cast<uint32_t>(sequence), static_cast<uint32_t>(purpose)};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(b),
        static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(a)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  const uint64_t bits = (uint64_t{c[0]} << 32 | c[1]) >> 11;  // 53 bits: [0, 1)
  return static_cast<double>(bits) * 0x1.0p-53;
}

// The first token at which the running sum of weight(i) passes u times its total; if rounding
// leaves none, the last token that has any weight.
template <typename Weight>
inline int64_t draw(int64_t V, double u, const Weight& weight) {
  double total = 0.0;
  for (int64_t i = 0; i < V; ++i) total += weight(i);
  const double wanted = u * total;
  double sum = 0.0;
  int64_t last = 0;
  for (int64_t i = 0; i < V; ++i) {
    const double w = weight(i);
    if (w <= 0.0) continue;
    sum += w;
    last = i;
    if (sum > wanted) return i;
  }
  return last;
}

struct Outcome {
  int64_t accepted;
  int64_t next;
};

// drafts [count] drawn from q [count, V] (null: certain drafts); p [count + 1, V]; position: of the
// first draft.
inline Outcome verify(const float* p, const float* q, const int64_t* drafts, int64_t count,
                      int64_t V, uint64_t seed, uint64_t sequence, int64_t position) {
  for (int64_t i = 0; i < count; ++i) {
    const float* target = p + i * V;
    const float* draft = q == nullptr ? nullptr : q + i * V;
    const int64_t x = drafts[i];
    const auto at = static_cast<uint64_t>(position + i);
    const double chance = draft == nullptr ? 1.0 : static_cast<double>(draft[x]);
    // u·q < p instead of u < p / q: no division by a q that rounded to zero.
    if (uniform(seed, sequence, at, Purpose::accept) * chance < static_cast<double>(target[x])) {
      continue;
    }
    const double u = uniform(seed, sequence, at, Purpose::replace);
    const auto rest = [&](int64_t v) {
      const double minus = draft == nullptr ? (v == x ? 1.0 : 0.0) : static_cast<double>(draft[v]);
      const double weight = static_cast<double>(target[v]) - minus;
      return weight > 0.0 ? weight : 0.0;
    };
    return {i, draw(V, u, rest)};
  }
  const float* target = p + count * V;
  const double u = uniform(seed, sequence, static_cast<uint64_t>(position + count), Purpose::plain);
  return {count, draw(V, u, [&](int64_t v) { return static_cast<double>(target[v]); })};
}

}  // namespace saltire::speculate
