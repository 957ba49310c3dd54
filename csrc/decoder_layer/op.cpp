// Registers decoder_open, decoder_step and decoder_close, and checks what they get.
#include "decoder_layer/op.h"

#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "core/isa.h"
#include "core/quant_linear.h"
#include "core/tensor.h"
#include "core/threads.h"
#include "decoder_layer/model.h"
#include "decoder_layer/step.h"

namespace saltire::decoder_layer {
namespace {

Kernels kernels() {
#if defined(SALTIRE_X86)
  switch (current_isa()) {
    case Isa::avx512:
      return avx512_kernels();
    case Isa::avx2:
      return avx2_kernels();
    default:
      break;
  }
#endif
  return ref_kernels();
}

// A model that has been opened: its tensors stay alive for as long as their pointers are used.
struct Open {
  std::vector<Tensor> tensors;
  Model model;
  Workspace work;
  std::mutex busy;  // a step owns the workspace
};

std::mutex registry_mutex;
std::map<int64_t, std::shared_ptr<Open>>& registry() {
  static std::map<int64_t, std::shared_ptr<Open>> open;
  return open;
}

std::shared_ptr<Open> find(const char* op, const Tensor& handle) {
  check_dtype(op, "handle", handle, ScalarType::Long);
  SALTIRE_CHECK(handle.numel() == 1, op, ": handle is ", describe(handle),
                "; expected the int64 [1] that decoder_open gave.");
  const int64_t id = *static_cast<const int64_t*>(handle.const_data_ptr());
  const std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(id);
  SALTIRE_CHECK(found != registry().end(), op, ": handle ", id,
                " names no open decoder. Make it with decoder_open, in this process.");
  return found->second;
}

Format weight_format(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Format::f32;
    case ScalarType::BFloat16:
      return Format::bf16;
    case ScalarType::Half:
      return Format::f16;
    default:
      fail(op, ": ", name, " is ", describe(t), "; expected float32, bfloat16 or float16.");
  }
}

// Reads the description of a model, checking every tensor as it is named.
class Reader {
 public:
  Reader(const std::vector<Tensor>& tensors, const std::vector<int64_t>& values,
         const std::vector<double>& clips)
      : tensors_(tensors), values_(values), clips_(clips) {}

  int64_t next() {
    SALTIRE_CHECK(at_ < values_.size(), kOp, ": the description of the layers ends too soon.");
    return values_[at_++];
  }
  bool done() const { return at_ == values_.size(); }

  const float* vector(const char* name, int64_t size, bool optional = false) {
    const Tensor* t = tensor(name, optional);
    if (t == nullptr) return nullptr;
    check_dtype(kOp, name, *t, ScalarType::Float);
    check_dim(kOp, name, *t, 1);
    check_size(kOp, name, *t, 0, size, "the model's size");
    return static_cast<const float*>(t->const_data_ptr());
  }

  // weight, bias, activation bits (0: dense), whether a second factor follows, Hadamard block,
  // diag, left, right, low-rank in and out, and then the second factor.
  Linear linear(const char* name, int64_t n, int64_t k) {
    const Tensor* weight = tensor(name, false);
    const float* bias = vector(name, n, true);
    const int64_t act_bits = next();
    const bool factored = act_bits != 0 && next() != 0;
    SALTIRE_CHECK(linears_ < clips_.size(), kOp, ": ", clips_.size(),
                  " clips; expected one for every linear layer.");
    const double clip = clips_[linears_++];
    Linear out;
    if (act_bits == 0) {
      static_cast<Dense&>(out) = dense(name, *weight, n, k);
      out.bias = bias;
      return out;
    }
    out.quantised = true;
    out.n = n;
    out.k = k;
    out.packed.buffer = static_cast<const uint8_t*>(weight->const_data_ptr());
    out.packed.bytes = weight->numel();
    check_dtype(kOp, name, *weight, ScalarType::Byte);
    quant_kernels().open_weight(kOp, out.packed);
    SALTIRE_CHECK((factored || out.packed.n == n) && out.packed.k == k, kOp, ": ", name,
                  " was prepacked as [", out.packed.n, ", ", out.packed.k, "]; expected [",
                  factored ? "R" : std::to_string(n), ", ", k, "].");
    out.packed.bias = bias;
    read_input(name, act_bits, clip, out);
    if (factored) {
      auto second = std::make_shared<Linear>(linear(name, n, out.packed.n));
      SALTIRE_CHECK(second->quantised && second->second == nullptr && second->packed.rank == 0 &&
                        out.packed.rank == 0 && bias == nullptr,
                    kOp, ": ", name, " has a second factor that is not a plain quantised layer.");
      out.second = std::move(second);
    }
    return out;
  }

  static Dense dense(const char* name, const Tensor& t, int64_t n, int64_t k) {
    Dense out;
    out.format = weight_format(kOp, name, t);
    check_dim(kOp, name, t, 2);
    check_size(kOp, name, t, 0, n, "N");
    check_size(kOp, name, t, 1, k, "K");
    check_cpu(kOp, name, t);
    SALTIRE_CHECK(t.is_contiguous(), kOp, ": ", name, " is not contiguous. Call .contiguous().");
    out.n = n;
    out.k = k;
    out.w = t.const_data_ptr();
    return out;
  }

 private:
  static constexpr const char* kOp = "decoder_open";

  void read_input(const char* name, int64_t act_bits, double clip, Linear& out) {
    const int64_t k = out.k;
    TokenQuantizer& input = out.input;
    SALTIRE_CHECK(act_bits == 3 || act_bits == 4 || act_bits == 8, kOp, ": ", name,
                  " has activations of ", act_bits, " bits; expected 3, 4 or 8.");
    SALTIRE_CHECK(clip > 0.0 && clip <= 1.0, kOp, ": ", name, " has clip = ", clip,
                  "; expected a ratio in (0, 1].");
    input.k = k;
    input.act_bits = static_cast<int>(act_bits);
    input.clip = clip;
    input.sum_group = out.packed.group;
    input.hadamard = next();
    SALTIRE_CHECK(input.hadamard >= 1 && (input.hadamard & (input.hadamard - 1)) == 0 &&
                      k % input.hadamard == 0,
                  kOp, ": ", name, " has a Hadamard block of ", input.hadamard,
                  "; expected a power of two that divides K = ", k, ".");
    input.diag = vector(name, k, true);
    const Tensor* left = tensor(name, true);
    const Tensor* right = tensor(name, true);
    int64_t block = input.hadamard;
    if (right != nullptr) {
      block = input.right_size = right->size(0);
      SALTIRE_CHECK(input.hadamard == 1 && block > 0 && k % block == 0, kOp, ": ", name,
                    " has a right factor of ", block, " with K = ", k, ".");
      input.right = matrix(name, *right, block, block);
    }
    if (left != nullptr) input.left = matrix(name, *left, k / block, k / block);
    const Tensor* low_in = tensor(name, true);
    const Tensor* low_out = tensor(name, true);
    SALTIRE_CHECK((low_in == nullptr) == (low_out == nullptr), kOp, ": ", name,
                  " has one half of a low-rank branch.");
    if (low_in == nullptr) return;
    check_dim(kOp, name, *low_in, 2);
    out.packed.rank = low_in->size(1);
    out.low_rank_in = matrix(name, *low_in, k, out.packed.rank);
    out.packed.low_rank_w = matrix(name, *low_out, out.packed.rank, out.n);
  }

  static const float* matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
    check_dtype(kOp, name, t, ScalarType::Float);
    check_dim(kOp, name, t, 2);
    check_size(kOp, name, t, 0, rows, "the layer's size");
    check_size(kOp, name, t, 1, columns, "the layer's size");
    return static_cast<const float*>(t.const_data_ptr());
  }

  const Tensor* tensor(const char* name, bool optional) {
    const int64_t index = next();
    if (optional && index == -1) return nullptr;
    SALTIRE_CHECK(index >= 0 && index < static_cast<int64_t>(tensors_.size()), kOp, ": ", name,
                  " is tensor ", index, " of ", tensors_.size(), ".");
    const Tensor& t = tensors_[static_cast<size_t>(index)];
    check_cpu(kOp, name, t);
    SALTIRE_CHECK(t.is_contiguous(), kOp, ": ", name, " is not contiguous. Call .contiguous().");
    return &t;
  }

  const std::vector<Tensor>& tensors_;
  const std::vector<int64_t>& values_;
  const std::vector<double>& clips_;
  size_t at_ = 0;
  size_t linears_ = 0;
};

Layer read_layer(Reader& reader, const Model& m) {
  Layer layer;
  layer.window = reader.next();
  layer.input_norm = reader.vector("input_norm", m.hidden);
  layer.post_norm = reader.vector("post_norm", m.hidden);
  layer.q_norm = reader.vector("q_norm", m.head_dim, true);
  layer.k_norm = reader.vector("k_norm", m.head_dim, true);
  layer.q = reader.linear("q", m.q_size(), m.hidden);
  layer.k = reader.linear("k", m.kv_size(), m.hidden);
  layer.v = reader.linear("v", m.kv_size(), m.hidden);
  layer.o = reader.linear("o", m.hidden, m.q_size());
  layer.gate = reader.linear("gate", m.ffn, m.hidden);
  layer.up = reader.linear("up", m.ffn, m.hidden);
  layer.down = reader.linear("down", m.hidden, m.ffn);
  SALTIRE_CHECK(layer.q.shares_input(layer.k) && layer.q.shares_input(layer.v) &&
                    layer.gate.shares_input(layer.up),
                "decoder_open: q, k and v must read their input in one format, and gate and up "
                "must. Quantise or cast them alike.");
  return layer;
}

Tensor decoder_open(std::vector<Tensor> tensors, std::vector<int64_t> sizes,
                    std::vector<int64_t> description, std::vector<double> clips, double eps) {
  constexpr const char* kOp = "decoder_open";
  SALTIRE_CHECK(sizes.size() == 6, kOp, ": sizes holds ", sizes.size(),
                " values; expected hidden, ffn, heads, kv_heads, head_dim, vocabulary.");
  SALTIRE_CHECK(!tensors.empty(), kOp, ": no tensors; expected the embedding first.");
  for (const int64_t size : sizes) {
    SALTIRE_CHECK(size >= 1 && size <= (int64_t{1} << 31), kOp, ": a size is ", size,
                  "; expected 1 to 2^31.");
  }
  auto open = std::make_shared<Open>();
  open->tensors = std::move(tensors);
  Model& m = open->model;
  m.hidden = sizes[0];
  m.ffn = sizes[1];
  m.heads = sizes[2];
  m.kv_heads = sizes[3];
  m.head_dim = sizes[4];
  m.vocabulary = sizes[5];
  m.eps = static_cast<float>(eps);
  SALTIRE_CHECK(m.head_dim % kSlotBlock == 0 && m.head_dim <= kMaxHeadDim, kOp,
                ": head_dim = ", m.head_dim, "; expected a multiple of ", kSlotBlock, " up to ",
                kMaxHeadDim, ".");
  SALTIRE_CHECK(m.heads % m.kv_heads == 0, kOp, ": ", m.heads, " heads cannot share ", m.kv_heads,
                " heads of keys evenly.");
  const std::vector<Tensor>& t = open->tensors;
  m.embedding = Reader::dense("embedding", t[0], m.vocabulary, m.hidden);
  Reader reader(t, description, clips);
  m.final_norm = reader.vector("final_norm", m.hidden);
  m.head = reader.linear("head", m.vocabulary, m.hidden);
  while (!reader.done()) m.layers.push_back(read_layer(reader, m));
  static int64_t last_id = 0;
  Tensor handle = new_tensor(t[0], {1}, ScalarType::Long);
  const std::lock_guard<std::mutex> lock(registry_mutex);
  *static_cast<int64_t*>(handle.mutable_data_ptr()) = ++last_id;
  registry()[last_id] = open;
  return handle;
}

void decoder_close(Tensor handle) {
  const std::shared_ptr<Open> open = find("decoder_close", handle);
  const std::lock_guard<std::mutex> lock(registry_mutex);
  registry().erase(*static_cast<const int64_t*>(handle.const_data_ptr()));
}

// A cache of bytes holds codes; its last dimension tells how many bits they have.
Format cache_format(const Model& m, const Tensor& kv) {
  if (kv.scalar_type() == ScalarType::Byte) {
    for (const Format format : {Format::u8, Format::u4, Format::u2}) {
      if (kv.size(5) * 8 == m.head_dim * format_bits(format)) return format;
    }
    fail("decoder_step: kv is ", describe(kv), "; with head_dim = ", m.head_dim,
         " codes of 8, 4 or 2 bits take ", m.head_dim, ", ", m.head_dim / 2, " or ", m.head_dim / 4,
         " bytes. It belongs to another model; make a new one.");
  }
  const Format format = weight_format("decoder_step", "kv", kv);
  SALTIRE_CHECK(format != Format::f16,
                "decoder_step: kv is float16; expected float32, bfloat16 or uint8.");
  return format;
}

Cache read_cache(const Model& m, const Tensor& kv, const std::optional<Tensor>& scales) {
  constexpr const char* kOp = "decoder_step";
  Cache cache;
  check_cpu(kOp, "kv", kv);
  check_dim(kOp, "kv", kv, 6);
  const int64_t L = static_cast<int64_t>(m.layers.size());
  cache.format = cache_format(m, kv);
  SALTIRE_CHECK(kv.size(0) == L && kv.size(1) == 2 && kv.size(3) == m.kv_heads &&
                    (is_coded(cache.format) || kv.size(5) == m.head_dim),
                kOp, ": kv is ", describe(kv), "; this model's cache is [", L, ", 2, B, ",
                m.kv_heads, ", T, ", m.head_dim,
                "], or uint8 with 2, 4 or 8 bits a value. It belongs to another model; make a new "
                "one.");
  SALTIRE_CHECK(kv.size(4) % kSlotBlock == 0, kOp, ": kv is ", describe(kv),
                "; the slots, dimension 4, must be a multiple of ", kSlotBlock, ".");
  SALTIRE_CHECK(kv.is_contiguous(), kOp, ": kv is not contiguous; it is written in place.");
  if (is_coded(cache.format)) {
    SALTIRE_CHECK(scales.has_value(), kOp, ": a uint8 kv needs scales.");
    check_dtype(kOp, "scales", *scales, ScalarType::Half);
    check_cpu(kOp, "scales", *scales);
    SALTIRE_CHECK(scales->is_contiguous() && scales->numel() * kv.size(5) == 2 * kv.numel(), kOp,
                  ": scales is ", describe(*scales),
                  "; expected a scale and a low for each slot of each head.");
    cache.grids = static_cast<uint16_t*>(scales->mutable_data_ptr());
  }
  cache.sequences = kv.size(2);
  cache.slots = kv.size(4);
  cache.data = static_cast<uint8_t*>(kv.mutable_data_ptr());
  return cache;
}

// rotation: [positions, 2, head_dim / 2], the cosines, then the sines of a position.
void read_rotation(const Model& m, const Tensor& rotation, StepArguments& args) {
  constexpr const char* kOp = "decoder_step";
  check_cpu(kOp, "rotation", rotation);
  check_dtype(kOp, "rotation", rotation, ScalarType::Float);
  check_dim(kOp, "rotation", rotation, 3);
  check_size(kOp, "rotation", rotation, 1, 2, "cosines and sines");
  check_size(kOp, "rotation", rotation, 2, m.head_dim / 2, "head_dim / 2");
  SALTIRE_CHECK(rotation.is_contiguous(), kOp, ": rotation is not contiguous.");
  args.rotation = static_cast<const float*>(rotation.const_data_ptr());
  args.positions = rotation.size(0);
}

void check_rows(const Model& m, const Cache& cache, const StepArguments& args) {
  constexpr const char* kOp = "decoder_step";
  for (int64_t i = 0; i < args.rows; ++i) {
    const Row& row = args.row[i];
    SALTIRE_CHECK(args.hidden != nullptr || (row.token >= 0 && row.token < m.vocabulary), kOp,
                  ": row ", i, " has token ", row.token, "; the vocabulary has ", m.vocabulary,
                  ".");
    SALTIRE_CHECK(row.sequence >= 0 && row.sequence < cache.sequences, kOp, ": row ", i,
                  " is of sequence ", row.sequence, "; the cache has ", cache.sequences, ".");
    SALTIRE_CHECK(row.position >= 0 && row.position < args.positions, kOp, ": row ", i,
                  " has position ", row.position, "; rotation has ", args.positions, ".");
    SALTIRE_CHECK(row.slot >= kPrivate && row.slot < cache.slots, kOp, ": row ", i, " has slot ",
                  row.slot, "; the cache has ", cache.slots, ". Make a longer one.");
    const int64_t reach =
        row.prefix + (row.tree != 0 ? 64 - static_cast<int64_t>(__builtin_clzll(row.tree)) : 0);
    SALTIRE_CHECK(row.prefix >= 0 && reach <= cache.slots, kOp, ": row ", i, " sees ", reach,
                  " slots; the cache has ", cache.slots, ".");
    SALTIRE_CHECK(reach > 0 || row.slot == kPrivate, kOp, ": row ", i, " sees no slot.");
  }
  for (int64_t i = 0; i < args.wanted_rows; ++i) {
    SALTIRE_CHECK(args.wanted[i] >= 0 && args.wanted[i] < args.rows, kOp, ": wanted row ",
                  args.wanted[i], " of ", args.rows, ".");
  }
}

float* optional_floats(const char* name, const std::optional<Tensor>& t, int64_t count) {
  if (!t.has_value()) return nullptr;
  check_dtype("decoder_step", name, *t, ScalarType::Float);
  check_cpu("decoder_step", name, *t);
  SALTIRE_CHECK(t->is_contiguous() && t->numel() == count, "decoder_step: ", name, " is ",
                describe(*t), "; expected ", count, " contiguous values.");
  return static_cast<float*>(t->mutable_data_ptr());
}

std::tuple<Tensor, Tensor> decoder_step(Tensor handle, Tensor kv, std::optional<Tensor> scales,
                                        Tensor rotation, Tensor rows, Tensor units, Tensor wanted,
                                        Tensor logits, std::optional<Tensor> hidden,
                                        std::optional<Tensor> trace, bool prefill) {
  constexpr const char* kOp = "decoder_step";
  const std::shared_ptr<Open> open = find(kOp, handle);
  const std::lock_guard<std::mutex> lock(open->busy);
  const Model& m = open->model;
  const Cache cache = read_cache(m, kv, scales);
  check_dtype(kOp, "rows", rows, ScalarType::Long);
  check_dim(kOp, "rows", rows, 2);
  check_size(kOp, "rows", rows, 1, 6, "token, sequence, position, slot, prefix, tree");
  check_dtype(kOp, "units", units, ScalarType::Byte);
  SALTIRE_CHECK(units.numel() == static_cast<int64_t>(m.layers.size()), kOp, ": units is ",
                describe(units), "; expected one for each of ", m.layers.size(), " layers.");
  check_dtype(kOp, "wanted", wanted, ScalarType::Long);
  const Tensor rows_c = as_contiguous(rows), units_c = as_contiguous(units),
               wanted_c = as_contiguous(wanted);
  StepArguments args;
  args.rows = rows.size(0);
  args.row = static_cast<const Row*>(rows_c.const_data_ptr());
  args.units = static_cast<const uint8_t*>(units_c.const_data_ptr());
  args.wanted = static_cast<const int64_t*>(wanted_c.const_data_ptr());
  args.wanted_rows = wanted.numel();
  args.prefill = prefill;
  args.hidden = optional_floats("hidden", hidden, args.rows * m.hidden);
  args.trace = optional_floats(
      "trace", trace,
      (2 * static_cast<int64_t>(m.layers.size()) + 1) * args.wanted_rows * m.hidden);
  read_rotation(m, rotation, args);
  check_rows(m, cache, args);
  args.logits = optional_floats("logits", logits, args.wanted_rows * m.vocabulary);
  Tensor best = new_tensor(logits, {args.wanted_rows}, ScalarType::Long);
  Tensor share = new_tensor(logits, {args.wanted_rows}, ScalarType::Float);
  args.best = static_cast<int64_t*>(best.mutable_data_ptr());
  args.best_share = static_cast<float*>(share.mutable_data_ptr());
  if (args.rows > 0) {
    const Kernels k = kernels();
    lead_team([&](Team& team) { Step(m, cache, k, args, open->work, team).run(); });
  }
  return {best, share};
}

}  // namespace
}  // namespace saltire::decoder_layer

STABLE_TORCH_LIBRARY_FRAGMENT(saltire, m) {
  m.def(
      "decoder_open(Tensor[] tensors, int[] sizes, int[] description, float[] clips, float eps) -> "
      "Tensor");
  m.def("decoder_close(Tensor handle) -> ()");
  m.def(
      "decoder_step(Tensor handle, Tensor(a!) kv, Tensor(b!)? scales, Tensor rotation, Tensor "
      "rows, "
      "Tensor units, Tensor wanted, Tensor(c!) logits, Tensor(d!)? hidden, Tensor(e!)? trace, *, "
      "bool prefill) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(saltire, CPU, m) {
  using namespace saltire::decoder_layer;
  m.impl("decoder_open", TORCH_BOX(&decoder_open));
  m.impl("decoder_close", TORCH_BOX(&decoder_close));
  m.impl("decoder_step", TORCH_BOX(&decoder_step));
}
