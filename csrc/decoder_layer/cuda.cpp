// Registers the parts of a layer for CUDA tensors, and checks what they get. Contents of `rows` are
// not checked: that would wait for the device. Whoever makes them does (nn/device_decoder.py).
#include <tuple>

#include "core/cuda/tensor.h"
#include "core/formats.h"
#include "decoder_layer/device.h"

namespace saltire::decoder_layer {
namespace {

using cuda::Number;

Number number_of(const char* op, const char* name, ScalarType type, bool f16 = false) {
  if (type == ScalarType::Float) return Number::f32;
  if (type == ScalarType::BFloat16) return Number::bf16;
  if (f16 && type == ScalarType::Half) return Number::f16;
  fail(op, ": ", name, " is ", dtype_name(type), "; expected float32 or bfloat16",
       f16 ? " or float16." : ".");
}

// Kernels read 16 bytes at a time; a view may start anywhere.
Tensor as_aligned(const Tensor& t) {
  const Tensor c = as_contiguous(t);
  return reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0 ? c : torch::stable::clone(c);
}

void check_in_place(const char* op, const char* name, const Tensor& t, ScalarType type) {
  check_dtype(op, name, t, type);
  SALTIRE_CHECK(
      t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, op, ": ",
      name, " is ", describe(t),
      "; it is written in place, so it must be contiguous and start at a multiple of 16.");
}

Tensor check_rows(const char* op, const Tensor& rows, int64_t M, const Tensor& like) {
  check_same_device(op, "rows", rows, "the other tensors", like);
  check_dtype(op, "rows", rows, ScalarType::Long);
  check_dim(op, "rows", rows, 2);
  check_size(op, "rows", rows, 0, M, "rows of the step");
  check_size(op, "rows", rows, 1, kRowColumns, "token, sequence, position, slot, prefix, tree");
  return as_contiguous(rows);
}

// f32 [size] or nothing; `keep` holds the tensor while its pointer is used.
const float* vector(const char* op, const char* name, const std::optional<Tensor>& t, int64_t size,
                    const Tensor& like, Tensor& keep) {
  if (!t.has_value()) return nullptr;
  check_same_device(op, name, *t, "the other tensors", like);
  check_dtype(op, name, *t, ScalarType::Float);
  SALTIRE_CHECK(t->numel() == size, op, ": ", name, " is ", describe(*t), "; expected ", size,
                " values.");
  keep = as_aligned(*t);
  return static_cast<const float*>(keep.const_data_ptr());
}

int* counters_of(const char* op, const std::optional<Tensor>& scratch, int64_t count,
                 const Tensor& like) {
  SALTIRE_CHECK(scratch.has_value() && scratch->numel() >= count, op, ": scratch holds ",
                scratch.has_value() ? scratch->numel() : 0, " counters; expected at least ", count,
                " int32 zeros.");
  check_in_place(op, "scratch", *scratch, ScalarType::Int);
  check_same_device(op, "scratch", *scratch, "the other tensors", like);
  return static_cast<int*>(scratch->mutable_data_ptr());
}

// --- tokens -------------------------------------------------------------------------------------

void embed_rows(Tensor rows, Tensor embedding, Tensor state) {
  constexpr const char* kOp = "embed_rows";
  check_in_place(kOp, "state", state, ScalarType::Float);
  check_dim(kOp, "state", state, 2);
  check_dim(kOp, "embedding", embedding, 2);
  check_size(kOp, "embedding", embedding, 1, state.size(1), "the state's width");
  check_same_device(kOp, "embedding", embedding, "state", state);
  SALTIRE_CHECK(embedding.is_contiguous(), kOp, ": embedding is not contiguous.");
  const Tensor r = check_rows(kOp, rows, state.size(0), state);
  EmbedProblem p;
  p.M = state.size(0);
  p.D = state.size(1);
  p.rows = static_cast<const int64_t*>(r.const_data_ptr());
  p.embedding = embedding.const_data_ptr();
  p.dtype = number_of(kOp, "embedding", embedding.scalar_type(), true);
  p.state = static_cast<float*>(state.mutable_data_ptr());
  const cuda::Place place(state);
  run(p, place.device, place.stream);
}

// What a token kernel reads; tensors live as long as this does.
struct Tokens {
  TokenProblem p;
  Tensor delta, gain, diag, gate_up;
};

void read_residual(const char* op, Tokens& t, const Tensor& state,
                   const std::optional<Tensor>& delta, const Tensor& gain, double eps,
                   const std::optional<Tensor>& trace) {
  check_in_place(op, "state", state, ScalarType::Float);
  check_dim(op, "state", state, 2);
  t.p.M = state.size(0);
  t.p.K = state.size(1);
  t.p.state = static_cast<float*>(state.mutable_data_ptr());
  t.p.gain = vector(op, "gain", gain, t.p.K, state, t.gain);
  t.p.eps = static_cast<float>(eps);
  if (delta.has_value()) {
    check_same_device(op, "delta", *delta, "state", state);
    check_dim(op, "delta", *delta, 2);
    check_size(op, "delta", *delta, 0, t.p.M, "the state's rows");
    check_size(op, "delta", *delta, 1, t.p.K, "the state's width");
    t.delta = as_aligned(*delta);
    t.p.delta = t.delta.const_data_ptr();
    t.p.dtype = number_of(op, "delta", delta->scalar_type());
  }
  if (!trace.has_value()) return;
  check_in_place(op, "trace", *trace, ScalarType::Float);
  check_same_device(op, "trace", *trace, "state", state);
  SALTIRE_CHECK(trace->numel() == t.p.M * t.p.K, op, ": trace is ", describe(*trace),
                "; expected the state's size.");
  t.p.trace = static_cast<float*>(trace->mutable_data_ptr());
}

void read_gate_up(const char* op, Tokens& t, const Tensor& gate_up) {
  check_dim(op, "gate_up", gate_up, 2);
  SALTIRE_CHECK(gate_up.size(1) % 2 == 0, op, ": gate_up is ", describe(gate_up),
                "; expected gates, then as many ups.");
  t.gate_up = as_aligned(gate_up);
  t.p.M = gate_up.size(0);
  t.p.K = gate_up.size(1) / 2;
  t.p.gate_up = t.gate_up.const_data_ptr();
  t.p.dtype = number_of(op, "gate_up", gate_up.scalar_type());
}

Tensor give_numbers(const char* op, Tokens& t, const Tensor& like, ScalarType type) {
  const Number dtype = number_of(op, "out_dtype", type);
  SALTIRE_CHECK(t.p.dtype == dtype || (t.p.delta == nullptr && t.p.gate_up == nullptr), op,
                ": the result is to be ", dtype_name(type),
                ", but what it is made of has another dtype.");
  t.p.dtype = dtype;
  Tensor y = new_tensor(like, {t.p.M, t.p.K}, type);
  t.p.y = y.mutable_data_ptr();
  const cuda::Place place(like);
  run(t.p, place.device, place.stream);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> give_codes(const char* op, Tokens& t, const Tensor& like,
                                              int64_t bits, const std::optional<Tensor>& diag,
                                              int64_t hadamard, double clip, int64_t sum_group) {
  const int64_t K = t.p.K, group = sum_group == 0 ? K : sum_group;
  SALTIRE_CHECK(bits == 3 || bits == 4 || bits == 8, op, ": bits = ", bits,
                "; expected 3, 4 or 8.");
  SALTIRE_CHECK(
      hadamard >= 1 && hadamard <= 256 && (hadamard & (hadamard - 1)) == 0 && K % hadamard == 0, op,
      ": hadamard = ", hadamard, "; expected a power of two up to 256 that divides K = ", K, ".");
  SALTIRE_CHECK(clip > 0.0 && clip <= 1.0, op, ": clip = ", clip, "; expected a ratio in (0, 1].");
  SALTIRE_CHECK(group > 0 && group % 8 == 0 && K % group == 0, op, ": sum_group = ", sum_group,
                "; expected a multiple of 8 that divides K = ", K, ".");
  Tensor codes = new_tensor(like, {t.p.M, K}, ScalarType::Char);
  Tensor scale = new_tensor(like, {t.p.M}, ScalarType::Float);
  Tensor sums = new_tensor(like, {t.p.M, K / group}, ScalarType::Int);
  DeviceRounding& r = t.p.rounding;
  r.diag = vector(op, "diag", diag, K, like, t.diag);
  r.hadamard = static_cast<int>(hadamard);
  r.Q = max_activation_code(static_cast<int>(bits));
  r.clip_over_q = static_cast<float>(clip / r.Q);
  r.sum_group = group;
  r.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  r.scale = static_cast<float*>(scale.mutable_data_ptr());
  r.sums = static_cast<int32_t*>(sums.mutable_data_ptr());
  const cuda::Place place(like);
  run(t.p, place.device, place.stream);
  return {codes, scale, sums};
}

Tensor residual_norm(Tensor state, std::optional<Tensor> delta, Tensor gain, double eps,
                     ScalarType out_dtype, std::optional<Tensor> trace) {
  Tokens t;
  read_residual("residual_norm", t, state, delta, gain, eps, trace);
  return give_numbers("residual_norm", t, state, out_dtype);
}

std::tuple<Tensor, Tensor, Tensor> residual_norm_quantize(
    Tensor state, std::optional<Tensor> delta, Tensor gain, double eps, std::optional<Tensor> trace,
    int64_t bits, std::optional<Tensor> diag, int64_t hadamard, double clip, int64_t sum_group) {
  Tokens t;
  read_residual("residual_norm_quantize", t, state, delta, gain, eps, trace);
  return give_codes("residual_norm_quantize", t, state, bits, diag, hadamard, clip, sum_group);
}

Tensor swiglu(Tensor gate_up) {
  Tokens t;
  read_gate_up("swiglu", t, gate_up);
  return give_numbers("swiglu", t, gate_up, gate_up.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> swiglu_quantize(Tensor gate_up, int64_t bits,
                                                   std::optional<Tensor> diag, int64_t hadamard,
                                                   double clip, int64_t sum_group) {
  Tokens t;
  read_gate_up("swiglu_quantize", t, gate_up);
  return give_codes("swiglu_quantize", t, gate_up, bits, diag, hadamard, clip, sum_group);
}

// --- heads --------------------------------------------------------------------------------------

DeviceCache read_cache(const char* op, const Tensor& kv, const std::optional<Tensor>& scales,
                       int64_t layer, int64_t head_dim, const Tensor& like) {
  check_same_device(op, "kv", kv, "the other tensors", like);
  check_dim(op, "kv", kv, 6);
  SALTIRE_CHECK(head_dim % kSlotBlock == 0 && head_dim <= kMaxHeadDim, op,
                ": head_dim = ", head_dim, "; expected a multiple of ", kSlotBlock, " up to ",
                kMaxHeadDim, ".");
  DeviceCache c;
  c.head_dim = head_dim;
  const int64_t width = kv.size(5);
  switch (kv.scalar_type()) {
    case ScalarType::Float:
      c.format = Format::f32;
      break;
    case ScalarType::BFloat16:
      c.format = Format::bf16;
      break;
    case ScalarType::Byte:
      c.format = width == head_dim ? Format::u8 : 2 * width == head_dim ? Format::u4 : Format::u2;
      break;
    default:
      fail(op, ": kv is ", describe(kv), "; expected float32, bfloat16 or uint8.");
  }
  const int64_t bits = is_coded(c.format) ? format_bits(c.format) : 8;
  SALTIRE_CHECK(kv.is_contiguous() && kv.size(1) == 2 && kv.size(4) % kSlotBlock == 0 &&
                    width * 8 == head_dim * bits && layer >= 0 && layer < kv.size(0),
                op, ": kv is ", describe(kv), " and layer ", layer,
                "; expected a contiguous [L, 2, B, kv_heads, T, head_dim · bits] of this model.");
  c.sequences = kv.size(2);
  c.kv_heads = kv.size(3);
  c.slots = kv.size(4);
  const int64_t heads = layer * 2 * c.sequences * c.kv_heads;
  c.data = static_cast<uint8_t*>(kv.mutable_data_ptr()) + heads * c.head_bytes();
  if (!is_coded(c.format)) return c;
  SALTIRE_CHECK(scales.has_value(), op, ": a uint8 kv needs scales.");
  check_same_device(op, "scales", *scales, "kv", kv);
  check_dtype(op, "scales", *scales, ScalarType::Half);
  SALTIRE_CHECK(scales->is_contiguous() && scales->numel() * width == 2 * kv.numel(), op,
                ": scales is ", describe(*scales),
                "; expected a scale and a low for each slot of each head.");
  c.grids = static_cast<uint16_t*>(scales->mutable_data_ptr()) + heads * 2 * c.slots;
  return c;
}

std::tuple<Tensor, Tensor> append_heads(Tensor qkv, Tensor rows, Tensor rotation,
                                        std::optional<Tensor> q_norm, std::optional<Tensor> k_norm,
                                        double eps, int64_t heads, Tensor kv,
                                        std::optional<Tensor> scales, int64_t layer) {
  constexpr const char* kOp = "append_heads";
  check_dim(kOp, "qkv", qkv, 2);
  check_dim(kOp, "rotation", rotation, 3);
  check_same_device(kOp, "rotation", rotation, "qkv", qkv);
  check_dtype(kOp, "rotation", rotation, ScalarType::Float);
  check_size(kOp, "rotation", rotation, 1, 2, "cosines and sines");
  SALTIRE_CHECK(rotation.is_contiguous(), kOp, ": rotation is not contiguous.");
  AppendProblem p;
  p.M = qkv.size(0);
  p.heads = heads;
  const int64_t d = 2 * rotation.size(2);
  p.cache = read_cache(kOp, kv, scales, layer, d, qkv);
  check_size(kOp, "qkv", qkv, 1, (heads + 2 * p.cache.kv_heads) * d, "queries, keys and values");
  const Tensor x = as_contiguous(qkv), r = check_rows(kOp, rows, p.M, qkv);
  Tensor q_gain, k_gain;
  p.dtype = number_of(kOp, "qkv", qkv.scalar_type());
  p.qkv = x.const_data_ptr();
  p.rows = static_cast<const int64_t*>(r.const_data_ptr());
  p.rotation = static_cast<const float*>(rotation.const_data_ptr());
  p.q_norm = vector(kOp, "q_norm", q_norm, d, qkv, q_gain);
  p.k_norm = vector(kOp, "k_norm", k_norm, d, qkv, k_gain);
  p.eps = static_cast<float>(eps);
  Tensor queries = new_tensor(qkv, {p.M, heads, d}, ScalarType::Float);
  Tensor own = new_tensor(qkv, {2, p.M, p.cache.kv_heads, d}, ScalarType::Float);
  p.queries = static_cast<float*>(queries.mutable_data_ptr());
  p.own = static_cast<float*>(own.mutable_data_ptr());
  const cuda::Place place(qkv);
  run(p, place.device, place.stream);
  return {queries, own};
}

Tensor attend_heads(Tensor queries, Tensor own, Tensor rows, Tensor kv,
                    std::optional<Tensor> scales, int64_t layer, int64_t window, bool prompt,
                    ScalarType out_dtype, std::optional<Tensor> scratch) {
  constexpr const char* kOp = "attend_heads";
  check_in_place(kOp, "queries", queries, ScalarType::Float);
  check_dim(kOp, "queries", queries, 3);
  check_same_device(kOp, "own", own, "queries", queries);
  AttendProblem p;
  p.M = queries.size(0);
  p.heads = queries.size(1);
  p.window = window;
  p.prompt = prompt;
  const int64_t d = queries.size(2);
  p.cache = read_cache(kOp, kv, scales, layer, d, queries);
  SALTIRE_CHECK(p.heads % p.cache.kv_heads == 0, kOp, ": ", p.heads, " heads cannot share ",
                p.cache.kv_heads, " heads of keys evenly.");
  SALTIRE_CHECK(own.is_contiguous() && own.scalar_type() == ScalarType::Float &&
                    own.numel() == 2 * p.M * p.cache.kv_heads * d,
                kOp, ": own is ", describe(own), "; expected what append_heads gave.");
  const Tensor r = check_rows(kOp, rows, p.M, queries);
  p.queries = static_cast<const float*>(queries.const_data_ptr());
  p.own = static_cast<const float*>(own.const_data_ptr());
  p.rows = static_cast<const int64_t*>(r.const_data_ptr());
  p.out_dtype = number_of(kOp, "out_dtype", out_dtype);
  Tensor out = new_tensor(queries, {p.M, p.heads * d}, out_dtype);
  p.out = out.mutable_data_ptr();
  const AttendPlan plan = make_plan(p);
  std::optional<Tensor> parts;
  if (plan.parts > 0) {
    p.counters = counters_of(kOp, scratch, plan.counters, queries);
    parts = new_tensor(queries, {plan.parts}, ScalarType::Float);
    p.parts = static_cast<float*>(parts->mutable_data_ptr());
  }
  const cuda::Place place(queries);
  run(p, plan, place.device, place.stream);
  return out;
}

std::tuple<Tensor, Tensor> best_logits(Tensor y, Tensor logits, std::optional<Tensor> scratch) {
  constexpr const char* kOp = "best_logits";
  check_dim(kOp, "y", y, 2);
  check_same_device(kOp, "logits", logits, "y", y);
  check_in_place(kOp, "logits", logits, ScalarType::Float);
  const Tensor in = as_contiguous(y);
  LogitsProblem p;
  p.M = y.size(0);
  p.V = y.size(1);
  SALTIRE_CHECK(logits.numel() == p.M * p.V && p.V > 0, kOp, ": logits is ", describe(logits),
                "; expected the size of y, ", describe(y), ".");
  p.y = in.const_data_ptr();
  p.dtype = number_of(kOp, "y", y.scalar_type());
  p.logits = static_cast<float*>(logits.mutable_data_ptr());
  p.counters = counters_of(kOp, scratch, p.M, y);
  Tensor parts = new_tensor(y, {p.M, splits_of(p), 4}, ScalarType::Float);
  Tensor best = new_tensor(y, {p.M}, ScalarType::Long);
  Tensor share = new_tensor(y, {p.M}, ScalarType::Float);
  p.parts = parts.mutable_data_ptr();
  p.best = static_cast<int64_t*>(best.mutable_data_ptr());
  p.share = static_cast<float*>(share.mutable_data_ptr());
  const cuda::Place place(y);
  run(p, place.device, place.stream);
  return {best, share};
}

}  // namespace
}  // namespace saltire::decoder_layer

STABLE_TORCH_LIBRARY_IMPL(saltire, CUDA, m) {
  using namespace saltire::decoder_layer;
  m.impl("embed_rows", TORCH_BOX(&embed_rows));
  m.impl("residual_norm", TORCH_BOX(&residual_norm));
  m.impl("residual_norm_quantize", TORCH_BOX(&residual_norm_quantize));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_quantize", TORCH_BOX(&swiglu_quantize));
  m.impl("append_heads", TORCH_BOX(&append_heads));
  m.impl("attend_heads", TORCH_BOX(&attend_heads));
  m.impl("best_logits", TORCH_BOX(&best_logits));
}
