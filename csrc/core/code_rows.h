// Rows on their way to products of low-bit weights, for rooms that reach the kernels through
// quant_linear.h.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "core/cpu/scratch.h"
#include "core/quant_linear.h"

namespace saltire {

// Aligned floats, kept between uses and never smaller than before.
class Floats {
 public:
  float* get(int64_t count) {
    if (count > size_) {
      const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
      block_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (block_ == nullptr) throw std::bad_alloc();
      size_ = count;
    }
    return block_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> block_;
  int64_t size_ = 0;
};

// Rows that become codes, and the codes tile by tile as the products read them. Rows and tiles may
// be worked on by several threads at once.
class CodeRows {
 public:
  // Makes room for so many rows of a layer's inputs; both live as long as the rows are used.
  void open(const TokenQuantizer& how, const PackedWeight& weight, int64_t rows) {
    how_ = &how;
    weight_ = &weight;
    rows_ = rows;
    groups_ = how.k / weight.group;
    codes_.get((rows * how.k + 3) / 4);
    packed_.get((rows * how.k + 3) / 4);
    scales_.get(rows);
    sums_.get(rows * groups_);
    shifts_.get(rows * groups_);
  }

  // Row m from x [K].
  void quantize(const float* x, int64_t m) {
    float* scratch = thread_scratch(static_cast<size_t>(3 * ((how_->k + 15) / 16 * 16)));
    quant_kernels().quantize_token(*how_, x, bytes(codes_) + m * how_->k, scales_.get(0) + m,
                                   sums() + m * groups_, scratch);
  }

  // After all rows of the tile.
  void pack(int64_t tile) {
    quant_kernels().pack(*weight_, bytes(codes_), sums(), rows_, tile, bytes(packed_),
                         shifts_.get(0));
  }

  QuantRows ready() {
    return {rows_, how_->act_bits, bytes(packed_), scales_.get(0), shifts_.get(0), nullptr};
  }

 private:
  static int8_t* bytes(Floats& floats) { return reinterpret_cast<int8_t*>(floats.get(0)); }
  int32_t* sums() { return reinterpret_cast<int32_t*>(sums_.get(0)); }

  const TokenQuantizer* how_ = nullptr;
  const PackedWeight* weight_ = nullptr;
  int64_t rows_ = 0, groups_ = 0;
  Floats codes_, packed_, scales_, sums_, shifts_;  // codes and sums are kept in floats' memory
};

}  // namespace saltire
