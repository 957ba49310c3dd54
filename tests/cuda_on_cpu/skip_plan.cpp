#include "case.h"
#include "skip_plan/device.h"

namespace {

using namespace saltire::skip_plan;

void body(emulator::Case& c) {
  DeviceProblem p;
  p.M = c.integer("M");
  p.D = c.integer("D");
  p.keep = c.pointer<const float>("keep");
  p.skip = c.pointer<const float>("skip");
  p.truth = c.pointer<const float>("truth");
  p.chosen = c.pointer<float>("chosen");
  p.kept = c.pointer<uint8_t>("kept");
  p.cosine = c.pointer<float>("cosine");
  c.tell("plan", make_plan(p).text());
  select(p, nullptr);
}

}  // namespace

int main() {
  return emulator::run_case(body);
}
