// Registers the room's ops for CUDA tensors.
#include <tuple>

#include "core/cuda/tensor.h"
#include "lowbit_gemm/arguments.h"
#include "lowbit_gemm/device.h"

namespace saltire::lowbit_gemm {
namespace {

void* memory_of(Tensor& t) {
  return t.mutable_data_ptr();
}

Tensor lowbit_prepack_cuda(const Tensor& packed, const Tensor& scale,
                           const std::optional<Tensor>& zero, int64_t bits, int64_t group) {
  const Checkpoint c = check_checkpoint("lowbit_prepack", packed, scale, zero, bits, group);
  const DeviceLayout layout = {c.n, c.k, c.group, c.bits, zero.has_value(), c.table};
  Tensor w = new_tensor(packed, {layout.bytes()}, ScalarType::Byte);
  const cuda::Place place(packed);
  prepack(layout, static_cast<const uint8_t*>(c.packed.const_data_ptr()), c.scale.const_data_ptr(),
          c.zero_data(), static_cast<uint8_t*>(memory_of(w)), place.stream);
  // Products ask for weights before the kernel in front of them has ended; so no kernel that writes
  // weights may be in front of them.
  const cudaError_t error = cudaStreamSynchronize(place.stream);
  SALTIRE_CHECK(error == cudaSuccess, "lowbit_prepack: ", cudaGetErrorString(error),
                ". Prepack outside of a CUDA graph's capture.");
  return w;
}

// What a buffer holds, from its length (device_layout.h) and what the caller says.
DeviceLayout open_weight(const char* op, const Tensor& w, int64_t n, int64_t k, int64_t bits,
                         int64_t group) {
  check_bits(op, bits);
  check_group(op, k, group, bits);
  check_dtype(op, "w", w, ScalarType::Byte);
  check_dim(op, "w", w, 1);
  for (const bool has_zero : {false, true}) {
    for (const Float table : {Float::f32, Float::f16}) {
      const DeviceLayout layout = {n,        k,    group == 0 ? k : group, static_cast<int>(bits),
                                   has_zero, table};
      if (layout.bytes() == w.numel()) return layout;
    }
  }
  fail(op, ": w holds ", w.numel(), " bytes, which is no prepacked weight of N = ", n, ", K = ", k,
       ", bits = ", bits, ", group = ", group,
       " on a CUDA device. Prepack it there, from the checkpoint, and pass the same sizes.");
}

std::tuple<Tensor, Tensor, Tensor> lowbit_unprepack_cuda(const Tensor& w, int64_t n, int64_t k,
                                                         int64_t bits, int64_t group, bool has_zero,
                                                         ScalarType scale_dtype) {
  const char* op = "lowbit_unprepack";
  const DeviceLayout layout = open_weight(op, w, n, k, bits, group);
  SALTIRE_CHECK(layout.has_zero == has_zero && scalar_type(layout.table) == scale_dtype, op,
                ": w was prepacked ", layout.has_zero ? "with" : "without",
                " zero points and with scales of ", dtype_name(scalar_type(layout.table)),
                "; other arguments were given. Pass what was prepacked.");
  const Tensor in = as_contiguous(w);
  Tensor packed = new_tensor(w, {n, k * container_bits(layout.bits) / 8}, ScalarType::Byte);
  Tensor scale = new_tensor(w, {n, layout.groups()}, scale_dtype);
  Tensor zero =
      has_zero ? new_tensor(w, {n, layout.groups()}, scale_dtype) : new_tensor(w, {0}, scale_dtype);
  const cuda::Place place(w);
  unprepack(layout, static_cast<const uint8_t*>(in.const_data_ptr()),
            static_cast<uint8_t*>(memory_of(packed)), memory_of(scale), memory_of(zero),
            place.stream);
  return {packed, scale, zero};
}

// Kernels read tokens 16 bytes at a time; a view may start anywhere.
Tensor as_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

Tensor lowbit_gemm_cuda(const Tensor& codes, const Tensor& x_scale, const Tensor& x_sum,
                        const Tensor& w, int64_t n, int64_t bits, int64_t group, int64_t act_bits,
                        ScalarType out_dtype, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& low_rank_x,
                        const std::optional<Tensor>& low_rank_w) {
  const char* op = "lowbit_gemm";
  check_bits(op, bits);
  check_codes(op, codes, bits, group, act_bits);
  check_same_device(op, "w", w, "codes", codes);
  const Tensor weight = as_aligned(as_contiguous(w));
  DeviceProblem p;
  p.layout = open_weight(op, weight, n, codes.size(1), bits, group);
  const Operands o = check_operands(op, codes, x_scale, x_sum, n, group, act_bits, out_dtype, bias,
                                    low_rank_x, low_rank_w);
  const Tensor x = as_aligned(o.codes);
  p.M = o.m;
  p.act_bits = o.act_bits;
  p.x = static_cast<const int8_t*>(x.const_data_ptr());
  p.x_scale = static_cast<const float*>(o.x_scale.const_data_ptr());
  p.x_sum = static_cast<const int32_t*>(o.x_sum.const_data_ptr());
  p.w = static_cast<const uint8_t*>(weight.const_data_ptr());
  p.bias = data_of(o.bias);
  p.low_rank_x = data_of(o.low_rank_x);
  p.low_rank_w = data_of(o.low_rank_w);
  p.rank = o.rank;
  p.out_type = o.out;
  Tensor out = new_tensor(codes, {o.m, n}, out_dtype);
  if (o.m == 0) return out;
  p.out = memory_of(out);
  const cuda::Place place(codes);
  const DevicePlan plan = make_plan(p, place.device);
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) {
    workspace = new_tensor(codes, {plan.workspace_bytes}, ScalarType::Byte);
  }
  run(p, plan, place.device, workspace ? memory_of(*workspace) : nullptr, place.stream);
  return out;
}

}  // namespace
}  // namespace saltire::lowbit_gemm

STABLE_TORCH_LIBRARY_IMPL(saltire, CUDA, m) {
  using namespace saltire::lowbit_gemm;
  m.impl("lowbit_prepack", TORCH_BOX(&lowbit_prepack_cuda));
  m.impl("lowbit_unprepack", TORCH_BOX(&lowbit_unprepack_cuda));
  m.impl("lowbit_gemm", TORCH_BOX(&lowbit_gemm_cuda));
}
