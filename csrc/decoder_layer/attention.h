// Attention over the static cache.
#pragma once
#include <type_traits>

#include "core/cpu/vector16.h"
#include "decoder_layer/cache.h"
#include "decoder_layer/op.h"

namespace saltire::decoder_layer {
namespace {

// The running state of a query: out = acc / sum once all slots are folded in.
struct Running {
  float most = -INFINITY;  // largest score so far
  float sum = 0.0f;        // Σ e^(score - most)
};

// Which of the 16 slots from `slot` a query sees.
inline uint32_t visible(const Query& query, int64_t slot) {
  uint32_t mask = 0;
  const int64_t first = larger(query.start - slot, int64_t{0});
  const int64_t last = smaller(query.prefix - slot, kSlotBlock);
  if (first < last) mask = ((1u << last) - 1) & ~((1u << first) - 1);
  if (query.tree != 0) {
    const int64_t shift = query.prefix - slot;  // where bit 0 of the tree falls
    if (shift >= 0 && shift < kSlotBlock) {
      mask |= static_cast<uint32_t>(query.tree << shift) & 0xffff;
    } else if (shift < 0 && shift > -64) {
      mask |= static_cast<uint32_t>(query.tree >> -shift) & 0xffff;
    }
  }
  return mask & 0xffff;
}

// One past the last slot that a query may see.
inline int64_t visible_end(const Query& query) {
  return query.tree == 0 ? query.prefix : query.prefix + 64 - __builtin_clzll(query.tree);
}

// Scores of Q queries on the four blocks of 16 slots from `slot`: lanes are slots, so no sum
// crosses lanes; d ascending.
template <Format format, int Q>
inline void score_blocks(const CacheHead& cache, const Query* queries, int64_t slot, float* scores,
                         int64_t blocks) {
  using Element = CacheElement<format>;
  using type = typename Element::type;
  constexpr int B = kTileRegisters >= 24 ? 4 : 1;
  const int64_t d = cache.head_dim, rows = d / Element::per;
  const type* keys = static_cast<const type*>(cache.keys) + slot * rows;
  // Σ q·(code · scale + low) = scale · Σ q·code + low · Σ q
  [[maybe_unused]] float sums[Q];
  if constexpr (is_coded(format)) {
    for (int q = 0; q < Q; ++q) sums[q] = sum(queries[q].q, d);
  }
  for (int64_t b0 = 0; b0 < blocks; b0 += B) {
    V16 acc[Q][B];
    for (int q = 0; q < Q; ++q) {
      for (int b = 0; b < B; ++b) acc[q][b] = set1(0.0f);
    }
    // Past the last block the last one is computed again, into lanes that nobody reads.
    const type* block[B];
    for (int b = 0; b < B; ++b) {
      block[b] = keys + smaller<int64_t>(b0 + b, blocks - 1) * kSlotBlock * rows;
    }
    for (int64_t i = 0; i < rows; ++i) {
      typename Element::Raw raw[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) raw[b] = Element::raw(block[b] + i * kSlotBlock);
      const auto dimension = [&](auto place) {
        V16 k[B];
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) k[b] = Element::template part<decltype(place)::value>(raw[b]);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
          const V16 value = set1(queries[q].q[i * Element::per + decltype(place)::value]);
#pragma GCC unroll 4
          for (int b = 0; b < B; ++b) acc[q][b] = fma(value, k[b], acc[q][b]);
        }
      };
      for_each_place<Element::per>(dimension);
    }
    for (int b = 0; b < B && b0 + b < blocks; ++b) {
      const int64_t at = slot + (b0 + b) * kSlotBlock;
      for (int q = 0; q < Q; ++q) {
        V16 s = acc[q][b];
        if constexpr (is_coded(format)) {
          const V16 low = mul(set1(sums[q]), load_f16(cache.key_grids + cache.slots + at));
          s = fma(s, load_f16(cache.key_grids + at), low);
        }
        s = select(visible(queries[q], at), s, set1(-INFINITY));
        store(scores + q * kChunk + (b0 + b) * kSlotBlock, s);
      }
    }
  }
}

// acc[q] += Σ_t p[q][t]·V[t], t ascending over slots [slot, slot + count); of codes, without their
// grids.
template <Format format, int Q>
inline void add_values(const CacheHead& cache, const float* p, int64_t slot, int64_t count,
                       float* acc) {
  using Element = CacheElement<format>;
  using type = typename Element::type;
  const int64_t d = cache.head_dim, row = d / Element::per;
  const type* values = static_cast<const type*>(cache.values) + slot * row;
  constexpr int P = kTileRegisters >= 24 ? 4 : 2;
  int64_t i = 0;
  const auto part = [&](auto width) {
    constexpr int W = decltype(width)::value;
    V16 sum[Q][W];
    for (int q = 0; q < Q; ++q) {
      for (int w = 0; w < W; ++w) sum[q][w] = load(acc + q * d + i + w * kLanes);
    }
    for (int64_t t = 0; t < count; ++t) {
      V16 v[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        v[w] = Element::read(values + t * row + (i + w * kLanes) / Element::per);
      }
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const V16 share = set1(p[q * kChunk + t]);
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) sum[q][w] = fma(share, v[w], sum[q][w]);
      }
    }
    for (int q = 0; q < Q; ++q) {
      for (int w = 0; w < W; ++w) store(acc + q * d + i + w * kLanes, sum[q][w]);
    }
    i += W * kLanes;
  };
  while (i + P * kLanes <= d) part(std::integral_constant<int, P>{});
  while (i < d) part(std::integral_constant<int, 1>{});
}

inline void rescale(float* acc, int64_t d, float factor) {
  for (int64_t i = 0; i < d; i += kLanes) store(acc + i, mul(load(acc + i), set1(factor)));
}

// scores -> e^(score - most), folding the change of `most` into what was summed before.
inline void fold(float* scores, int64_t lanes, Running& run, float* acc, int64_t d) {
  V16 most = set1(-INFINITY);
  for (int64_t t = 0; t < lanes; t += kLanes) most = max(load(scores + t), most);
  const float now = larger(run.most, reduce_max(most));
  if (now == -INFINITY) {  // nothing seen yet
    for (int64_t t = 0; t < lanes; t += kLanes) store(scores + t, set1(0.0f));
    return;
  }
  if (now != run.most) {
    const float factor = exp(run.most - now);
    run.sum *= factor;
    rescale(acc, d, factor);
    run.most = now;
  }
  V16 sum = set1(0.0f);
  for (int64_t t = 0; t < lanes; t += kLanes) {
    const V16 p = exp(sub(load(scores + t), set1(now)));
    store(scores + t, p);
    sum = add(sum, p);
  }
  run.sum += reduce_add(sum);
}

// Σ_t p_t·(code · scale + low): p becomes p · scale, and Σ_t p_t·low_t goes to every dimension.
inline void use_value_grids(const CacheHead& cache, int64_t slot, int64_t blocks, float* p,
                            float* acc) {
  V16 low = set1(0.0f);
  for (int64_t t = 0; t < blocks * kSlotBlock; t += kLanes) {
    const V16 share = load(p + t);
    low = fma(share, load_f16(cache.value_grids + cache.slots + slot + t), low);
    store(p + t, mul(share, load_f16(cache.value_grids + slot + t)));
  }
  const V16 all = set1(reduce_add(low));
  for (int64_t i = 0; i < cache.head_dim; i += kLanes) store(acc + i, add(load(acc + i), all));
}

inline float dot(const float* a, const float* b, int64_t count) {
  V16 sum = set1(0.0f);
  for (int64_t i = 0; i < count; i += kLanes) sum = fma(load(a + i), load(b + i), sum);
  return reduce_add(sum);
}

// A row's own key and value, in no slot: one more score.
inline void add_own(const Query& query, int64_t d, Running& run, float* acc) {
  const float score = dot(query.q, query.own_key, d);
  const float now = larger(run.most, score);
  const float factor = exp(run.most - now);
  const V16 p = set1(exp(score - now));
  run.sum = run.sum * factor + exp(score - now);
  run.most = now;
  for (int64_t i = 0; i < d; i += kLanes) {
    store(acc + i, fma(p, load(query.own_value + i), mul(load(acc + i), set1(factor))));
  }
}

template <Format format, int Q>
inline void attend_queries(const CacheHead& cache, const Query* queries, float* scratch) {
  const int64_t d = cache.head_dim;
  float* scores = scratch;
  float* acc = scratch + kMaxQueries * kChunk;
  Running run[Q];
  int64_t begin = queries[0].start, end = 0;
  for (int q = 0; q < Q; ++q) {
    begin = smaller(begin, queries[q].start);
    end = larger(end, visible_end(queries[q]));
  }
  std::memset(acc, 0, sizeof(float) * static_cast<size_t>(Q * d));
  // Chunks start at multiples of their size, so that a query's sums do not depend on the others'.
  for (int64_t chunk = begin / kChunk * kChunk; chunk < end; chunk += kChunk) {
    const int64_t from = larger(chunk, begin / kSlotBlock * kSlotBlock);
    const int64_t to = smaller(chunk + kChunk, end);
    const int64_t blocks = (to - from + kSlotBlock - 1) / kSlotBlock;
    score_blocks<format, Q>(cache, queries, from, scores, blocks);
    for (int q = 0; q < Q; ++q) {
      float* s = scores + q * kChunk;
      fold(s, blocks * kSlotBlock, run[q], acc + q * d, d);
      if constexpr (is_coded(format)) use_value_grids(cache, from, blocks, s, acc + q * d);
    }
    add_values<format, Q>(cache, scores, from, to - from, acc);
  }
  for (int q = 0; q < Q; ++q) {
    const Query& query = queries[q];
    if (query.own_key != nullptr) add_own(query, d, run[q], acc + q * d);
    for (int64_t i = 0; i < d; i += kLanes) {
      store(query.out + i, div(load(acc + q * d + i), set1(run[q].sum)));
    }
  }
}

template <Format format>
inline void attend_format(const CacheHead& cache, const Query* queries, int64_t count,
                          float* scratch) {
  int64_t q = 0;
  if constexpr (kTileRegisters >= 24) {
    for (; q + 4 <= count; q += 4) attend_queries<format, 4>(cache, queries + q, scratch);
  }
  for (; q + 3 <= count; q += 3) attend_queries<format, 3>(cache, queries + q, scratch);
  for (; q + 2 <= count; q += 2) attend_queries<format, 2>(cache, queries + q, scratch);
  for (; q < count; ++q) attend_queries<format, 1>(cache, queries + q, scratch);
}

inline void attend(const CacheHead& cache, const Query* queries, int64_t count, float* scratch) {
  switch (cache.format) {
    case Format::bf16:
      attend_format<Format::bf16>(cache, queries, count, scratch);
      break;
    case Format::u8:
      attend_format<Format::u8>(cache, queries, count, scratch);
      break;
    case Format::u4:
      attend_format<Format::u4>(cache, queries, count, scratch);
      break;
    case Format::u2:
      attend_format<Format::u2>(cache, queries, count, scratch);
      break;
    default:
      attend_format<Format::f32>(cache, queries, count, scratch);
      break;
  }
}

}  // namespace
}  // namespace saltire::decoder_layer
