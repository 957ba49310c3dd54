// The checkpoint layout, the prepacked layout and the way between them: plain loops, run at load
// and at save only.
#include <cstring>

#include "core/check.h"
#include "lowbit_gemm/op.h"

namespace saltire::lowbit_gemm {
// Nibble j of the low half -> low nibble of byte j; gather is the way back.
inline uint32_t spread(uint32_t x) {
  x = (x | x << 8) & 0x00FF00FFu;
  return (x | x << 4) & 0x0F0F0F0Fu;
}

inline uint32_t gather(uint32_t x) {
  x &= 0x0F0F0F0Fu;
  x = (x | x >> 4) & 0x00FF00FFu;
  return (x | x >> 8) & 0xFFFFu;
}

// 16 codes of two bits, seen as a matrix of 4 by 4 -> its transpose.
inline uint32_t transpose_crumbs(uint32_t x) {
  uint32_t moved = (x ^ x >> 6) & 0x00CC00CCu;
  x ^= moved ^ moved << 6;
  moved = (x ^ x >> 12) & 0x0000F0F0u;
  return x ^ moved ^ moved << 12;
}

// Four bytes of a row of the checkpoint layout, a step's inputs of one output -> its four bytes in
// a line, where byte i holds the codes of inputs i, 4 + i, ...
inline uint32_t to_line(uint32_t word, int container) {
  if (container == 4) return spread(word & 0xFFFFu) | spread(word >> 16) << 4;
  return container == 2 ? transpose_crumbs(word) : word;
}

inline uint32_t from_line(uint32_t word, int container) {
  if (container == 4) return gather(word) | gather(word >> 4) << 16;
  return container == 2 ? transpose_crumbs(word) : word;
}

// Copies the 32 table entries of group g to or from rows [row0, row0 + rows) of [N, K / G].
template <bool to_buffer, typename Word>
void copy_table(Word* line, Word* table, int64_t row0, int64_t rows, int64_t groups, int64_t g) {
  for (int64_t o = 0; o < rows; ++o) {
    Word* entry = table + (row0 + o) * groups + g;
    if (to_buffer) {
      std::memcpy(line + o, entry, sizeof(Word));
    } else {
      std::memcpy(entry, line + o, sizeof(Word));
    }
  }
}

template <bool to_buffer>
void copy_table(const WeightLayout& layout, uint8_t* line, void* table, int64_t row0, int64_t rows,
                int64_t g) {
  if (layout.table == Float::f32) {
    copy_table<to_buffer>(reinterpret_cast<uint32_t*>(line), static_cast<uint32_t*>(table), row0,
                          rows, layout.groups(), g);
  } else {
    copy_table<to_buffer>(reinterpret_cast<uint16_t*>(line), static_cast<uint16_t*>(table), row0,
                          rows, layout.groups(), g);
  }
}

inline void write_header(const WeightLayout& layout, uint8_t* buffer) {
  Header header = {};
  header.magic = kMagic;
  header.version = kVersion;
  header.bits = layout.bits;
  header.flags = (layout.has_zero ? kFlagZero : 0) | (layout.table == Float::f16 ? kFlagHalf : 0);
  header.n = layout.n;
  header.k = layout.k;
  header.group = layout.group == layout.k ? 0 : layout.group;
  header.bytes = layout.bytes();
  header.block = kBlock;
  std::memcpy(buffer, &header, sizeof(header));
}

// Reads and checks the header of a buffer of `bytes` bytes; throws std::runtime_error naming `op`.
inline WeightLayout read_header(const char* op, const uint8_t* buffer, int64_t bytes) {
  Header header = {};
  SALTIRE_CHECK(bytes >= static_cast<int64_t>(sizeof(header)), op, ": w holds ", bytes,
                " bytes; a prepacked weight starts with a header of ", sizeof(header),
                ". Make it with prepack_weight.");
  std::memcpy(&header, buffer, sizeof(header));
  SALTIRE_CHECK(header.magic == kMagic, op,
                ": w is not a prepacked weight (its first bytes are not \"SLTW\"). Make it with "
                "prepack_weight.");
  SALTIRE_CHECK(header.version == kVersion && header.block == kBlock, op,
                ": w was prepacked in format ", header.version, "; this build reads format ",
                kVersion, ". Prepack it again from the checkpoint.");
  WeightLayout layout;
  layout.n = header.n;
  layout.k = header.k;
  layout.bits = header.bits;
  layout.group = header.group == 0 ? header.k : header.group;
  layout.has_zero = (header.flags & kFlagZero) != 0;
  layout.table = (header.flags & kFlagHalf) != 0 ? Float::f16 : Float::f32;
  const bool sane =
      are_weight_bits(layout.bits) && layout.n >= 1 && layout.n <= (int64_t{1} << 40) &&
      layout.k >= kKMultiple && layout.k <= max_k(layout.bits) && layout.k % kKMultiple == 0 &&
      layout.group >= kKMultiple && layout.group % kKMultiple == 0 && layout.k % layout.group == 0;
  SALTIRE_CHECK(sane && header.bytes == bytes && layout.bytes() == bytes, op, ": w holds ", bytes,
                " bytes, which its own header contradicts: it is truncated or altered. Prepack it "
                "again from the checkpoint.");
  return layout;
}

// codes uint8 [N, K] -> checkpoint layout [N, K·c/8]; returns the OR of all codes.
inline uint8_t pack_rows(const uint8_t* codes, uint8_t* packed, int64_t k, int bits, int64_t begin,
                         int64_t end) {
  const int container = container_bits(bits);
  uint8_t any = 0;
  const int64_t bytes = (end - begin) * k * container / 8;
  const uint8_t* in = codes + begin * k;
  uint8_t* out = packed + begin * (k * container / 8);
  if (container == 8) {
    std::memcpy(out, in, static_cast<size_t>(bytes));
  } else if (container == 4) {
    for (int64_t j = 0; j < bytes; ++j) {
      any |= in[2 * j] | in[2 * j + 1];
      out[j] = static_cast<uint8_t>(in[2 * j] | in[2 * j + 1] << 4);
    }
  } else {
    for (int64_t j = 0; j < bytes; ++j) {
      const uint8_t* q = in + 4 * j;
      any |= q[0] | q[1] | q[2] | q[3];
      out[j] = static_cast<uint8_t>(q[0] | q[1] << 2 | q[2] << 4 | q[3] << 6);
    }
  }
  return any;
}

inline void unpack_rows(const uint8_t* packed, uint8_t* codes, int64_t k, int bits, int64_t begin,
                        int64_t end) {
  const int container = container_bits(bits);
  const int64_t bytes = (end - begin) * k * container / 8;
  const uint8_t* in = packed + begin * (k * container / 8);
  uint8_t* out = codes + begin * k;
  if (container == 8) {
    std::memcpy(out, in, static_cast<size_t>(bytes));
  } else if (container == 4) {
    for (int64_t j = 0; j < bytes; ++j) {
      out[2 * j] = in[j] & 15;
      out[2 * j + 1] = in[j] >> 4;
    }
  } else {
    for (int64_t j = 0; j < bytes; ++j) {
      for (int i = 0; i < 4; ++i) out[4 * j + i] = (in[j] >> (2 * i)) & 3;
    }
  }
}

// Checkpoint layout, scale and zero [N, K / group] of layout.table -> buffer.
inline void prepack_blocks(const WeightLayout& layout, const uint8_t* packed, const void* scale,
                           const void* zero, uint8_t* buffer, int64_t begin, int64_t end) {
  const int container = container_bits(layout.bits);
  const int64_t row_bytes = layout.k * container / 8;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row0 = block * kBlock;
    const int64_t rows = layout.n - row0 < kBlock ? layout.n - row0 : kBlock;
    uint8_t* out = buffer + sizeof(Header) + block * layout.block_bytes();
    if (rows < kBlock) std::memset(out, 0, static_cast<size_t>(layout.block_bytes()));
    for (int64_t g = 0; g < layout.groups(); ++g) {
      const int64_t steps = layout.group / layout.step_k();
      for (int64_t step = 0; step < steps; ++step, out += 2 * kLine) {
        const int64_t byte0 = (g * layout.group + step * layout.step_k()) * container / 8;
        for (int64_t o = 0; o < rows; ++o) {
          uint32_t word = 0;
          std::memcpy(&word, packed + (row0 + o) * row_bytes + byte0, sizeof(word));
          word = to_line(word, container);
          std::memcpy(out + o / 16 * kLine + o % 16 * 4, &word, sizeof(word));
        }
      }
      copy_table<true>(layout, out, const_cast<void*>(scale), row0, rows, g);
      out += layout.table_bytes();
      if (layout.has_zero) {
        copy_table<true>(layout, out, const_cast<void*>(zero), row0, rows, g);
        out += layout.table_bytes();
      }
    }
  }
}

inline void unprepack_blocks(const WeightLayout& layout, const uint8_t* buffer, uint8_t* packed,
                             void* scale, void* zero, int64_t begin, int64_t end) {
  const int container = container_bits(layout.bits);
  const int64_t row_bytes = layout.k * container / 8;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row0 = block * kBlock;
    const int64_t rows = layout.n - row0 < kBlock ? layout.n - row0 : kBlock;
    const uint8_t* in = buffer + sizeof(Header) + block * layout.block_bytes();
    for (int64_t g = 0; g < layout.groups(); ++g) {
      for (int64_t step = 0; step < layout.group / layout.step_k(); ++step, in += 2 * kLine) {
        const int64_t byte0 = (g * layout.group + step * layout.step_k()) * container / 8;
        for (int64_t o = 0; o < rows; ++o) {
          uint32_t word = 0;
          std::memcpy(&word, in + o / 16 * kLine + o % 16 * 4, sizeof(word));
          word = from_line(word, container);
          std::memcpy(packed + (row0 + o) * row_bytes + byte0, &word, sizeof(word));
        }
      }
      copy_table<false>(layout, const_cast<uint8_t*>(in), scale, row0, rows, g);
      in += layout.table_bytes();
      if (layout.has_zero) {
        copy_table<false>(layout, const_cast<uint8_t*>(in), zero, row0, rows, g);
        in += layout.table_bytes();
      }
    }
  }
}

}  // namespace saltire::lowbit_gemm
