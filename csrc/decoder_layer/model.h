// What a step works on: the weights of a model, a cache, the rows of a step, and scratch memory.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/code_rows.h"
#include "core/quant_linear.h"
#include "decoder_layer/op.h"

namespace saltire::decoder_layer {

// A linear layer: dense, or quantised (then `w` is null and n, k are the packed weight's), or of
// two quantised factors: then `packed` is [R, K], and `second` [N, R] takes the ranks to the
// outputs.
struct Linear : Dense {
  bool quantised = false;
  TokenQuantizer input;
  PackedWeight packed;
  const float* low_rank_in = nullptr;  // [K, R]
  std::shared_ptr<const Linear> second;

  // Whether what was prepared for this layer serves the other, which reads the same rows.
  bool shares_input(const Linear& other) const {
    if (quantised != other.quantised) return false;
    if (!quantised) return format == other.format;
    const TokenQuantizer &a = input, &b = other.input;
    return a.hadamard == b.hadamard && a.diag == b.diag && a.left == b.left && a.right == b.right &&
           a.act_bits == b.act_bits && a.clip == b.clip && a.sum_group == b.sum_group &&
           packed.shift_kind == other.packed.shift_kind;
  }
};

struct Layer {
  const float* input_norm = nullptr;  // [D]
  const float* post_norm = nullptr;   // [D]
  const float* q_norm = nullptr;      // [head_dim] or null
  const float* k_norm = nullptr;      // [head_dim] or null
  Linear q, k, v, o, gate, up, down;
  int64_t window = 0;  // slots that attention looks back, 0: all
};

struct Model {
  int64_t hidden = 0, ffn = 0, heads = 0, kv_heads = 0, head_dim = 0, vocabulary = 0;
  float eps = 0.0f;
  Dense embedding;                            // only its rows are read; u8 and u4 are codes
  const uint16_t* embedding_scale = nullptr;  // f16 [V, D / group], of codes
  int64_t embedding_group = 0;
  Linear head;
  const float* final_norm = nullptr;
  std::vector<Layer> layers;

  int64_t q_size() const { return heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
};

// [L, 2, B, kv_heads, T, head_dim · bits]; see CacheHead for the inside of a head.
struct Cache {
  Format format = Format::f32;
  int64_t sequences = 0;
  int64_t slots = 0;  // T, a multiple of kSlotBlock
  uint8_t* data = nullptr;
  uint16_t* grids = nullptr;  // f16 [L, 2, B, kv_heads, 2, T], only for codes

  CacheHead head(const Model& model, int64_t layer, int64_t sequence, int64_t kv_head) const {
    const int64_t heads = sequences * model.kv_heads;
    const int64_t at = layer * 2 * heads + sequence * model.kv_heads + kv_head;
    const int64_t bytes = slots * model.head_dim * format_bits(format) / 8;
    CacheHead out;
    out.format = format;
    out.head_dim = model.head_dim;
    out.keys = data + at * bytes;
    out.values = data + (at + heads) * bytes;
    out.slots = slots;
    if (grids != nullptr) {
      out.key_grids = grids + at * 2 * slots;
      out.value_grids = grids + (at + heads) * 2 * slots;
    }
    return out;
  }
};

constexpr int64_t kPrivate = -1;  // slot of a row whose key and value go nowhere

// A row of a step, as it comes from Python: int64 [M, 6], rows of a sequence side by side.
struct Row {
  int64_t token;
  int64_t sequence;
  int64_t position;  // for the rotation and the window
  int64_t slot;      // where its key and value go, or kPrivate
  int64_t prefix;    // it sees slots [0, prefix), within the window,
  uint64_t tree;     // and prefix + i where bit i is set
};
static_assert(sizeof(Row) == 6 * sizeof(int64_t), "rows are read straight from the tensor");

constexpr uint8_t kAttention = 1;
constexpr uint8_t kMlp = 2;

struct StepArguments {
  int64_t rows = 0;
  const Row* row = nullptr;
  const float* rotation = nullptr;  // [positions, 2, head_dim / 2]: cosines, sines
  int64_t positions = 0;
  const uint8_t* units = nullptr;   // [L] of kAttention | kMlp: what is kept
  float* hidden = nullptr;          // [M, D]: state before and after in place of the embedding
  float* trace = nullptr;           // [2L + 1, wanted, D]: the states between all units
  const int64_t* wanted = nullptr;  // rows whose logits are wanted
  int64_t wanted_rows = 0;
  int64_t head_outputs = 0;     // the first so many tokens are all that may come; 0: all
  float* logits = nullptr;      // [wanted, V], or null where only the best is wanted
  int64_t* best = nullptr;      // [wanted] first index of the largest logit
  float* best_share = nullptr;  // [wanted] its probability
  bool prefill = false;
};

// Layers that read the same rows: q, k and v.
constexpr int kSharers = 3;

// Memory of a step; one for each open decoder.
struct Workspace {
  Floats state, normed, staged, q, k, v, attended, gate, up, projected, head_rows, logits;
  Floats low_rank[kSharers], ranks[kSharers];
  CodeRows input, rank_codes[kSharers];
  std::vector<Best> best;
};

}  // namespace saltire::decoder_layer
