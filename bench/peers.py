"""Other libraries' products of float activations and low-bit weights, as variants to time.

Each function returns one variant whose weights rotate, or None with a line on what is missing.
All take f32 or bf16 activations and return the same; what they do inside is said beside each.
"""

from __future__ import annotations

from functools import cache

import numpy
import torch
from harness import Variant
from torch import Tensor


@cache
def share_threads(threads: int) -> None:
    """One pool for all sessions of onnxruntime, once a process.

    A session's own threads spin for some 30 ms after each call; a dozen of them would fight one
    another, and whatever is timed next, for the cores.
    """
    import onnxruntime as ort

    ort.set_global_thread_pool_sizes(threads, 1)


def onnxruntime_matmul_nbits(
    x: Tensor, weights: list[Tensor], scale: Tensor, bits: int, block: int
) -> Variant | None:
    """MatMulNBits at accuracy_level 4: x is rounded to 8 bits per block of K, then VNNI.

    weights: checkpoint layout, uint8 [N, K·bits/8]; scale: f32 [N, K/block].
    """
    try:
        import onnx
        import onnxruntime as ort
    except ImportError:
        print("onnxruntime or onnx is not installed: pip install 'saltire[bench]'")
        return None
    share_threads(torch.get_num_threads())
    M, K = x.shape
    N = scale.shape[0]
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    calls = []
    for packed in weights:
        tensors = [
            onnx.numpy_helper.from_array(
                packed.reshape(N, K // block, block * bits // 8).numpy(), "B"
            ),
            onnx.numpy_helper.from_array(scale.float().reshape(-1).numpy(), "scales"),
        ]
        node = onnx.helper.make_node(
            "MatMulNBits",
            ["A", "B", "scales"],
            ["Y"],
            domain="com.microsoft",
            K=K,
            N=N,
            bits=bits,
            block_size=block,
            accuracy_level=4,
        )
        f32 = onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [node],
            "matmul_nbits",
            [onnx.helper.make_tensor_value_info("A", f32, [M, K])],
            [onnx.helper.make_tensor_value_info("Y", f32, [M, N])],
            tensors,
        )
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        binding.bind_ortvalue_input("A", ort.OrtValue.ortvalue_from_numpy(x.numpy()))
        out = ort.OrtValue.ortvalue_from_numpy(numpy.empty((M, N), numpy.float32))
        binding.bind_ortvalue_output("Y", out)
        calls.append((session, binding))

    def run(turn: int) -> None:
        session, binding = calls[turn % len(calls)]
        session.run_with_iobinding(binding)

    return Variant("onnxruntime", run)


def torch_int4pack(x: Tensor, codes: list[Tensor], group: int) -> Variant:
    """torch's own 4-bit product: weights are expanded to bf16, activations stay bf16."""
    x = x.bfloat16()
    N, K = codes[0].shape
    packed = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(c.int(), 1) for c in codes]
    table = torch.rand(K // group, N, 2).bfloat16()

    def run(turn: int) -> Tensor:
        weight = packed[turn % len(packed)]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group, table)

    return Variant("torch int4pack", run)


def torch_bf16(x: Tensor, N: int, copies: int) -> Variant:
    """The unquantised product in bf16."""
    x = x.bfloat16()
    weights = [torch.randn(N, x.shape[1], dtype=torch.bfloat16) for _ in range(copies)]
    return Variant("torch bf16", lambda turn: torch.nn.functional.linear(x, weights[turn % copies]))
