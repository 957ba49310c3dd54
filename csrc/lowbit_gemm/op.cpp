// Schemas, checks, preparation of the activations, the choice of kernel and threads.
#include "lowbit_gemm/op.h"

#include <tuple>
#include <vector>

#include "core/isa.h"
#include "core/quant_linear.h"
#include "core/threads.h"
#include "lowbit_gemm/arguments.h"
#include "lowbit_gemm/layout.h"
#include "lowbit_gemm/plan.h"

namespace saltire::lowbit_gemm {
namespace {

constexpr int64_t kRowsPerThread = 16;  // grain of loops that run at load and save only

Tensor pack_weight(const Tensor& codes, int64_t bits) {
  const char* op = "pack_weight";
  check_bits(op, bits);
  check_cpu(op, "codes", codes);
  check_dtype(op, "codes", codes, ScalarType::Byte);
  check_dim(op, "codes", codes, 2);
  const int64_t n = codes.size(0);
  const int64_t k = codes.size(1);
  const int64_t per_byte = 8 / container_bits(static_cast<int>(bits));
  SALTIRE_CHECK(k % per_byte == 0, op, ": codes is ", describe(codes), "; K must be a multiple of ",
                per_byte, ", the codes of a byte. Pad it.");
  const Tensor in = as_contiguous(codes);
  Tensor out = new_tensor(codes, {n, k / per_byte}, ScalarType::Byte);
  const auto* from = static_cast<const uint8_t*>(in.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  std::vector<uint8_t> any(static_cast<size_t>(n));
  parallel_for(n, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      any[static_cast<size_t>(row)] = pack_rows(from, to, k, static_cast<int>(bits), row, row + 1);
    }
  });
  for (int64_t row = 0; row < n; ++row) {
    SALTIRE_CHECK(any[static_cast<size_t>(row)] >> bits == 0, op, ": row ", row,
                  " holds a code of ", 1 << bits, " or more; ", bits, "-bit codes are 0..",
                  (1 << bits) - 1, ". Clamp the codes.");
  }
  return out;
}

Tensor unpack_weight(const Tensor& packed, int64_t bits) {
  const char* op = "unpack_weight";
  check_bits(op, bits);
  check_cpu(op, "packed", packed);
  check_dtype(op, "packed", packed, ScalarType::Byte);
  check_dim(op, "packed", packed, 2);
  const int64_t n = packed.size(0);
  const int64_t k = packed.size(1) * (8 / container_bits(static_cast<int>(bits)));
  const Tensor in = as_contiguous(packed);
  Tensor out = new_tensor(packed, {n, k}, ScalarType::Byte);
  const auto* from = static_cast<const uint8_t*>(in.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  parallel_for(n, kRowsPerThread, [&](int64_t begin, int64_t end) {
    unpack_rows(from, to, k, static_cast<int>(bits), begin, end);
  });
  return out;
}

Tensor lowbit_prepack(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero,
                      int64_t bits, int64_t group) {
  const char* op = "lowbit_prepack";
  check_cpu(op, "packed", packed);
  const Checkpoint c = check_checkpoint(op, packed, scale, zero, bits, group);
  const WeightLayout layout = {c.n, c.k, c.group, c.bits, zero.has_value(), c.table};
  Tensor out = new_tensor(packed, {layout.bytes()}, ScalarType::Byte);
  auto* buffer = static_cast<uint8_t*>(out.mutable_data_ptr());
  const auto* from = static_cast<const uint8_t*>(c.packed.const_data_ptr());
  const void* scale_data = c.scale.const_data_ptr();
  const void* zero_data = c.zero_data();
  write_header(layout, buffer);
  parallel_for(layout.blocks(), 1, [&](int64_t begin, int64_t end) {
    prepack_blocks(layout, from, scale_data, zero_data, buffer, begin, end);
  });
  return out;
}

// Reads the header of w and checks it against what the caller believes.
WeightLayout open_weight(const char* op, const Tensor& w, int64_t n, int64_t k, int64_t bits,
                         int64_t group) {
  check_cpu(op, "w", w);
  check_dtype(op, "w", w, ScalarType::Byte);
  check_dim(op, "w", w, 1);
  const WeightLayout layout =
      read_header(op, static_cast<const uint8_t*>(w.const_data_ptr()), w.numel());
  const bool same = layout.n == n && layout.k == k && layout.bits == bits &&
                    layout.group == (group == 0 ? k : group);
  SALTIRE_CHECK(same, op, ": w was prepacked with N = ", layout.n, ", K = ", layout.k,
                ", bits = ", layout.bits, ", group = ", layout.group,
                " (per channel: K), but N = ", n, ", K = ", k, ", bits = ", bits,
                ", group = ", group, " were given. Pass what was prepacked.");
  return layout;
}

std::tuple<Tensor, Tensor, Tensor> lowbit_unprepack(const Tensor& w, int64_t n, int64_t k,
                                                    int64_t bits, int64_t group, bool has_zero,
                                                    ScalarType scale_dtype) {
  const char* op = "lowbit_unprepack";
  const Tensor in = as_contiguous(w);
  const WeightLayout layout = open_weight(op, in, n, k, bits, group);
  SALTIRE_CHECK(layout.has_zero == has_zero, op, ": w was prepacked ",
                layout.has_zero ? "with" : "without",
                " zero points, but has_zero = ", has_zero ? "True" : "False",
                " was given. Pass what was prepacked.");
  SALTIRE_CHECK(scalar_type(layout.table) == scale_dtype, op, ": w was prepacked with scales of ",
                dtype_name(scalar_type(layout.table)),
                ", but scale_dtype = ", dtype_name(scale_dtype),
                " was given. Pass what was prepacked.");
  Tensor packed = new_tensor(w, {n, k * container_bits(layout.bits) / 8}, ScalarType::Byte);
  Tensor scale = new_tensor(w, {n, layout.groups()}, scale_dtype);
  Tensor zero =
      has_zero ? new_tensor(w, {n, layout.groups()}, scale_dtype) : new_tensor(w, {0}, scale_dtype);
  const auto* from = static_cast<const uint8_t*>(in.const_data_ptr());
  auto* packed_data = static_cast<uint8_t*>(packed.mutable_data_ptr());
  void* scale_data = scale.mutable_data_ptr();
  void* zero_data = zero.mutable_data_ptr();
  parallel_for(layout.blocks(), 1, [&](int64_t begin, int64_t end) {
    unprepack_blocks(layout, from, packed_data, scale_data, zero_data, begin, end);
  });
  return {packed, scale, zero};
}

// --- the product -------------------------------------------------------------------------------

struct KernelChoice {
  Kernel kernel;
  int64_t rows;  // of a tile, at most
};

KernelChoice choose_kernel() {
  switch (current_isa()) {
#if defined(SALTIRE_X86)
    case Isa::avx512:
      return {gemm_avx512, kAvx512Rows};
    case Isa::avx2:
      return {gemm_avx2, kAvx2Rows};
#endif
    default:
      return {gemm_ref, kRefRows};
  }
}

// Rows of a tile -> [K / 4][rows][4]: see Gemm.
void pack_tile(const int8_t* codes, int8_t* out, int64_t rows, int64_t k) {
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* row = codes + r * k;
    for (int64_t quad = 0; quad < k / 4; ++quad) {
      std::memcpy(out + (quad * rows + r) * 4, row + quad * 4, 4);
    }
  }
}

void shift_tile(const WeightLayout& layout, const int32_t* sums, float* out, int64_t rows) {
  const bool plain = layout.has_zero || sum_centre(layout.bits) != 0;
  const float zero = plain ? 1.0f : symmetric_zero(layout.bits);
  for (int64_t g = 0; g < layout.groups(); ++g) {
    for (int64_t r = 0; r < rows; ++r) {
      out[g * rows + r] = zero * static_cast<float>(sums[r * layout.groups() + g]);
    }
  }
}

// Packs the activations for the kernel and runs it on all threads.
void run(Gemm& gemm, const KernelChoice& choice, const int8_t* codes, const int32_t* sums) {
  const char* op = "lowbit_gemm";
  const WeightLayout& layout = gemm.layout;
  const int64_t m = gemm.tiles.rows;
  const bool check_range = gemm.act_bits < 8;
  const int q = max_activation_code(gemm.act_bits);
  std::vector<float> shift(static_cast<size_t>(m * layout.groups()));
  // One row is already tile-major.
  std::vector<int8_t> x(static_cast<size_t>(m == 1 ? 0 : m * layout.k));
  std::vector<unsigned char> bad(static_cast<size_t>(gemm.tiles.tiles));
  // 64 KB of codes a thread: a few µs, as in make_plan.
  const int64_t grain = std::max<int64_t>(1, 65536 / (choice.rows * layout.k));
  parallel_for(gemm.tiles.tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row0 = gemm.tiles.begin(tile);
      const int64_t rows = gemm.tiles.begin(tile + 1) - row0;
      const int8_t* from = codes + row0 * layout.k;
      if (check_range) bad[static_cast<size_t>(tile)] = codes_exceed(from, rows * layout.k, q);
      if (m > 1) pack_tile(from, x.data() + row0 * layout.k, rows, layout.k);
      shift_tile(layout, sums + row0 * layout.groups(), shift.data() + row0 * layout.groups(),
                 rows);
    }
  });
  for (const unsigned char tile : bad) {
    SALTIRE_CHECK(tile == 0, op, ": codes holds a value outside -", q, "..", q,
                  ", the range of act_bits = ", gemm.act_bits,
                  ". Pass the bits that the codes were quantised to.");
  }
  gemm.x = m == 1 ? codes : x.data();
  gemm.shift = shift.data();
  const int64_t blocks = layout.blocks();
  const int64_t tiles = gemm.tiles.tiles;
  const Plan plan = make_plan(blocks, tiles, m * layout.n * layout.k, thread_count());
  // A share is an index, so that the split is the plan's and not parallel_for's.
  parallel_for(plan.parts(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t a = part % plan.across;
      const int64_t d = part / plan.across;
      choice.kernel(gemm, range_begin(blocks, plan.across, a),
                    range_begin(blocks, plan.across, a + 1), range_begin(tiles, plan.down, d),
                    range_begin(tiles, plan.down, d + 1));
    }
  });
}

Tensor lowbit_gemm(const Tensor& codes, const Tensor& x_scale, const Tensor& x_sum, const Tensor& w,
                   int64_t n, int64_t bits, int64_t group, int64_t act_bits, ScalarType out_dtype,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& low_rank_x,
                   const std::optional<Tensor>& low_rank_w) {
  const char* op = "lowbit_gemm";
  check_bits(op, bits);
  check_cpu(op, "codes", codes);
  check_codes(op, codes, bits, group, act_bits);
  const Tensor weight = as_contiguous(w);
  Gemm gemm;
  gemm.layout = open_weight(op, weight, n, codes.size(1), bits, group);
  const Operands o = check_operands(op, codes, x_scale, x_sum, n, group, act_bits, out_dtype, bias,
                                    low_rank_x, low_rank_w);
  Tensor out = new_tensor(codes, {o.m, n}, out_dtype);
  if (o.m == 0) return out;

  const KernelChoice choice = choose_kernel();
  gemm.w = static_cast<const uint8_t*>(weight.const_data_ptr()) + sizeof(Header);
  gemm.act_bits = o.act_bits;
  gemm.tiles = RowTiles::make(o.m, choice.rows);
  gemm.x_scale = static_cast<const float*>(o.x_scale.const_data_ptr());
  gemm.bias = data_of(o.bias);
  gemm.low_rank_x = data_of(o.low_rank_x);
  gemm.low_rank_w = data_of(o.low_rank_w);
  gemm.rank = o.rank;
  gemm.out = out.mutable_data_ptr();
  gemm.out_type = o.out;
  run(gemm, choice, static_cast<const int8_t*>(o.codes.const_data_ptr()),
      static_cast<const int32_t*>(o.x_sum.const_data_ptr()));
  return out;
}

// --- for rooms that run whole models -----------------------------------------------------------

static_assert(kBlock == 32, "QuantKernels::multiply takes ranges of 32 outputs");

void open_packed(const char* op, PackedWeight& weight) {
  const WeightLayout layout = read_header(op, weight.buffer, weight.bytes);
  weight.n = layout.n;
  weight.k = layout.k;
  weight.group = layout.group;
  weight.shift_kind = layout.has_zero ? 0 : layout.bits;
}

RowTiles tiles_of(int64_t rows) {
  return RowTiles::make(rows, choose_kernel().rows);
}

int64_t tile_count(int64_t rows) {
  return tiles_of(rows).tiles;
}

int64_t tile_begin(int64_t rows, int64_t tile) {
  return tiles_of(rows).begin(tile);
}

void pack_rows_of_tile(const PackedWeight& weight, const int8_t* codes, const int32_t* sums,
                       int64_t rows, int64_t tile, int8_t* x, float* shift) {
  const WeightLayout layout = read_header("pack", weight.buffer, weight.bytes);
  const RowTiles tiles = tiles_of(rows);
  const int64_t row0 = tiles.begin(tile), count = tiles.begin(tile + 1) - row0;
  const int64_t groups = layout.groups();
  pack_tile(codes + row0 * layout.k, x + row0 * layout.k, count, layout.k);
  shift_tile(layout, sums + row0 * groups, shift + row0 * groups, count);
}

void multiply_rows(const PackedWeight& weight, const QuantRows& rows, float* y, int64_t begin,
                   int64_t end) {
  const KernelChoice choice = choose_kernel();
  Gemm gemm;
  gemm.layout = read_header("multiply", weight.buffer, weight.bytes);
  gemm.w = weight.buffer + sizeof(Header);
  gemm.act_bits = rows.act_bits;
  gemm.tiles = RowTiles::make(rows.rows, choice.rows);
  gemm.x = rows.x;
  gemm.shift = rows.shift;
  gemm.x_scale = rows.scale;
  gemm.bias = weight.bias;
  gemm.low_rank_x = rows.low_rank_x;
  gemm.low_rank_w = weight.low_rank_w;
  gemm.rank = weight.rank;
  gemm.out = y;
  choice.kernel(gemm, begin / kBlock, (end + kBlock - 1) / kBlock, 0, gemm.tiles.tiles);
}

const bool registered = [] {
  QuantKernels& table = quant_kernel_table();
  table.open_weight = open_packed;
  table.tiles = tile_count;
  table.tile_begin = tile_begin;
  table.pack = pack_rows_of_tile;
  table.multiply = multiply_rows;
  return true;
}();

}  // namespace
}  // namespace saltire::lowbit_gemm

STABLE_TORCH_LIBRARY_FRAGMENT(saltire, m) {
  m.def("pack_weight(Tensor codes, int bits) -> Tensor");
  m.def("unpack_weight(Tensor packed, int bits) -> Tensor");
  m.def("lowbit_prepack(Tensor packed, Tensor scale, Tensor? zero, int bits, int group) -> Tensor");
  m.def(
      "lowbit_unprepack(Tensor w, int n, int k, int bits, int group, bool has_zero, ScalarType "
      "scale_dtype) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lowbit_gemm(Tensor codes, Tensor x_scale, Tensor x_sum, Tensor w, int n, int bits, int "
      "group, *, int act_bits=8, ScalarType out_dtype, Tensor? bias=None, Tensor? low_rank_x=None, "
      "Tensor? low_rank_w=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(saltire, CPU, m) {
  using namespace saltire::lowbit_gemm;
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight));
  m.impl("lowbit_prepack", TORCH_BOX(&lowbit_prepack));
  m.impl("lowbit_unprepack", TORCH_BOX(&lowbit_unprepack));
  m.impl("lowbit_gemm", TORCH_BOX(&lowbit_gemm));
}
