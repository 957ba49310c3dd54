#include "case.h"
#include "transform_quantize/device.h"

namespace {

using namespace saltire::transform_quantize;

void body(emulator::Case& c) {
  DeviceProblem p;
  p.M = c.integer("M");
  Transform& t = p.transform;
  t.K = c.integer("K");
  t.hadamard = c.integer("hadamard");
  t.B = c.integer("B");
  t.A = t.K / t.B;
  t.diag = c.pointer<const float>("diag");
  t.left = c.pointer<const float>("left");
  t.right = c.pointer<const float>("right");
  p.dtype = static_cast<Dtype>(c.integer("dtype"));
  p.x = c.pointer<const void>("x");
  p.y = c.pointer<float>("y");
  const int Q = (1 << (c.integer("bits") - 1)) - 1;
  p.rounding = {Q, static_cast<float>(c.number("clip") / Q), c.integer("sum_group")};
  p.codes = c.pointer<int8_t>("codes");
  p.scale = c.pointer<float>("scale");
  p.sums = c.pointer<int32_t>("sums");
  c.tell("plan", make_plan(p, c.device()).text());
  run(p, c.device(), nullptr);
}

}  // namespace

int main() {
  return emulator::run_case(body);
}
