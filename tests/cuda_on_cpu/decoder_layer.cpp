#include "case.h"
#include "decoder_layer/device.h"
#include "emulator.h"

namespace {

using namespace saltire::decoder_layer;
using saltire::cuda::Number;

Number number(const emulator::Case& c, const char* name) {
  return static_cast<Number>(c.integer(name));
}

DeviceCache cache_of(const emulator::Case& c) {
  DeviceCache cache;
  cache.format = static_cast<Format>(c.integer("format"));
  cache.sequences = c.integer("B");
  cache.kv_heads = c.integer("kv_heads");
  cache.slots = c.integer("slots");
  cache.head_dim = c.integer("head_dim");
  cache.data = c.pointer<uint8_t>("kv");
  cache.grids = c.pointer<uint16_t>("scales");
  return cache;
}

void run_tokens(emulator::Case& c) {
  TokenProblem p;
  p.M = c.integer("M");
  p.K = c.integer("K");
  p.dtype = number(c, "dtype");
  p.state = c.pointer<float>("state");
  p.delta = c.pointer<void>("delta");
  p.gain = c.pointer<float>("gain");
  p.eps = static_cast<float>(c.number("eps", 0));
  p.trace = c.pointer<float>("trace");
  p.gate_up = c.pointer<void>("gate_up");
  p.y = c.pointer<void>("y");
  const auto bits = static_cast<int>(c.number("bits", 0));
  if (bits != 0) {
    DeviceRounding& r = p.rounding;
    r.diag = c.pointer<float>("diag");
    r.hadamard = static_cast<int>(c.integer("hadamard"));
    r.Q = (1 << (bits - 1)) - 1;
    r.clip_over_q = static_cast<float>(c.number("clip") / r.Q);
    r.sum_group = c.integer("sum_group");
    r.codes = c.pointer<int8_t>("codes");
    r.scale = c.pointer<float>("scale");
    r.sums = c.pointer<int32_t>("sums");
  }
  c.tell("plan", make_plan(p).text());
  run(p, c.device(), nullptr);
}

void run_append(emulator::Case& c) {
  AppendProblem p;
  p.M = c.integer("M");
  p.heads = c.integer("heads");
  p.dtype = number(c, "dtype");
  p.qkv = c.pointer<void>("qkv");
  p.rows = c.pointer<int64_t>("rows");
  p.rotation = c.pointer<float>("rotation");
  p.q_norm = c.pointer<float>("q_norm");
  p.k_norm = c.pointer<float>("k_norm");
  p.eps = static_cast<float>(c.number("eps"));
  p.cache = cache_of(c);
  p.queries = c.pointer<float>("queries");
  p.own = c.pointer<float>("own");
  run(p, c.device(), nullptr);
}

void run_attend(emulator::Case& c, bool only_plan) {
  AttendProblem p;
  p.M = c.integer("M");
  p.heads = c.integer("heads");
  p.window = c.integer("window");
  p.prompt = c.integer("prompt") != 0;
  p.queries = c.pointer<float>("queries");
  p.own = c.pointer<float>("own");
  p.rows = c.pointer<int64_t>("rows");
  p.cache = cache_of(c);
  p.out = c.pointer<void>("out");
  p.out_dtype = number(c, "dtype");
  const AttendPlan plan = make_plan(p);
  c.tell("plan", plan.text());
  if (only_plan) return;
  p.counters = c.pointer<int>("counters");
  if (plan.parts > 0) {
    p.parts = static_cast<float*>(emulator::allocate("parts", static_cast<size_t>(plan.parts) * 4,
                                                     256, emulator::Fill::poison));
  }
  run(p, plan, c.device(), nullptr);
}

void run_logits(emulator::Case& c) {
  LogitsProblem p;
  p.M = c.integer("M");
  p.V = c.integer("V");
  p.y = c.pointer<void>("y");
  p.dtype = number(c, "dtype");
  p.logits = c.pointer<float>("logits");
  p.counters = c.pointer<int>("counters");
  p.parts = emulator::allocate("parts", static_cast<size_t>(p.M * splits_of(p)) * 16, 256,
                               emulator::Fill::poison);
  p.best = c.pointer<int64_t>("best");
  p.share = c.pointer<float>("share");
  run(p, c.device(), nullptr);
}

void body(emulator::Case& c) {
  const std::string what = c.word("what");
  if (what == "tokens") return run_tokens(c);
  if (what == "append") return run_append(c);
  if (what == "attend") return run_attend(c, false);
  if (what == "plan") return run_attend(c, true);
  if (what == "logits") return run_logits(c);
  EmbedProblem p;
  p.M = c.integer("M");
  p.D = c.integer("D");
  p.rows = c.pointer<int64_t>("rows");
  p.embedding = c.pointer<void>("embedding");
  p.dtype = number(c, "dtype");
  p.state = c.pointer<float>("state");
  run(p, c.device(), nullptr);
}

}  // namespace

int main() {
  return emulator::run_case(body);
}
