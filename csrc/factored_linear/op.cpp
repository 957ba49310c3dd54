// Registers factored_gemm, checks what it gets, and runs the phases.
#include "factored_linear/op.h"

#include <algorithm>
#include <optional>

#include "core/code_rows.h"
#include "core/formats.h"
#include "core/quant_linear.h"
#include "core/tensor.h"
#include "core/threads.h"

namespace saltire::factored_linear {
namespace {

constexpr const char* kOp = "factored_gemm";

PackedWeight open(const char* name, const Tensor& w) {
  check_cpu(kOp, name, w);
  check_dtype(kOp, name, w, ScalarType::Byte);
  check_dim(kOp, name, w, 1);
  SALTIRE_CHECK(w.is_contiguous(), kOp, ": ", name, " is not contiguous. Call .contiguous().");
  PackedWeight out;
  out.buffer = static_cast<const uint8_t*>(w.const_data_ptr());
  out.bytes = w.numel();
  quant_kernels().open_weight(kOp, out);
  return out;
}

struct Tokens {
  const int8_t* codes;  // [M, K]
  const float* scale;   // [M]
  const int32_t* sums;  // [M, K / group]
  int act_bits;
};

// Some rows through both factors, on a team that splits every phase.
class Block {
 public:
  Block(const PackedWeight& down, const PackedWeight& up, const TokenQuantizer& between)
      : down_(down), up_(up), between_(between) {}

  void run(Team& team, const Tokens& tokens, int64_t first, int64_t rows, float* y) {
    const int64_t K = down_.k, R = down_.n, groups = K / down_.group;
    const QuantKernels& quant = quant_kernels();
    auto* packed = reinterpret_cast<int8_t*>(packed_.get((rows * K + 3) / 4));
    float* shifts = shifts_.get(rows * groups);
    float* ranks = ranks_.get(rows * R);
    middle_.open(between_, up_, rows);
    const int64_t tiles = quant.tiles(rows);
    team.run(tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        quant.pack(down_, tokens.codes + first * K, tokens.sums + first * groups, rows, tile,
                   packed, shifts);
      }
    });
    const QuantRows in = {rows, tokens.act_bits, packed, tokens.scale + first, shifts, nullptr};
    product(team, down_, in, ranks);
    team.run(tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t last = quant.tile_begin(rows, tile + 1);
        for (int64_t m = quant.tile_begin(rows, tile); m < last; ++m) {
          middle_.quantize(ranks + m * R, m);
        }
        middle_.pack(tile);
      }
    });
    product(team, up_, middle_.ready(), y + first * up_.n);
  }

 private:
  static void product(Team& team, const PackedWeight& w, const QuantRows& rows, float* y) {
    const int64_t panels = (w.n + kPanel - 1) / kPanel;
    // Some shares a thread, so that all end together.
    const int64_t share = std::max<int64_t>(1, panels / (6 * team.threads()));
    team.run(panels, share, [&](int64_t begin, int64_t end) {
      quant_kernels().multiply(w, rows, y, begin * kPanel, std::min(end * kPanel, w.n));
    });
  }

  const PackedWeight &down_, &up_;
  const TokenQuantizer& between_;
  Floats packed_, shifts_, ranks_;
  CodeRows middle_;
};

const float* matrix(const char* name, const std::optional<Tensor>& t, int64_t rows,
                    int64_t columns) {
  if (!t.has_value()) return nullptr;
  check_cpu(kOp, name, *t);
  check_dtype(kOp, name, *t, ScalarType::Float);
  SALTIRE_CHECK(t->is_contiguous() && t->numel() == rows * columns, kOp, ": ", name, " is ",
                describe(*t), "; expected ", rows * columns, " contiguous values.");
  return static_cast<const float*>(t->const_data_ptr());
}

TokenQuantizer between(int64_t R, int64_t bits, double clip, int64_t hadamard,
                       const std::optional<Tensor>& diag, const std::optional<Tensor>& left,
                       const std::optional<Tensor>& right, const PackedWeight& up) {
  SALTIRE_CHECK(bits == 3 || bits == 4 || bits == 8, kOp, ": rank_bits = ", bits,
                "; expected 3, 4 or 8.");
  SALTIRE_CHECK(clip > 0.0 && clip <= 1.0, kOp, ": clip = ", clip, "; expected a ratio in (0, 1].");
  TokenQuantizer how;
  how.k = R;
  how.act_bits = static_cast<int>(bits);
  how.clip = clip;
  how.sum_group = up.group;
  how.hadamard = hadamard;
  if (right.has_value()) how.right_size = right->size(0);
  const int64_t block = right.has_value() ? how.right_size : hadamard;
  SALTIRE_CHECK(hadamard >= 1 && (hadamard & (hadamard - 1)) == 0 && block >= 1 && R % block == 0 &&
                    (!right.has_value() || hadamard == 1),
                kOp, ": a rotation of blocks of ", block, " for ", R,
                " ranks; expected a power of ", "two (or the size of right) that divides them.");
  how.diag = matrix("diag", diag, 1, R);
  how.left = matrix("left", left, R / block, R / block);
  how.right = matrix("right", right, block, block);
  return how;
}

Tensor factored_gemm(const Tensor& codes, const Tensor& x_scale, const Tensor& x_sum,
                     const Tensor& down, const Tensor& up, int64_t n, int64_t act_bits,
                     int64_t rank_bits, double clip, int64_t hadamard,
                     const std::optional<Tensor>& diag, const std::optional<Tensor>& left,
                     const std::optional<Tensor>& right, const std::optional<Tensor>& bias) {
  check_cpu(kOp, "codes", codes);
  check_dtype(kOp, "codes", codes, ScalarType::Char);
  check_dim(kOp, "codes", codes, 2);
  const PackedWeight first = open("down", down);
  PackedWeight second = open("up", up);
  const int64_t M = codes.size(0), K = first.k, R = first.n;
  check_size(kOp, "codes", codes, 1, K, "K of down");
  SALTIRE_CHECK(second.k == R, kOp, ": down gives ", R, " ranks and up takes ", second.k,
                ". Pass the two factors of one layer.");
  SALTIRE_CHECK(second.n == n, kOp, ": up gives ", second.n, " outputs, but n = ", n, ".");
  check_cpu(kOp, "x_scale", x_scale);
  check_dtype(kOp, "x_scale", x_scale, ScalarType::Float);
  check_dim(kOp, "x_scale", x_scale, 1);
  check_size(kOp, "x_scale", x_scale, 0, M, "M");
  check_cpu(kOp, "x_sum", x_sum);
  check_dtype(kOp, "x_sum", x_sum, ScalarType::Int);
  check_dim(kOp, "x_sum", x_sum, 2);
  check_size(kOp, "x_sum", x_sum, 0, M, "M");
  check_size(kOp, "x_sum", x_sum, 1, K / first.group, "K / group");
  SALTIRE_CHECK(act_bits >= 3 && act_bits <= 8, kOp, ": act_bits = ", act_bits,
                "; activations have 3 to 8 bits. Choose one of them.");
  second.bias = matrix("bias", bias, 1, second.n);
  const TokenQuantizer how = between(R, rank_bits, clip, hadamard, diag, left, right, second);
  const Tensor codes_c = as_contiguous(codes), scale_c = as_contiguous(x_scale),
               sums_c = as_contiguous(x_sum);
  const auto* from = static_cast<const int8_t*>(codes_c.const_data_ptr());
  const int q = max_activation_code(static_cast<int>(act_bits));
  SALTIRE_CHECK(act_bits == 8 || !codes_exceed(from, M * K, q), kOp,
                ": codes holds a value outside -", q, "..", q,
                ", the range of act_bits = ", act_bits,
                ". Pass the bits that the codes were quantised to.");
  const Tokens tokens = {from, static_cast<const float*>(scale_c.const_data_ptr()),
                         static_cast<const int32_t*>(sums_c.const_data_ptr()),
                         static_cast<int>(act_bits)};
  Tensor out = new_tensor(x_scale, {M, second.n}, ScalarType::Float);
  if (M == 0) return out;
  auto* y = static_cast<float*>(out.mutable_data_ptr());
  const int64_t most = std::max<int64_t>(kPanel, kRankBytes / (4 * R));
  const int64_t blocks = (M + most - 1) / most;
  Block block(first, second, how);
  lead_team([&](Team& team) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = M * b / blocks;
      block.run(team, tokens, begin, M * (b + 1) / blocks - begin, y);
    }
  });
  return out;
}

}  // namespace
}  // namespace saltire::factored_linear

STABLE_TORCH_LIBRARY_FRAGMENT(saltire, m) {
  m.def(
      "factored_gemm(Tensor codes, Tensor x_scale, Tensor x_sum, Tensor down, Tensor up, int n, *, "
      "int "
      "act_bits, int rank_bits, float clip=1.0, int hadamard=1, Tensor? diag=None, Tensor? "
      "left=None, Tensor? right=None, Tensor? bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(saltire, CPU, m) {
  m.impl("factored_gemm", TORCH_BOX(&saltire::factored_linear::factored_gemm));
}
