"""A few small calls of every CUDA op, for compute-sanitizer, which slows them a hundredfold.

Each case takes another kernel; results are compared with the CPU's, so that a wrong index that
stays within memory is seen too. New rooms add their cases to ``CASES``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from saltire import ops, reference
from saltire.nn.kv_cache import CACHE_DTYPES, KVCache
from saltire.ops import layer_parts as parts


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


def statistics() -> None:
    """Rows off 16 bytes, both routes of the linear form, all gradients."""
    labels = torch.randint(0, 333, (5,))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 333).to(dtype)
        hidden, head = torch.randn(5, 40).to(dtype), torch.randn(333, 40).to(dtype)
        for inputs, op in (([x], ops.token_stats), ([hidden, head], ops.linear_token_stats)):
            found = []
            for device in ("cpu", "cuda"):
                own = [t.detach().to(device).requires_grad_() for t in inputs]
                stats = op(*own, labels.to(device), softcap=20.0)
                total = (stats.logprob + stats.entropy).sum()
                found.append([total.detach(), *torch.autograd.grad(total, own)])
            for want, got in zip(*found, strict=True):
                error = (got.cpu().float() - want.float()).norm()
                assert error < 1e-2 * want.float().norm(), f"{op.__name__} {dtype}: {error}"


def speculation() -> None:
    """Distributions, draws and acceptance; rows off 16 bytes."""
    logits, index = torch.randn(3, 2001) * 3, torch.arange(3)
    for settings in ((1.0, 0, 1.0, 0.0), (0.8, 50, 0.95, 0.05)):
        p = ops.warp_logits(logits, *settings)
        got = ops.warp_logits(logits.cuda(), *settings)
        torch.testing.assert_close(got.cpu(), p, atol=1e-6, rtol=1e-4)
        want = ops.draw_tokens(p, index, index, 3)
        got = ops.draw_tokens(p.cuda(), index.cuda(), index.cuda(), 3)
        assert torch.equal(got.cpu(), want)
        given = [p, p[:2], want[:2], torch.tensor([2]), index[:1], index[:1]]
        accepted, following = ops.speculate_verify(*given, 4)
        found = ops.speculate_verify(*[t.cuda() for t in given], 4)
        assert (found[0].item(), found[1].item()) == (accepted.item(), following.item())


def choices() -> None:
    for M, D in ((3, 77), (15, 576)):
        keep, skip = torch.randn(2, M, D)
        want = ops.skip_plan_select(keep, skip, keep[0])
        got = ops.skip_plan_select(keep.cuda(), skip.cuda(), keep[0].cuda())
        assert torch.equal(got[0].cpu(), want[0])


def layer_parts() -> None:
    """A decoder's step in parts: norms, heads, split attention over caches of every format."""
    heads, kv_heads, d, slots, D = 6, 2, 48, 272, 200
    rows = torch.tensor(
        [[3, 0, 140, 140, 141, 0], [0, 0, 140, -1, 140, 5], [1, 1, 3, 3, 4, 0], [2, 1, 0, -1, 0, 0]]
    )
    inputs = [torch.randn(slots, 2, d // 2), torch.rand(d), torch.rand(d)]
    table, gain, qkv = torch.randn(5, D), torch.rand(D), torch.randn(4, (heads + 2 * kv_heads) * d)

    def step(dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        cache = KVCache(1, kv_heads, d, 2, slots, dtype, device)
        scratch = torch.zeros(64, dtype=torch.int32, device=device)
        state, here = torch.zeros(4, D, device=device), rows.to(device)
        parts.embed_rows(here, table.to(device), state)
        delta = table[:4].to(device)
        y = parts.residual_norm(state, delta, gain.to(device), 1e-5, torch.float32, None)
        gate_up = torch.cat([y, y.flip(1)], dim=1)
        codes = parts.swiglu_quantize(gate_up, 8, None, 8, 1.0, 40)[0]
        on_device = [t.to(device) for t in inputs]
        queries, own = parts.append_heads(
            qkv.to(device), here, *on_device, 1e-5, heads, cache.kv, cache.scales, 0
        )
        seen = [
            parts.attend_heads(
                queries[:count],
                own[:, :count].contiguous(),
                here[:count],
                cache.kv,
                cache.scales,
                0,
                100,
                prompt,
                torch.float32,
                scratch,
            )
            for prompt, count in ((False, 4), (True, 2))
        ]
        logits = torch.empty(4, 50 * D, device=device)
        best, share = parts.best_logits(y.repeat(1, 50), logits, scratch)
        gated = parts.swiglu(gate_up)
        return [state, y, gated, codes.float(), queries, *seen, best.float(), share]

    for dtype in CACHE_DTYPES:
        results = [step(dtype, torch.device(name)) for name in ("cpu", "cuda")]
        for want, got in zip(*results, strict=True):
            error = (got.cpu() - want).norm() / want.norm()
            assert error < 0.02, f"{dtype}: {error}"


CASES: list[Callable[[], None]] = [transforms, products, statistics, speculation, choices]
CASES += [layer_parts]


def main() -> None:
    torch.manual_seed(0)
    for case in CASES:
        case()
        torch.cuda.synchronize()
        print(f"{case.__name__}: right")


if __name__ == "__main__":
    main()
