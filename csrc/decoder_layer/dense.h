// Products with weights as the checkpoint has them, row-major [N, K], in f32, bf16 or f16.
#pragma once
#include "core/cpu/vector16.h"
#include "decoder_layer/ahead.h"
#include "decoder_layer/dense_avx2.h"
#include "decoder_layer/op.h"

namespace saltire::decoder_layer {
namespace {

// Weights are fetched at least this many bytes ahead, in whole tiles: the rows of a tile lie side
// by side, so what follows one row is the next row of the same tile, which is being read anyway.
constexpr int64_t kPrefetchBytes = 4096;

inline void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 3);
}

// A staged row keeps natural order for f32 and f16. For bf16 each 32 values are the 16 at even,
// then the 16 at odd places: so a load of 32 weights becomes two f32 operands by one shift and one
// mask.
inline void stage(Format format, const float* x, int64_t k, float* out) {
  const int64_t padded = round_up(k, kStageMultiple);
  if (format == Format::bf16) {
    for (int64_t i = 0; i < k; ++i) {
      out[i / 32 * 32 + i % 2 * 16 + i % 32 / 2] = x[i];
    }
    for (int64_t i = k; i < padded; ++i) out[i / 32 * 32 + i % 2 * 16 + i % 32 / 2] = 0.0f;
    return;
  }
  std::memcpy(out, x, sizeof(float) * static_cast<size_t>(k));
  std::memset(out + k, 0, sizeof(float) * static_cast<size_t>(padded - k));
}

template <Format format>
struct Weights;

template <>
struct Weights<Format::f32> {
  using type = float;
  static constexpr int64_t step = 16;
  static constexpr int parts = 1;
  static inline void read(const type* p, V16 (&w)[parts]) { w[0] = load(p); }
  static inline V16 read16(const type* p) { return load(p); }
};
template <>
struct Weights<Format::f16> {
  using type = uint16_t;
  static constexpr int64_t step = 16;
  static constexpr int parts = 1;
  static inline void read(const type* p, V16 (&w)[parts]) { w[0] = load_f16(p); }
  static inline V16 read16(const type* p) { return load_f16(p); }
};
template <>
struct Weights<Format::bf16> {
  using type = uint16_t;
  static constexpr int64_t step = 32;
  static constexpr int parts = 2;
  static inline void read(const type* p, V16 (&w)[parts]) { load_bf16_pairs(p, w[0], w[1]); }
  static inline V16 read16(const type* p) { return load_bf16(p); }
};

// R rows times C outputs, each with one accumulator of 16 lanes: the order of its sum is the same
// whatever R and C are.
template <Format format, int R, int C>
inline void dot_tile(const Dense& d, const DenseRows& rows, int64_t m0, int64_t n0) {
  using W = Weights<format>;
  using type = typename W::type;
  const type* w[C];
  for (int c = 0; c < C; ++c) w[c] = static_cast<const type*>(d.w) + (n0 + c) * d.k;
  const float* x = rows.x + m0 * rows.x_stride;
  V16 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = set1(0.0f);
  }
  const int64_t whole = d.k / W::step * W::step;
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(type));
  const int64_t tile = C * d.k;
  const int64_t ahead =
      tile * larger<int64_t>(1, kPrefetchBytes / (tile * static_cast<int64_t>(sizeof(type))));
  for (int64_t k = 0; k < whole; k += W::step) {
    V16 operand[C][W::parts];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      if (k % line == 0) prefetch(w[c] + k + ahead);
      W::read(w[c] + k, operand[c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int part = 0; part < W::parts; ++part) {
        const V16 value = load(x + r * rows.x_stride + k + part * kLanes);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[r][c] = fma(value, operand[c][part], acc[r][c]);
      }
    }
  }
  if (whole < d.k) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      type tail[W::step] = {};
      std::memcpy(tail, w[c] + whole, sizeof(type) * static_cast<size_t>(d.k - whole));
      V16 operand[W::parts];
      W::read(tail, operand);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int part = 0; part < W::parts; ++part) {
          const V16 value = load(x + r * rows.x_stride + whole + part * kLanes);
          acc[r][c] = fma(value, operand[part], acc[r][c]);
        }
      }
    }
  }
  // Unrolled to the end: one loop over the sums would keep them all in memory, 3 times slower.
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* y = rows.y + (m0 + r) * rows.y_stride;
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const float sum = reduce_add(acc[r][c]);
      y[n0 + c] = d.bias != nullptr ? sum + d.bias[n0 + c] : sum;
    }
  }
}

// Outputs side by side for R rows. Few rows wait for memory, which is fastest read as one rising
// stream (one token in bf16: 10.6 ms against 13.2 ms with eight streams, 25 against 20 GB/s); more
// rows compute, and share each load among as many accumulators as the registers hold.
constexpr int outputs_of_tile(int R) {
  const int fit = kTileRegisters / R;
  return R <= 4 || fit < 1 ? 1 : fit;
}

template <Format format, int R>
inline void dot_rows(const Dense& d, const DenseRows& rows, int64_t m0, int64_t begin, int64_t end,
                     Ahead& ahead, int64_t lines) {
  constexpr int C = outputs_of_tile(R);
  int64_t n = begin;
  for (; n + C <= end; n += C) {
    ahead.ask(lines * C);
    dot_tile<format, R, C>(d, rows, m0, n);
  }
  for (; n < end; ++n) dot_tile<format, R, 1>(d, rows, m0, n);
}

template <Format format>
inline void dense_format(const Dense& d, const DenseRows& rows, int64_t begin, int64_t end) {
  constexpr int most = kTileRegisters < 8 ? 4 : 8;
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (rows.rows >= kHalvesFrom && d.k % Weights<format>::step == 0) {
    dense_halves<format>(d, rows, begin, end);
    return;
  }
#endif
  // Tiles of nearly equal height: 9 rows are 5 and 4, not 8 and 1.
  const int64_t tiles = (rows.rows + most - 1) / most;
  // Tiles take turns at a panel, which stays in L2, and each asks for its share of the next one.
  const int64_t bytes = d.k * static_cast<int64_t>(sizeof(typename Weights<format>::type));
  const int64_t step = tiles == 1 ? end - begin : kPanel;
  const int64_t lines = tiles == 1 ? 0 : bytes / 64 / tiles + 1;
  const auto* w = static_cast<const char*>(d.w);
  for (int64_t from = begin; from < end; from += step) {
    const int64_t to = smaller(from + step, end);
    Ahead ahead{w + to * bytes, w + smaller(to + step, d.n) * bytes};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m0 = rows.rows * tile / tiles;
      switch (rows.rows * (tile + 1) / tiles - m0) {
        case 1:
          dot_rows<format, 1>(d, rows, m0, from, to, ahead, lines);
          break;
        case 2:
          dot_rows<format, 2>(d, rows, m0, from, to, ahead, lines);
          break;
        case 3:
          dot_rows<format, 3>(d, rows, m0, from, to, ahead, lines);
          break;
        case 4:
          dot_rows<format, 4>(d, rows, m0, from, to, ahead, lines);
          break;
        case 5:
          dot_rows < format, most<5 ? 1 : 5>(d, rows, m0, from, to, ahead, lines);
          break;
        case 6:
          dot_rows < format, most<6 ? 1 : 6>(d, rows, m0, from, to, ahead, lines);
          break;
        case 7:
          dot_rows < format, most<7 ? 1 : 7>(d, rows, m0, from, to, ahead, lines);
          break;
        default:
          dot_rows < format, most<8 ? 1 : 8>(d, rows, m0, from, to, ahead, lines);
          break;
      }
    }
  }
}

inline void dense(const Dense& d, const DenseRows& rows, int64_t begin, int64_t end) {
  switch (d.format) {
    case Format::bf16:
      dense_format<Format::bf16>(d, rows, begin, end);
      break;
    case Format::f16:
      dense_format<Format::f16>(d, rows, begin, end);
      break;
    default:
      dense_format<Format::f32>(d, rows, begin, end);
      break;
  }
}

// --- prefill ---------------------------------------------------------------------------------

// Weights [n0, n0 + 32) x [0, K) -> panel [K][32] f32; outputs past n are zeros.
template <Format format>
inline void pack_panel(const Dense& d, int64_t n0, float* panel) {
  using W = Weights<format>;
  using type = typename W::type;
  const int64_t count = smaller<int64_t>(kPanel, d.n - n0);
  if (count < kPanel) std::memset(panel, 0, sizeof(float) * static_cast<size_t>(d.k * kPanel));
  const type* w = static_cast<const type*>(d.w) + n0 * d.k;
  const int64_t whole = d.k / kLanes * kLanes;
  // 16 inputs of each output at a time: the 16 panel lines being written stay in L1.
  for (int64_t k = 0; k < whole; k += kLanes) {
    int64_t n = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
    for (; n + kHalf <= count; n += kHalf) {
      V16 eight[kHalf];
      for (int i = 0; i < kHalf; ++i) eight[i] = W::read16(w + (n + i) * d.k + k);
      store_transposed(eight, panel + k * kPanel + n, kPanel);
    }
#endif
    for (; n < count; ++n) {
      float lanes[kLanes];
      store(lanes, W::read16(w + n * d.k + k));
      for (int i = 0; i < kLanes; ++i) panel[(k + i) * kPanel + n] = lanes[i];
    }
  }
  for (int64_t n = 0; n < count && whole < d.k; ++n) {
    type tail[kLanes] = {};
    std::memcpy(tail, w + n * d.k + whole, sizeof(type) * static_cast<size_t>(d.k - whole));
    float lanes[kLanes];
    store(lanes, W::read16(tail));
    for (int64_t k = whole; k < d.k; ++k) panel[k * kPanel + n] = lanes[k - whole];
  }
}

// R rows times one panel: every output has one accumulator, k ascending.
template <int R, int C>
inline void panel_tile(const Dense& d, const DenseRows& rows, const float* panel, int64_t m0,
                       int64_t n0) {
  const float* x = rows.x + m0 * rows.x_stride;
  V16 acc[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) acc[r][c] = set1(0.0f);
  }
  for (int64_t k = 0; k < d.k; ++k) {
    V16 w[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) w[c] = load(panel + k * kPanel + c * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const V16 value = set1(x[r * rows.x_stride + k]);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) acc[r][c] = fma(value, w[c], acc[r][c]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    float* y = rows.y + (m0 + r) * rows.y_stride;
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      float lanes[kLanes];
      store(lanes, acc[r][c]);
      const int64_t at = n0 + c * kLanes;
      const int64_t count = smaller<int64_t>(kLanes, d.n - at);
      for (int64_t i = 0; i < count; ++i) {
        y[at + i] = d.bias != nullptr ? lanes[i] + d.bias[at + i] : lanes[i];
      }
    }
  }
}

constexpr int kPanelVectors = kTileRegisters >= 24 ? 2 : 1;
// On AVX2 a vector of outputs is two registers: 6 rows are 12 sums beside 2 weights and a value.
constexpr int kPanelRows = kTileRegisters >= 24 ? 12 : 6;

template <int R>
inline void panel_rows(const Dense& d, const DenseRows& rows, const float* panel, int64_t m0,
                       int64_t n0) {
  for (int64_t c = 0; c < kPanel / kLanes; c += kPanelVectors) {
    if (n0 + c * kLanes >= d.n) break;
    panel_tile<R, kPanelVectors>(d, rows, panel + c * kLanes, m0, n0 + c * kLanes);
  }
}

inline void dense_panel(const Dense& d, const DenseRows& rows, int64_t begin, int64_t end,
                        float* scratch) {
  for (int64_t n = begin; n < end; n += kPanel) {
    switch (d.format) {
      case Format::bf16:
        pack_panel<Format::bf16>(d, n, scratch);
        break;
      case Format::f16:
        pack_panel<Format::f16>(d, n, scratch);
        break;
      default:
        pack_panel<Format::f32>(d, n, scratch);
        break;
    }
    // The next panel's weights come from memory while this one is used.
    const int64_t bytes = d.k * format_bits(d.format) / 8;
    const auto* next = static_cast<const char*>(d.w) + (n + kPanel) * bytes;
    const int64_t last = smaller<int64_t>(n + 2 * kPanel, d.n);
    Ahead ahead{next, static_cast<const char*>(d.w) + last * bytes};
    const int64_t lines = kPanel * bytes / 64 * kPanelRows / rows.rows + 1;
    int64_t m = 0;
    for (; m + kPanelRows <= rows.rows; m += kPanelRows) {
      ahead.ask(lines);
      panel_rows<kPanelRows>(d, rows, scratch, m, n);
    }
    for (; m + 4 <= rows.rows; m += 4) panel_rows<4>(d, rows, scratch, m, n);
    for (; m + 2 <= rows.rows; m += 2) panel_rows<2>(d, rows, scratch, m, n);
    for (; m < rows.rows; ++m) panel_rows<1>(d, rows, scratch, m, n);
  }
}

}  // namespace
}  // namespace saltire::decoder_layer
