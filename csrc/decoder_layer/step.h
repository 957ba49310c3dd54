// The order of a step: which kernel runs on what, and how the team shares it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "core/cpu/half.h"
#include "core/cpu/scratch.h"
#include "core/cpu/team.h"
#include "decoder_layer/model.h"

namespace saltire::decoder_layer {

class Step {
 public:
  Step(const Model& model, const Cache& cache, const Kernels& kernels, const StepArguments& args,
       Workspace& work, Team& team)
      : model_(model),
        cache_(cache),
        kernels_(kernels),
        args_(args),
        work_(work),
        team_(team),
        panels_(args.prefill) {
    const int64_t M = args.rows;
    state_ = args.hidden != nullptr ? args.hidden : work.state.get(M * model.hidden);
    q_ = work.q.get(M * model.q_size());
    k_ = work.k.get(M * model.kv_size());
    v_ = work.v.get(M * model.kv_size());
    attended_ = work.attended.get(M * model.q_size());
    gate_ = work.gate.get(M * model.ffn);
    up_ = work.up.get(M * model.ffn);
    projected_ = work.projected.get(M * model.hidden);
    normed_ = work.normed.get(M * model.hidden);
    const int64_t widest = std::max({model.hidden, model.q_size(), model.ffn});
    staged_ = work.staged.get(M * round_up(widest, kStageMultiple));
    find_runs();
  }

  void run() {
    if (args_.hidden == nullptr) embed();
    trace(0);
    for (size_t l = 0; l < model_.layers.size(); ++l) {
      if ((args_.units[l] & kAttention) != 0) attention_unit(static_cast<int64_t>(l));
      trace(static_cast<int64_t>(2 * l + 1));
      if ((args_.units[l] & kMlp) != 0) mlp_unit(model_.layers[l]);
      trace(static_cast<int64_t>(2 * l + 2));
    }
    if (args_.wanted_rows > 0) head();
  }

 private:
  // Consecutive rows of one sequence.
  struct Run {
    int64_t begin;
    int64_t end;
  };

  void find_runs() {
    for (int64_t m = 0; m < args_.rows; ++m) {
      if (m == 0 || args_.row[m].sequence != args_.row[m - 1].sequence) runs_.push_back({m, m});
      runs_.back().end = m + 1;
    }
  }

  void embed() {
    const int64_t D = model_.hidden;
    if (is_coded(model_.embedding.format)) {
      for (int64_t m = 0; m < args_.rows; ++m) decode_row(args_.row[m].token, state_ + m * D);
      return;
    }
    for (int64_t m = 0; m < args_.rows; ++m) {
      const int64_t at = args_.row[m].token * D;
      float* out = state_ + m * D;
      if (model_.embedding.format == Format::f32) {
        const float* in = static_cast<const float*>(model_.embedding.w) + at;
        std::memcpy(out, in, sizeof(float) * static_cast<size_t>(D));
        continue;
      }
      const auto* in = static_cast<const uint16_t*>(model_.embedding.w) + at;
      const bool f16 = model_.embedding.format == Format::f16;
      for (int64_t i = 0; i < D; ++i) out[i] = f16 ? f16_to_f32(in[i]) : bf16_to_f32(in[i]);
    }
  }

  // value = (code - half of the codes) · scale; of two 4-bit codes the even one lies low.
  void decode_row(int64_t token, float* out) const {
    const int64_t D = model_.hidden, group = model_.embedding_group;
    const int64_t bits = format_bits(model_.embedding.format);
    const auto* codes = static_cast<const uint8_t*>(model_.embedding.w) + token * D * bits / 8;
    const uint16_t* scale = model_.embedding_scale + token * (D / group);
    for (int64_t i = 0; i < D; ++i) {
      const int code = bits == 8 ? codes[i] : codes[i / 2] >> (i % 2 * 4) & 15;
      out[i] = static_cast<float>(code - (1 << (bits - 1))) * f16_to_f32(scale[i / group]);
    }
  }

  void trace(int64_t place) {
    if (args_.trace == nullptr) return;
    const int64_t D = model_.hidden;
    for (int64_t i = 0; i < args_.wanted_rows; ++i) {
      std::memcpy(args_.trace + (place * args_.wanted_rows + i) * D, state_ + args_.wanted[i] * D,
                  sizeof(float) * static_cast<size_t>(D));
    }
  }

  // --- products -----------------------------------------------------------------------------

  // Rows made ready for one or more layers that read them.
  struct Rows {
    DenseRows dense;
    QuantRows quant;
    const float* low_rank[kSharers] = {};
    QuantRows ranks[kSharers];  // of the layers of two factors
  };

  // x [M, K] -> what the layers read, and where it then lies. gain: normalise on the way.
  Rows prepare(const float* x, int64_t rows, int64_t k, const float* gain,
               std::initializer_list<const Linear*> layers) {
    Rows out;
    out.dense.rows = rows;
    const Linear& first = **layers.begin();
    if (first.quantised) {
      prepare_codes(x, rows, k, gain, layers, out);
      prepare_ranks(rows, layers, out);
    } else if (panels_) {
      out.dense.x = gain == nullptr ? x : normalise(x, rows, k, gain);
      out.dense.x_stride = k;
    } else {
      stage(x, rows, k, gain, first.format, out.dense);
    }
    return out;
  }

  const float* normalise(const float* x, int64_t rows, int64_t k, const float* gain) {
    team_.run(rows, 8, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        kernels_.norm(x + m * k, gain, model_.eps, k, normed_ + m * k);
      }
    });
    return normed_;
  }

  void stage(const float* x, int64_t rows, int64_t k, const float* gain, Format format,
             DenseRows& out) {
    out.x_stride = round_up(k, kStageMultiple);
    float* staged = staged_;
    team_.run(rows, 8, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const float* row = x + m * k;
        if (gain != nullptr) {
          kernels_.norm(row, gain, model_.eps, k, normed_ + m * k);
          row = normed_ + m * k;
        }
        kernels_.stage(format, row, k, staged + m * out.x_stride);
      }
    });
    out.x = staged;
  }

  // Norm, low-rank branches, rotation, rounding and packing, a tile of rows after another.
  void prepare_codes(const float* x, int64_t rows, int64_t k, const float* gain,
                     std::initializer_list<const Linear*> layers, Rows& out) {
    const Linear& first = **layers.begin();
    const QuantKernels& quant = quant_kernels();
    CodeRows& to = work_.input;
    to.open(first.input, first.packed, rows);
    float* low_rank[kSharers] = {};
    int at = 0;
    for (const Linear* layer : layers) {
      if (layer->packed.rank > 0) low_rank[at] = work_.low_rank[at].get(rows * layer->packed.rank);
      out.low_rank[at] = low_rank[at];
      ++at;
    }
    team_.run(quant.tiles(rows), 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t last = quant.tile_begin(rows, tile + 1);
        for (int64_t m = quant.tile_begin(rows, tile); m < last; ++m) {
          const float* row = x + m * k;
          if (gain != nullptr) {
            kernels_.norm(row, gain, model_.eps, k, normed_ + m * k);
            row = normed_ + m * k;
          }
          int i = 0;
          for (const Linear* layer : layers) {
            const int64_t R = layer->packed.rank;
            if (R > 0) kernels_.low_rank(row, layer->low_rank_in, k, R, low_rank[i] + m * R);
            ++i;
          }
          to.quantize(row, m);
        }
        to.pack(tile);
      }
    });
    out.quant = to.ready();
  }

  // First factors: the ranks of all layers in one phase, then the codes of these. They are M·R
  // floats that were just written: the rounding finds them in the cache.
  void prepare_ranks(int64_t rows, std::initializer_list<const Linear*> layers, Rows& out) {
    struct Part {
      const Linear* layer;
      float* ranks;
      CodeRows* to;
      int64_t first_panel;  // counted through all of them
    };
    Part parts[kSharers];
    int count = 0, place = 0;
    int64_t all = 0;
    for (const Linear* layer : layers) {
      if (layer->second != nullptr) {
        const int64_t R = layer->packed.n;
        CodeRows& to = work_.rank_codes[place];
        to.open(layer->second->input, layer->second->packed, rows);
        parts[count++] = {layer, work_.ranks[place].get(rows * R), &to, all};
        out.ranks[place] = to.ready();
        all += (R + kPanel - 1) / kPanel;
      }
      ++place;
    }
    team_.run(all, share(all), [&](int64_t begin, int64_t end) {
      for (int i = 0; i < count; ++i) {
        const PackedWeight& w = parts[i].layer->packed;
        const int64_t from = std::max(begin - parts[i].first_panel, int64_t{0}) * kPanel;
        const int64_t to = std::min((end - parts[i].first_panel) * kPanel, w.n);
        if (from < to) quant_kernels().multiply(w, out.quant, parts[i].ranks, from, to);
      }
    });
    const int64_t tiles = quant_kernels().tiles(rows);
    team_.run(tiles * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Part& part = parts[i / tiles];
        const int64_t tile = i % tiles, last = quant_kernels().tile_begin(rows, tile + 1);
        for (int64_t m = quant_kernels().tile_begin(rows, tile); m < last; ++m) {
          part.to->quantize(part.ranks + m * part.layer->packed.n, m);
        }
        part.to->pack(tile);
      }
    });
  }

  // Outputs [begin, end) of the layer that was `place`-th when its rows were prepared.
  void multiply(const Linear& w, const Rows& rows, int place, float* y, int64_t begin,
                int64_t end) {
    if (w.second != nullptr) {
      quant_kernels().multiply(w.second->packed, rows.ranks[place], y, begin, end);
      return;
    }
    if (w.quantised) {
      QuantRows quant = rows.quant;
      quant.low_rank_x = rows.low_rank[place];
      quant_kernels().multiply(w.packed, quant, y, begin, end);
      return;
    }
    DenseRows dense = rows.dense;
    dense.y = y;
    dense.y_stride = w.n;
    if (panels_) {
      float* panel = thread_scratch(static_cast<size_t>(w.k * kPanel));
      kernels_.dense_panel(w, dense, begin, end, panel);
    } else {
      kernels_.dense(w, dense, begin, end);
    }
  }

  static int64_t panels(const Dense& w) { return (w.n + kPanel - 1) / kPanel; }

  // Panels a thread claims at a time: some shares a thread, so that both end together.
  int64_t share(int64_t count) const { return std::max<int64_t>(1, count / (6 * team_.threads())); }

  // after(begin, end) follows on the same thread for the outputs just made.
  template <typename After>
  void product(const Linear& w, const Rows& rows, float* y, const After& after) {
    team_.run(panels(w), share(panels(w)), [&](int64_t begin, int64_t end) {
      const int64_t from = begin * kPanel, to = std::min(end * kPanel, w.n);
      multiply(w, rows, 0, y, from, to);
      after(from, to);
    });
  }

  // state += rows · wᵀ
  void add_product(const Linear& w, const Rows& rows) {
    product(w, rows, projected_, [&](int64_t from, int64_t to) {
      for (int64_t m = 0; m < rows.dense.rows; ++m) {
        float* h = state_ + m * w.n;
        const float* y = projected_ + m * w.n;
        for (int64_t n = from; n < to; ++n) h[n] += y[n];
      }
    });
  }

  // --- units --------------------------------------------------------------------------------

  void attention_unit(int64_t l) {
    const Layer& layer = model_.layers[static_cast<size_t>(l)];
    const Rows x = prepare(state_, args_.rows, model_.hidden, layer.input_norm,
                           {&layer.q, &layer.k, &layer.v});
    const int64_t q_panels = panels(layer.q), kv_panels = panels(layer.k);
    const int64_t all = q_panels + 2 * kv_panels;
    team_.run(all, share(all), [&](int64_t begin, int64_t end) {
      const auto part = [&](const Linear& w, int place, float* y, int64_t first) {
        const int64_t from = std::max(begin - first, int64_t{0}) * kPanel;
        const int64_t to = std::min((end - first) * kPanel, w.n);
        if (from < to) multiply(w, x, place, y, from, to);
      };
      part(layer.q, 0, q_, 0);
      part(layer.k, 1, k_, q_panels);
      part(layer.v, 2, v_, q_panels + kv_panels);
    });
    attend(l, layer);
    add_product(layer.o, prepare(attended_, args_.rows, model_.q_size(), nullptr, {&layer.o}));
  }

  // Rows whose queries one item attends for.
  static constexpr int64_t kRowsOfItem = 16;

  void attend(int64_t l, const Layer& layer) {
    bool whole = true;  // each run is one item: its keys and values are appended by that item
    for (const Run& run : runs_) whole = whole && run.end - run.begin <= kRowsOfItem;
    const int64_t G = model_.kv_heads;
    if (!whole) {
      team_.run(args_.rows, 8, [&](int64_t begin, int64_t end) {
        for (int64_t g = 0; g < G; ++g) append(l, layer, g, begin, end);
      });
    }
    items_.clear();
    for (const Run& run : runs_) {
      for (int64_t m = run.begin; m < run.end; m += kRowsOfItem) {
        items_.push_back({m, std::min(m + kRowsOfItem, run.end)});
      }
    }
    const auto count = static_cast<int64_t>(items_.size()) * G;
    // The last rows of a prompt see most: they go first, so that no thread starts them late.
    team_.run(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Run rows = items_[static_cast<size_t>((count - 1 - i) / G)];
        const int64_t g = (count - 1 - i) % G;
        if (whole) append(l, layer, g, rows.begin, rows.end);
        attend_rows(l, layer, g, rows);
      }
    });
  }

  // Finishes the queries, keys and values of one group of heads, and stores the latter two.
  void append(int64_t l, const Layer& layer, int64_t g, int64_t begin, int64_t end) {
    const int64_t d = model_.head_dim, group = model_.heads / model_.kv_heads;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    for (int64_t m = begin; m < end; ++m) {
      const Row& row = args_.row[m];
      float* key = k_ + m * model_.kv_size() + g * d;
      float* value = v_ + m * model_.kv_size() + g * d;
      const bool coded = is_coded(cache_.format);
      rotate(row, layer.k_norm, key);
      if (coded) {
        kernels_.rotate_head(key, d);
        kernels_.rotate_head(value, d);
      }
      for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        float* q = q_ + m * model_.q_size() + h * d;
        rotate(row, layer.q_norm, q);
        if (coded) kernels_.rotate_head(q, d);
        for (int64_t i = 0; i < d; ++i) q[i] *= scale;
      }
      if (row.slot != kPrivate) {
        kernels_.append(cache_.head(model_, l, row.sequence, g), row.slot, key, value);
      }
    }
  }

  void rotate(const Row& row, const float* gain, float* head) const {
    const int64_t half = model_.head_dim / 2;
    if (gain != nullptr) kernels_.norm(head, gain, model_.eps, model_.head_dim, head);
    const float* cosine = args_.rotation + row.position * 2 * half;
    const float* sine = cosine + half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = head[i], b = head[i + half];
      head[i] = a * cosine[i] - b * sine[i];
      head[i + half] = b * cosine[i] + a * sine[i];
    }
  }

  void attend_rows(int64_t l, const Layer& layer, int64_t g, Run rows) {
    const int64_t d = model_.head_dim, group = model_.heads / model_.kv_heads;
    const CacheHead cache = cache_.head(model_, l, args_.row[rows.begin].sequence, g);
    float* scratch = thread_scratch(static_cast<size_t>(attention_scratch(d)));
    Query queries[kMaxQueries];
    int64_t held = 0;
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      const Row& row = args_.row[m];
      for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        Query& query = queries[held++];
        query.q = q_ + m * model_.q_size() + h * d;
        query.out = attended_ + m * model_.q_size() + h * d;
        query.prefix = row.prefix;
        query.tree = row.tree;
        query.start =
            layer.window > 0
                ? std::min(std::max(row.position + 1 - layer.window, int64_t{0}), row.prefix)
                : 0;
        const bool own = row.slot == kPrivate;
        query.own_key = own ? k_ + m * model_.kv_size() + g * d : nullptr;
        query.own_value = own ? v_ + m * model_.kv_size() + g * d : nullptr;
        const bool last = m + 1 == rows.end && h + 1 == (g + 1) * group;
        if (held == kMaxQueries || last) {
          kernels_.attend(cache, queries, held, scratch);
          for (int64_t i = 0; i < held && is_coded(cache.format); ++i) {
            kernels_.rotate_head(queries[i].out, d);  // back: values lie rotated
          }
          held = 0;
        }
      }
    }
  }

  void mlp_unit(const Layer& layer) {
    const Rows x =
        prepare(state_, args_.rows, model_.hidden, layer.post_norm, {&layer.gate, &layer.up});
    product(layer.gate, x, gate_, [&](int64_t from, int64_t to) {
      multiply(layer.up, x, 1, up_, from, to);
      for (int64_t m = 0; m < args_.rows; ++m) {
        const int64_t at = m * model_.ffn + from;
        kernels_.swiglu(gate_ + at, up_ + at, to - from);
      }
    });
    add_product(layer.down, prepare(gate_, args_.rows, model_.ffn, nullptr, {&layer.down}));
  }

  // --- head ---------------------------------------------------------------------------------

  // Transposing a panel costs as much as some rows save: a prompt's one wanted row goes the other
  // way.
  static constexpr int64_t kPanelRowsAtLeast = 16;

  // Panels over which one best logit is found: a constant, so that the sum of probabilities has one
  // order whatever the threads. 512 logits stay in L1.
  static constexpr int64_t kHeadChunk = 16;

  void head() {
    const int64_t D = model_.hidden, W = args_.wanted_rows, N = model_.head.n;
    const int64_t V = args_.head_outputs > 0 ? std::min(args_.head_outputs, N) : N;
    float* logits = args_.logits != nullptr ? args_.logits : work_.logits.get(W * N);
    panels_ = panels_ && W >= kPanelRowsAtLeast;
    float* rows = work_.head_rows.get(W * D);
    for (int64_t i = 0; i < W; ++i) {
      std::memcpy(rows + i * D, state_ + args_.wanted[i] * D,
                  sizeof(float) * static_cast<size_t>(D));
    }
    const Rows x = prepare(rows, W, D, model_.final_norm, {&model_.head});
    const int64_t chunks = (V + kHeadChunk * kPanel - 1) / (kHeadChunk * kPanel);
    work_.best.resize(static_cast<size_t>(W * chunks));
    team_.run(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t from = c * kHeadChunk * kPanel;
        const int64_t to = std::min(from + kHeadChunk * kPanel, V);
        multiply(model_.head, x, 0, logits, from, to);
        for (int64_t i = 0; i < W; ++i) {
          Best& best = work_.best[static_cast<size_t>(i * chunks + c)];
          best = kernels_.best(logits + i * N + from, to - from);
          best.index += static_cast<int32_t>(from);
        }
      }
    });
    for (int64_t i = 0; i < W; ++i) merge(i, chunks);
  }

  // The best of all ranges: the first of equals, for they come in rising order.
  void merge(int64_t i, int64_t chunks) {
    const Best* parts = work_.best.data() + i * chunks;
    Best all = parts[0];
    for (int64_t c = 1; c < chunks; ++c) {
      if (parts[c].value > all.value) all = parts[c];
    }
    float sum = 0.0f;
    for (int64_t c = 0; c < chunks; ++c) sum += parts[c].sum * std::exp(parts[c].value - all.value);
    args_.best[i] = all.index;
    args_.best_share[i] = 1.0f / sum;
  }

  const Model& model_;
  const Cache& cache_;
  const Kernels& kernels_;
  const StepArguments& args_;
  Workspace& work_;
  Team& team_;
  bool panels_;  // products the prefill way
  std::vector<Run> runs_, items_;
  float *state_, *normed_, *staged_, *q_, *k_, *v_, *attended_, *gate_, *up_, *projected_;
};

}  // namespace saltire::decoder_layer
