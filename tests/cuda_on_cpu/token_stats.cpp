#include "case.h"
#include "emulator.h"
#include "token_stats/device.h"
#include "token_stats/device_linear.h"

namespace {

using namespace saltire::token_stats;

DeviceTokens tokens_of(const emulator::Case& c) {
  DeviceTokens t;
  t.M = c.integer("M");
  t.labels = c.pointer<const int64_t>("labels");
  t.temperature = c.pointer<const float>("temperature");
  t.own_temperature = c.number("own_temperature", 0) != 0;
  t.first = static_cast<int64_t>(c.number("first", 0));
  t.vocabulary = static_cast<int64_t>(c.number("vocabulary", 0));
  t.softcap = static_cast<float>(c.number("softcap", 0));
  return t;
}

DeviceStats stats_of(const emulator::Case& c) {
  return {c.pointer<float>("logprob"), c.pointer<float>("entropy"), c.pointer<float>("logsumexp"),
          c.pointer<float>("max"),     c.pointer<float>("log_sum"), c.pointer<int64_t>("argmax")};
}

DeviceGradients gradients_of(const emulator::Case& c) {
  return {c.pointer<const float>("max"),       c.pointer<const float>("log_sum"),
          c.pointer<const float>("entropy"),   c.pointer<const float>("d_logprob"),
          c.pointer<const float>("d_entropy"), c.pointer<const float>("d_lse")};
}

void rows(emulator::Case& c, bool backward) {
  RowsProblem p;
  p.tokens = tokens_of(c);
  p.x = c.pointer<const void>("x");
  p.dtype = static_cast<Dtype>(c.integer("dtype"));
  p.V = c.integer("V");
  p.dx = c.pointer<void>("dx");
  c.tell("plan", make_plan(p).text());
  if (backward) return gradient_of_logits(p, gradients_of(c), nullptr);
  stats_of_logits(p, stats_of(c), nullptr);
}

void linear(emulator::Case& c, const std::string& what) {
  LinearProblem p;
  p.tokens = tokens_of(c);
  p.D = c.integer("D");
  p.V = c.integer("V");
  p.hidden = c.pointer<const void>("hidden");
  p.head = c.pointer<const void>("head");
  p.hidden_dtype = static_cast<Dtype>(c.integer("hidden_dtype"));
  p.head_dtype = static_cast<Dtype>(c.integer("head_dtype"));
  p.bias = c.pointer<const float>("bias");
  const auto device = c.device();
  const int route = static_cast<int>(c.number("route", -1));
  LinearPlan plan =
      route < 0 ? make_plan(p, device) : make_plan(p, device, static_cast<LinearRoute>(route));
  // A smaller chunk than memory asks for, so that a small case has several.
  plan.chunk = std::min(plan.chunk, static_cast<int64_t>(c.number("chunk", 1e9)));
  c.tell("plan", plan.text());
  if (what == "plan") return;
  const bool backward = what == "linear_backward";
  void* const workspace = emulator::allocate(
      "workspace", static_cast<size_t>(backward ? plan.backward_bytes : plan.forward_bytes), 256,
      emulator::Fill::poison);
  if (!backward) return stats_of_linear(p, plan, stats_of(c), workspace, nullptr);
  const DeviceLinearGradients out = {c.pointer<float>("d_hidden"), c.pointer<void>("d_head"),
                                     c.pointer<float>("d_bias")};
  gradient_of_linear(p, plan, gradients_of(c), out, workspace, nullptr);
}

// Which block owns which tiles, as "row:begin-end".
void tiling(emulator::Case& c) {
  const auto number = [&](const char* name) { return static_cast<int>(c.integer(name)); };
  const Tiling t = make_tiling(number("rows"), number("columns"), number("slots"));
  std::string text;
  for (int block = 0; block < t.blocks(); ++block) {
    const Place place = t.place(block);
    text += std::to_string(place.row_tile) + ":" + std::to_string(t.begin(place.split)) + "-" +
            std::to_string(t.begin(place.split + 1)) + " ";
  }
  c.tell("tiles", text);
}

void body(emulator::Case& c) {
  const std::string what = c.word("what");
  if (what == "tiling") return tiling(c);
  if (what == "rows" || what == "rows_backward") return rows(c, what == "rows_backward");
  linear(c, what);
}

}  // namespace

int main() {
  return emulator::run_case(body);
}
