#include "case.h"
#include "speculate/device.h"

namespace {

using namespace saltire::speculate;

void warp_case(emulator::Case& c) {
  WarpProblem p;
  p.M = c.integer("M");
  p.V = c.integer("V");
  p.logits = c.pointer<const float>("logits");
  p.p = c.pointer<float>("p");
  p.warp = {static_cast<float>(c.number("temperature")), c.integer("top_k"),
            static_cast<float>(c.number("top_p")), static_cast<float>(c.number("min_p"))};
  c.tell("plan", make_plan(p, c.device()).text());
  if (p.p != nullptr) warp(p, c.device(), nullptr);
}

void draw_case(emulator::Case& c) {
  DrawProblem p;
  p.M = c.integer("M");
  p.V = c.integer("V");
  p.p = c.pointer<const float>("p");
  p.sequences = c.pointer<const int64_t>("sequences");
  p.positions = c.pointer<const int64_t>("positions");
  p.seed = static_cast<uint64_t>(c.integer("key"));
  p.draft = c.number("draft") != 0;
  p.tokens = c.pointer<int64_t>("tokens");
  draw(p, nullptr);
}

void verify_case(emulator::Case& c) {
  VerifyProblem p;
  p.B = c.integer("B");
  p.S = c.integer("S");
  p.V = c.integer("V");
  p.p = c.pointer<const float>("p");
  p.q = c.pointer<const float>("q");
  p.drafts = c.pointer<const int64_t>("drafts");
  p.counts = c.pointer<const int64_t>("counts");
  p.sequences = c.pointer<const int64_t>("sequences");
  p.positions = c.pointer<const int64_t>("positions");
  p.seed = static_cast<uint64_t>(c.integer("key"));
  p.accepted = c.pointer<int64_t>("accepted");
  p.next = c.pointer<int64_t>("next");
  verify(p, nullptr);
}

void body(emulator::Case& c) {
  const std::string what = c.word("what");
  if (what == "warp") return warp_case(c);
  if (what == "draw") return draw_case(c);
  verify_case(c);
}

}  // namespace

int main() {
  return emulator::run_case(body);
}
