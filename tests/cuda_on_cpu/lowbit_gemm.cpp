#include "case.h"
#include "emulator.h"
#include "lowbit_gemm/device.h"
#include "lowbit_gemm/stream_k.h"

namespace {

using namespace saltire::lowbit_gemm;

DeviceLayout layout_of(const emulator::Case& c) {
  DeviceLayout l;
  l.n = c.integer("N");
  l.k = c.integer("K");
  l.group = c.integer("group");
  l.bits = static_cast<int>(c.integer("bits"));
  l.has_zero = c.number("has_zero") != 0;
  l.table = static_cast<Float>(c.integer("table"));
  return l;
}

// Every unit has one worker, and the parts of a split block are those that a sum visits.
void tell_stream(emulator::Case& c) {
  const StreamK s = {static_cast<int>(c.integer("units")), static_cast<int>(c.integer("stages")),
                     static_cast<int>(c.integer("workers"))};
  std::string text;
  for (int w = 0; w < s.workers; ++w) text += std::to_string(s.begin(w)) + " ";
  c.tell("begins", text + std::to_string(s.begin(s.workers)));
  text.clear();
  for (int u = 0; u < s.units; ++u) text += std::to_string(s.owner(u)) + " ";
  c.tell("owners", text);
  text.clear();
  for (int b = 0; b < s.units / s.stages; ++b) {
    for (int w = s.first_worker(b); s.is_split(b) && w <= s.last_worker(b); ++w) {
      text += std::to_string(s.slot(w, b)) + " ";
    }
  }
  c.tell("slots", text);
}

void body(emulator::Case& c) {
  const std::string what = c.word("what");
  if (what == "stream") return tell_stream(c);
  const DeviceLayout layout = layout_of(c);
  if (what == "sizes") return c.tell("bytes", std::to_string(layout.bytes()));
  if (what == "prepack") {
    return prepack(layout, c.pointer<uint8_t>("packed"), c.pointer<void>("scale"),
                   c.pointer<void>("zero"), c.pointer<uint8_t>("w"), nullptr);
  }
  if (what == "unprepack") {
    return unprepack(layout, c.pointer<uint8_t>("w"), c.pointer<uint8_t>("packed"),
                     c.pointer<void>("scale"), c.pointer<void>("zero"), nullptr);
  }
  DeviceProblem p;
  p.layout = layout;
  p.M = c.integer("M");
  p.act_bits = static_cast<int>(c.integer("act_bits"));
  p.x = c.pointer<int8_t>("x");
  p.x_scale = c.pointer<float>("x_scale");
  p.x_sum = c.pointer<int32_t>("x_sum");
  p.w = c.pointer<uint8_t>("w");
  p.bias = c.pointer<float>("bias");
  p.low_rank_x = c.pointer<float>("low_rank_x");
  p.low_rank_w = c.pointer<float>("low_rank_w");
  p.rank = c.integer("rank");
  p.out = c.pointer<void>("y");
  p.out_type = static_cast<Float>(c.integer("out_type"));
  const saltire::cuda::Device device = c.device();
  const int route = static_cast<int>(c.number("route", -1));
  const DevicePlan plan =
      route < 0 ? make_plan(p, device) : make_plan(p, device, static_cast<Route>(route));
  c.tell("plan", plan.text());
  if (what == "plan") return;
  void* workspace = nullptr;
  if (plan.workspace_bytes > 0) {
    workspace = emulator::allocate("workspace", static_cast<size_t>(plan.workspace_bytes), 256,
                                   emulator::Fill::poison);
  }
  run(p, plan, device, workspace, nullptr);
}

}  // namespace

int main() {
  return emulator::run_case(body);
}
