// Registers decoder_open and decoder_close: what a model is made of, and the checks of that.
#include "decoder_layer/open.h"

#include <map>
#include <string>

namespace saltire::decoder_layer {
namespace {

std::mutex registry_mutex;
std::map<int64_t, std::shared_ptr<Open>>& registry() {
  static std::map<int64_t, std::shared_ptr<Open>> open;
  return open;
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

// The first tensor; codes are uint8 [V, D] or, at 4 bits, [V, D / 2], and their scales come second.
void read_embedding(const std::vector<Tensor>& tensors, Model& m) {
  constexpr const char* kOp = "decoder_open";
  const Tensor& codes = tensors[0];
  if (codes.scalar_type() != ScalarType::Byte) {
    m.embedding = Reader::dense("embedding", codes, m.vocabulary, m.hidden);
    return;
  }
  SALTIRE_CHECK(tensors.size() >= 2, kOp, ": the embedding has codes and no scales.");
  const Tensor& scale = tensors[1];
  check_dim(kOp, "embedding", codes, 2);
  check_size(kOp, "embedding", codes, 0, m.vocabulary, "V");
  SALTIRE_CHECK(codes.size(1) == m.hidden || codes.size(1) * 2 == m.hidden, kOp,
                ": the codes of the embedding are ", codes.size(1), " wide; expected ", m.hidden,
                " at 8 bits or ", m.hidden / 2, " at 4.");
  check_dtype(kOp, "embedding scale", scale, ScalarType::Half);
  check_dim(kOp, "embedding scale", scale, 2);
  check_size(kOp, "embedding scale", scale, 0, m.vocabulary, "V");
  SALTIRE_CHECK(scale.size(1) >= 1 && m.hidden % scale.size(1) == 0, kOp, ": ", scale.size(1),
                " scales cannot be shared evenly by ", m.hidden, " values.");
  check_cpu(kOp, "embedding", codes);
  check_cpu(kOp, "embedding scale", scale);
  SALTIRE_CHECK(codes.is_contiguous() && scale.is_contiguous(), kOp,
                ": the embedding is not contiguous. Call .contiguous().");
  m.embedding.format = codes.size(1) == m.hidden ? Format::u8 : Format::u4;
  m.embedding.n = m.vocabulary;
  m.embedding.k = m.hidden;
  m.embedding.w = codes.const_data_ptr();
  m.embedding_scale = static_cast<const uint16_t*>(scale.const_data_ptr());
  m.embedding_group = m.hidden / scale.size(1);
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
  read_embedding(t, m);
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

}  // namespace

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

}  // namespace saltire::decoder_layer

STABLE_TORCH_LIBRARY_FRAGMENT(saltire, m) {
  m.def(
      "decoder_open(Tensor[] tensors, int[] sizes, int[] description, float[] clips, float eps) -> "
      "Tensor");
  m.def("decoder_close(Tensor handle) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(saltire, CPU, m) {
  using namespace saltire::decoder_layer;
  m.impl("decoder_open", TORCH_BOX(&decoder_open));
  m.impl("decoder_close", TORCH_BOX(&decoder_close));
}
