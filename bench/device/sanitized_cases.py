"""A few small calls of every CUDA op, for compute-sanitizer, which slows them a hundredfold.

Each case takes another kernel; results are compared with the CPU's, so that a wrong index that
stays within memory is seen too. New rooms add their cases to ``CASES``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from saltire import ops, reference


def transforms() -> None:
    for K, hadamard in ((512, 64), (4096, 128), (1024, 1024)):
        x = torch.randn(3, K)
        want = ops.transform_quantize(x, 4, hadamard=hadamard, sum_group=32)
        got = ops.transform_quantize(x.cuda(), 4, hadamard=hadamard, sum_group=32)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one.cpu(), other)


def products() -> None:
    for M in (1, 3, 9, 40, 300):
        for bits, group in ((4, 0), (4, 128), (4, 32), (2, 64), (2, 0)):
            N, K = 200, 640
            codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
            packed = ops.pack_weight(codes, bits)
            scale = torch.rand(N, K // (group or K))
            x, x_scale, x_sum = ops.transform_quantize(torch.randn(M, K), 4, sum_group=group)
            want = reference.lowbit_gemm.lowbit_gemm(
                x, x_scale, x_sum, packed, scale, None, bits, group
            )
            w = ops.prepack_weight(packed.cuda(), scale.cuda(), None, bits, group)
            got = ops.lowbit_gemm(
                x.cuda(), x_scale.cuda(), x_sum.cuda(), w, N, bits, group, act_bits=4
            )
            error = (got.cpu().double() - want).norm() / want.norm()
            assert error < 1e-5, f"M={M} bits={bits} group={group}: {error}"


CASES: list[Callable[[], None]] = [transforms, products]


def main() -> None:
    torch.manual_seed(0)
    for case in CASES:
        case()
        torch.cuda.synchronize()
        print(f"{case.__name__}: right")


if __name__ == "__main__":
    main()
