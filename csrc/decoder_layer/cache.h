// The static cache: how its values are stored and read.
#pragma once
#include <type_traits>

#include "core/cpu/vector16.h"
#include "decoder_layer/op.h"

namespace saltire::decoder_layer {
namespace {

// per: dimensions of a byte (1 without codes). Keys: raw loads them for 16 slots, part<j> gives the
// j-th. Values: read gives 16 dimensions.
template <Format format>
struct CacheElement;
template <>
struct CacheElement<Format::f32> {
  using type = float;
  using Raw = V16;
  static constexpr int per = 1;
  static inline V16 read(const type* p) { return load(p); }
  static inline Raw raw(const type* p) { return load(p); }
  template <int>
  static inline V16 part(Raw raw) {
    return raw;
  }
};
template <>
struct CacheElement<Format::bf16> {
  using type = uint16_t;
  using Raw = V16;
  static constexpr int per = 1;
  static inline V16 read(const type* p) { return load_bf16(p); }
  static inline Raw raw(const type* p) { return load_bf16(p); }
  template <int>
  static inline V16 part(Raw raw) {
    return raw;
  }
};
template <int bits>
struct CodeElement {
  using type = uint8_t;
  using Raw = Bytes16;
  static constexpr int per = 8 / bits;
  static inline V16 read(const type* p) { return load_codes<bits>(p); }
  static inline Raw raw(const type* p) { return load_bytes(p); }
  template <int place>
  static inline V16 part(Raw raw) {
    return codes_of<bits, place * bits>(raw);
  }
};
template <>
struct CacheElement<Format::u8> : CodeElement<8> {};
template <>
struct CacheElement<Format::u4> : CodeElement<4> {};
template <>
struct CacheElement<Format::u2> : CodeElement<2> {};

// f(0), f(1), ... as constants.
template <int count, typename F>
inline void for_each_place(const F& f) {
  f(std::integral_constant<int, 0>{});
  if constexpr (count > 1) f(std::integral_constant<int, 1>{});
  if constexpr (count > 2) {
    f(std::integral_constant<int, 2>{});
    f(std::integral_constant<int, 3>{});
  }
}

inline float sum(const float* x, int64_t count) {
  V16 all = set1(0.0f);
  for (int64_t i = 0; i < count; i += kLanes) all = add(all, load(x + i));
  return reduce_add(all);
}

// --- append ----------------------------------------------------------------------------------

inline void rotate_head(float* head, int64_t head_dim) {
  const int64_t block = head_dim & -head_dim;
  for (int64_t h = 1; h < block; h *= 2) {
    for (int64_t i = 0; i < head_dim; i += 2 * h) {
      for (int64_t j = i; j < i + h; ++j) {
        const float a = head[j], b = head[j + h];
        head[j] = a + b;
        head[j + h] = a - b;
      }
    }
  }
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(block));
  for (int64_t i = 0; i < head_dim; ++i) head[i] *= scale;
}

constexpr float kMostF16 = 65504.0f;

// The grid of a head and its codes; what is not finite marks the head with a NaN. Four levels span
// 0.65 of its range, so 0.175 is cut off at either end: reference/kv_cache.py derives it.
inline void round_head(const float* x, int64_t d, int64_t bits, uint16_t& scale, uint16_t& low,
                       uint8_t* codes) {
  const auto top = static_cast<float>((1 << bits) - 1);
  float least = x[0], most = x[0], zero = 0.0f;  // zero turns NaN where a value is not finite
  for (int64_t i = 0; i < d; ++i) {
    least = smaller(least, x[i]);
    most = larger(most, x[i]);
    zero += x[i] * 0.0f;
  }
  const float cut = (most - least) * (bits == 2 ? 0.175f : 0.0f);
  const float begin = least + cut, end = most - cut;
  scale = f32_to_f16(smaller((end - begin) / top, kMostF16));
  low = f32_to_f16(smaller(larger(begin, -kMostF16), kMostF16) + zero);
  const float step = f16_to_f32(scale), origin = f16_to_f32(low);
  for (int64_t i = 0; i < d; ++i) {
    const float level = step > 0.0f ? __builtin_nearbyintf((x[i] - origin) / step) : 0.0f;
    codes[i] = level > 0.0f ? static_cast<uint8_t>(smaller(level, top)) : uint8_t{0};
  }
}

// bits: of a code; see CacheHead for the layouts.
inline void append_codes(const CacheHead& cache, int64_t slot, const float* key, const float* value,
                         int64_t bits) {
  const int64_t d = cache.head_dim, per = 8 / bits, bytes = d / per, stride = kLanes / per;
  uint8_t codes[kMaxHeadDim];
  auto* keys = static_cast<uint8_t*>(cache.keys) + slot / kSlotBlock * kSlotBlock * bytes +
               slot % kSlotBlock;
  round_head(key, d, bits, cache.key_grids[slot], cache.key_grids[cache.slots + slot], codes);
  for (int64_t i = 0; i < bytes; ++i) {
    uint32_t byte = 0;
    for (int64_t j = 0; j < per; ++j) byte |= static_cast<uint32_t>(codes[i * per + j]) << j * bits;
    keys[i * kSlotBlock] = static_cast<uint8_t>(byte);
  }
  auto* values = static_cast<uint8_t*>(cache.values) + slot * bytes;
  round_head(value, d, bits, cache.value_grids[slot], cache.value_grids[cache.slots + slot], codes);
  for (int64_t i = 0; i < bytes; ++i) {
    const uint8_t* lanes = codes + i / stride * kLanes + i % stride;
    uint32_t byte = 0;
    for (int64_t j = 0; j < per; ++j) byte |= static_cast<uint32_t>(lanes[j * stride]) << j * bits;
    values[i] = static_cast<uint8_t>(byte);
  }
}

inline void append(const CacheHead& cache, int64_t slot, const float* key, const float* value) {
  const int64_t d = cache.head_dim;
  const int64_t key_at = slot / kSlotBlock * kSlotBlock * d + slot % kSlotBlock;
  const int64_t value_at = slot * d;
  if (cache.format == Format::f32) {
    auto* keys = static_cast<float*>(cache.keys) + key_at;
    for (int64_t i = 0; i < d; ++i) keys[i * kSlotBlock] = key[i];
    std::memcpy(static_cast<float*>(cache.values) + value_at, value,
                sizeof(float) * static_cast<size_t>(d));
  } else if (cache.format == Format::bf16) {
    auto* keys = static_cast<uint16_t*>(cache.keys) + key_at;
    auto* values = static_cast<uint16_t*>(cache.values) + value_at;
    for (int64_t i = 0; i < d; ++i) keys[i * kSlotBlock] = f32_to_bf16(key[i]);
    for (int64_t i = 0; i < d; ++i) values[i] = f32_to_bf16(value[i]);
  } else {
    append_codes(cache, slot, key, value, format_bits(cache.format));
  }
}

}  // namespace
}  // namespace saltire::decoder_layer
