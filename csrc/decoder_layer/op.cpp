// Registers decoder_step and decoder_draft, and checks what they get.
#include "decoder_layer/op.h"

#include <tuple>

#include "core/isa.h"
#include "core/quant_linear.h"
#include "core/tensor.h"
#include "core/threads.h"
#include "decoder_layer/draft.h"
#include "decoder_layer/open.h"
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

const uint8_t* read_units(const char* op, const Model& m, const Tensor& units) {
  check_dtype(op, "units", units, ScalarType::Byte);
  SALTIRE_CHECK(units.numel() == static_cast<int64_t>(m.layers.size()), op, ": units is ",
                describe(units), "; expected one for each of ", m.layers.size(), " layers.");
  return static_cast<const uint8_t*>(units.const_data_ptr());
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
  check_dtype(kOp, "wanted", wanted, ScalarType::Long);
  const Tensor rows_c = as_contiguous(rows), units_c = as_contiguous(units),
               wanted_c = as_contiguous(wanted);
  StepArguments args;
  args.rows = rows.size(0);
  args.row = static_cast<const Row*>(rows_c.const_data_ptr());
  args.units = read_units(kOp, m, units_c);
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

// Greedy drafts of some sequences: see draft.h.
std::tuple<Tensor, Tensor, Tensor> decoder_draft(Tensor handle, Tensor kv,
                                                 std::optional<Tensor> scales, Tensor rotation,
                                                 Tensor starts, Tensor units, Tensor survival,
                                                 int64_t longest, double confidence, double worth,
                                                 int64_t head_outputs) {
  constexpr const char* kOp = "decoder_draft";
  const std::shared_ptr<Open> open = find(kOp, handle);
  const std::lock_guard<std::mutex> lock(open->busy);
  const Model& m = open->model;
  const Cache cache = read_cache(m, kv, scales);
  check_dtype(kOp, "starts", starts, ScalarType::Long);
  check_dim(kOp, "starts", starts, 2);
  check_size(kOp, "starts", starts, 1, 4, "token, sequence, slot, most");
  check_dtype(kOp, "survival", survival, ScalarType::Float);
  check_cpu(kOp, "survival", survival);
  SALTIRE_CHECK(survival.numel() == kConfidenceBins, kOp, ": survival is ", describe(survival),
                "; expected float32 [", kConfidenceBins, "], one for each bin of confidence.");
  SALTIRE_CHECK(longest >= 0, kOp, ": longest = ", longest, "; expected 0 or more.");
  SALTIRE_CHECK(head_outputs >= 0, kOp, ": head_outputs = ", head_outputs,
                "; expected 0 (all) or more.");
  const Tensor starts_c = as_contiguous(starts), survival_c = as_contiguous(survival),
               units_c = as_contiguous(units);
  StepArguments step;
  step.units = read_units(kOp, m, units_c);
  step.head_outputs = head_outputs;
  read_rotation(m, rotation, step);
  DraftArguments args;
  args.sequences = starts.size(0);
  args.longest = longest;
  args.start = static_cast<const DraftStart*>(starts_c.const_data_ptr());
  args.survival = static_cast<const float*>(survival_c.const_data_ptr());
  args.confidence = static_cast<float>(confidence);
  args.worth = static_cast<float>(worth);
  for (int64_t b = 0; b < args.sequences; ++b) {
    const DraftStart& start = args.start[b];
    SALTIRE_CHECK(start.token >= 0 && start.token < m.vocabulary, kOp, ": start ", b, " has token ",
                  start.token, "; the vocabulary has ", m.vocabulary, ".");
    SALTIRE_CHECK(start.sequence >= 0 && start.sequence < cache.sequences, kOp, ": start ", b,
                  " is of sequence ", start.sequence, "; the cache has ", cache.sequences, ".");
    const int64_t end = std::min(cache.slots, step.positions);
    SALTIRE_CHECK(
        start.slot >= 0 && start.most >= 0 && start.most <= std::min(longest, end - start.slot),
        kOp, ": start ", b, " asks for ", start.most, " drafts from slot ", start.slot,
        " on; longest is ", longest, " and the cache has ", end, " slots.");
  }
  Tensor tokens = new_tensor(starts, {args.sequences, args.longest}, ScalarType::Long);
  Tensor shares = new_tensor(starts, {args.sequences, args.longest}, ScalarType::Float);
  Tensor counts = new_tensor(starts, {args.sequences}, ScalarType::Long);
  args.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  args.shares = static_cast<float*>(shares.mutable_data_ptr());
  args.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  std::fill(args.tokens, args.tokens + args.sequences * args.longest, int64_t{-1});
  std::fill(args.shares, args.shares + args.sequences * args.longest, 0.0f);
  if (args.longest > 0) {
    const Kernels k = kernels();
    lead_team([&](Team& team) { draft(m, cache, k, step, args, open->work, team); });
  }
  return {tokens, shares, counts};
}

}  // namespace
}  // namespace saltire::decoder_layer

STABLE_TORCH_LIBRARY_FRAGMENT(saltire, m) {
  m.def(
      "decoder_step(Tensor handle, Tensor(a!) kv, Tensor(b!)? scales, Tensor rotation, Tensor "
      "rows, "
      "Tensor units, Tensor wanted, Tensor(c!) logits, Tensor(d!)? hidden, Tensor(e!)? trace, *, "
      "bool prefill) "
      "-> (Tensor, Tensor)");
  m.def(
      "decoder_draft(Tensor handle, Tensor(a!) kv, Tensor(b!)? scales, Tensor rotation, Tensor "
      "starts, Tensor units, Tensor survival, int longest, float confidence, float worth, int "
      "head_outputs) -> "
      "(Tensor, Tensor, Tensor)");
  // The parts that a device runs one after another; on the CPU, Python registers the specification.
  m.def("embed_rows(Tensor rows, Tensor embedding, Tensor(a!) state) -> ()");
  m.def(
      "residual_norm(Tensor(a!) state, Tensor? delta, Tensor gain, float eps, ScalarType "
      "out_dtype, "
      "Tensor(b!)? trace) -> Tensor");
  m.def(
      "residual_norm_quantize(Tensor(a!) state, Tensor? delta, Tensor gain, float eps, "
      "Tensor(b!)? trace, int bits, Tensor? diag, int hadamard, float clip, int sum_group) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def(
      "swiglu_quantize(Tensor gate_up, int bits, Tensor? diag, int hadamard, float clip, int "
      "sum_group) -> (Tensor, Tensor, Tensor)");
  m.def(
      "append_heads(Tensor qkv, Tensor rows, Tensor rotation, Tensor? q_norm, Tensor? k_norm, "
      "float "
      "eps, int heads, Tensor(a!) kv, Tensor(b!)? scales, int layer) -> (Tensor, Tensor)");
  m.def(
      "attend_heads(Tensor queries, Tensor own, Tensor rows, Tensor kv, Tensor? scales, int layer, "
      "int window, bool prompt, ScalarType out_dtype, Tensor(a!)? scratch) -> Tensor");
  m.def("best_logits(Tensor y, Tensor(a!) logits, Tensor(b!)? scratch) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(saltire, CPU, m) {
  using namespace saltire::decoder_layer;
  m.impl("decoder_step", TORCH_BOX(&decoder_step));
  m.impl("decoder_draft", TORCH_BOX(&decoder_draft));
}
