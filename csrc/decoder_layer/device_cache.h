// How a kernel's lanes read the cache (op.h draws it): 8 slots of a row of keys, 8 dimensions of a
// slot's value, in one or two loads.
#pragma once
#include "core/cuda/ptx.h"
#include "decoder_layer/op.h"

namespace saltire::decoder_layer {
namespace {

using namespace saltire::cuda;

constexpr int kLaneValues = 8;

// words: of a lane's load. per: dimensions that a key's byte holds (1 without codes).
template <Format format>
struct DeviceElement;
template <>
struct DeviceElement<Format::f32> {
  static constexpr int words = 8, per = 1, bits = 32;
};
template <>
struct DeviceElement<Format::bf16> {
  static constexpr int words = 4, per = 1, bits = 16;
};
template <>
struct DeviceElement<Format::u8> {
  static constexpr int words = 2, per = 1, bits = 8;
};
template <>
struct DeviceElement<Format::u4> {
  static constexpr int words = 2, per = 2, bits = 4;
};
template <>
struct DeviceElement<Format::u2> {
  static constexpr int words = 2, per = 4, bits = 2;
};

template <int words>
SALTIRE_DEVICE void load_words(const uint8_t* from, uint32_t (&raw)[words]) {
  if constexpr (words >= 4) {
#pragma unroll
    for (int i = 0; i < words; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from + 4 * i);
      raw[i] = v.x;
      raw[i + 1] = v.y;
      raw[i + 2] = v.z;
      raw[i + 3] = v.w;
    }
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    raw[0] = v.x;
    raw[1] = v.y;
  }
}

// An integer below 2^23 as a float, by an OR and a sum: conversions have a quarter of their rate.
SALTIRE_DEVICE float small_float(uint32_t value) {
  return float_of(value | 0x4b000000u) - 8388608.0f;
}

SALTIRE_DEVICE float bf16_of(uint32_t word, int half) {
  return float_of(half == 0 ? word << 16 : word & 0xffff0000u);
}

// Dimension `place` of the row for the lane's 8 slots.
template <Format format, int words>
SALTIRE_DEVICE void read_keys(const uint32_t (&raw)[words], int place, float (&k)[kLaneValues]) {
  constexpr int bits = DeviceElement<format>::bits;
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    if constexpr (format == Format::f32) {
      k[i] = float_of(raw[i]);
    } else if constexpr (format == Format::bf16) {
      k[i] = bf16_of(raw[i / 2], i % 2);
    } else {
      k[i] = small_float(raw[i / 4] >> (i % 4 * 8 + place * bits) & ((1u << bits) - 1));
    }
  }
}

// Where a lane's 8 dimensions of a slot start, in bytes; v: which 8 dimensions.
template <Format format>
SALTIRE_DEVICE int value_offset(int v) {
  if constexpr (format == Format::f32) return 32 * v;
  if constexpr (format == Format::bf16) return 16 * v;
  if constexpr (format == Format::u8) return 8 * v;
  if constexpr (format == Format::u4) return v / 2 * 8;  // 16 dimensions are 8 bytes,
  return v / 2 * 4;                                      // or 4: two lanes read the same
}

template <Format format, int words>
SALTIRE_DEVICE void load_value(const uint8_t* from, uint32_t (&raw)[words]) {
  if constexpr (format == Format::u2) {
    raw[0] = *reinterpret_cast<const uint32_t*>(from);
    raw[1] = 0;
  } else {
    load_words(from, raw);
  }
}

template <Format format, int words>
SALTIRE_DEVICE void read_value(const uint32_t (&raw)[words], int v, float (&x)[kLaneValues]) {
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    if constexpr (format == Format::f32) {
      x[i] = float_of(raw[i]);
    } else if constexpr (format == Format::bf16) {
      x[i] = bf16_of(raw[i / 2], i % 2);
    } else if constexpr (format == Format::u8) {
      x[i] = small_float(raw[i / 4] >> (i % 4 * 8) & 255u);
    } else if constexpr (format == Format::u4) {
      x[i] = small_float(raw[i / 4] >> (i % 4 * 8 + v % 2 * 4) & 15u);
    } else {
      x[i] = small_float(raw[0] >> (i % 4 * 8 + v % 2 * 4 + i / 4 * 2) & 3u);
    }
  }
}

// The sum over the lanes of equal parity of x[q][i], where i is the lane's bits 4, 3, 2: halves are
// exchanged, so that it takes 8 shuffles a query instead of 32.
SALTIRE_DEVICE float scatter_sum(float (&x)[kLaneValues], int lane) {
#pragma unroll
  for (int mask = 16, count = 4; mask >= 4; mask /= 2, count /= 2) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float away = upper ? x[i] : x[i + count];
      const float here = upper ? x[i + count] : x[i];
      x[i] = here + shuffle_xor(away, mask);
    }
  }
  return x[0] + shuffle_xor(x[0], 2);
}

}  // namespace
}  // namespace saltire::decoder_layer
