"""BDQ's transforms are exact equivalences, and they flatten."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import nn

from saltire.models.adapters import adapter_for
from saltire.models.kv_rounding import rounded
from saltire.quant import quantize as quantize_model
from saltire.quant.blocks import BlockRunner
from saltire.quant.learning.stages import balance_keys, turn_values
from saltire.quant.recipe import TRANSFORMS, LowRank
from saltire.quant.recipes import RECIPES
from saltire.quant.transforms import Transform, input_diagonal, rotation, starting_transform
from saltire.quant.transforms.keys import key_diagonal
from saltire.quant.transforms.values import geometric_mean, principal_turns
from saltire.reference.transform_quantize import hartley_matrix, quantize, transform
from tests.tiny import ARCHITECTURES, random_tokens, tiny_model


class TransformedLinear(nn.Module):
    """A linear computed in the transformed basis with nothing rounded, in float64."""

    def __init__(self, linear: nn.Linear, recipe) -> None:
        super().__init__()
        x = torch.randn(64, linear.in_features) * torch.rand(linear.in_features)
        self.transform = starting_transform(x, linear.weight.detach().float(), recipe)
        self.weight = self.transform.weights(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.transform.inputs(x.flatten(0, -2)) @ self.weight.T
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", [*TRANSFORMS, "bdq, blocks"])
def test_transforms_alone_leave_the_model_unchanged(architecture, kind) -> None:
    model = tiny_model(architecture).double()
    tokens = random_tokens(model, 2, 24)
    want = model(tokens).logits
    name, _, blocks = kind.partition(", ")
    rotation = "block" if blocks else "full"
    recipe = replace(RECIPES["w4a4"], transform=name, rotation=rotation, block=32)
    names = adapter_for(model.config).linear_names(model)
    assert len(names) == 14
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, TransformedLinear(linear, recipe))
    torch.testing.assert_close(model(tokens).logits, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_turned_values_leave_the_model_unchanged(architecture) -> None:
    model = tiny_model(architecture).double()
    tokens = random_tokens(model, 4, 24)
    want = model(tokens).logits
    before = model.get_submodule("model.layers.0.self_attn.v_proj").weight.clone()
    adapter = adapter_for(model.config)
    runner = BlockRunner(model, adapter, tokens, 2)
    for block in adapter.blocks(model):
        turn_values(runner, block, adapter)
        runner.advance(block)
    assert not torch.equal(model.get_submodule("model.layers.0.self_attn.v_proj").weight, before)
    torch.testing.assert_close(model(tokens).logits, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_balanced_keys_leave_the_model_unchanged(architecture) -> None:
    model = tiny_model(architecture).double()
    tokens = random_tokens(model, 4, 24)
    first = model.model.layers[0].self_attn
    first.k_proj.weight[3::16] *= 20
    want, before = model(tokens).logits, first.k_proj.weight.clone()
    adapter = adapter_for(model.config)
    runner = BlockRunner(model, adapter, tokens, 2)
    for block in adapter.blocks(model):
        balance_keys(runner, block, adapter)
        runner.advance(block)
    normed = hasattr(first, "k_norm")
    assert torch.equal(first.k_proj.weight, before) == normed
    torch.testing.assert_close(model(tokens).logits, want, rtol=1e-5, atol=1e-5)


def test_balanced_keys_are_rounded_with_less_harm_to_the_scores() -> None:
    tokens, heads, size = 400, 2, 16
    loud = torch.tensor([0.0, 2.0, -2.0, 1.0, 0.5, -1.0, 0.0, 0.3]).exp()
    query = torch.randn(tokens, 2 * heads, size) / torch.cat([loud, loud])
    key = torch.randn(tokens, heads, size) * torch.cat([loud, loud])
    key[..., 5] = 0.0  # a channel that is silent, beside one that is not
    diagonal = key_diagonal(
        query.square().sum(0).flatten(), key.square().sum(0).flatten(), size
    ).float()
    torch.testing.assert_close(diagonal[:, : size // 2], diagonal[:, size // 2 :])
    torch.testing.assert_close(diagonal.log().mean(1), torch.zeros(heads), rtol=0, atol=1e-5)

    def harm(d: torch.Tensor) -> float:
        wide = d.repeat_interleave(2, dim=0)
        kept = rounded(key * d, 4).repeat_interleave(2, dim=1)
        exact = (key * d).repeat_interleave(2, dim=1)
        lost = torch.einsum("qhd,khd->hqk", query / wide, kept - exact)
        return float(lost.norm())

    assert harm(diagonal) < 0.5 * harm(torch.ones(heads, size))
    silent = key_diagonal(torch.zeros(2 * heads * size), torch.zeros(heads * size), size)
    assert torch.equal(silent, torch.ones_like(silent))


@torch.no_grad()
def test_a_cache_of_few_bits_gets_balanced_keys(monkeypatch) -> None:
    recipe = replace(RECIPES["w8a8"], kv_bits=2, head_bits=16)
    tokens = random_tokens(tiny_model("llama"), 8, 32)
    lost = []
    for balance in (balance_keys, lambda *_: None):
        monkeypatch.setattr(import_module("saltire.quant.quantize"), "balance_keys", balance)
        model = tiny_model("llama")
        for block in model.model.layers:
            for start in (3, 3 + block.self_attn.head_dim // 2):  # a pair of RoPE's
                block.self_attn.k_proj.weight[start :: block.self_attn.head_dim] *= 30
                block.self_attn.q_proj.weight[start :: block.self_attn.head_dim] /= 30
        want = model(tokens).logits
        quantize_model(model, None, recipe, tokens)
        lost.append(float((model(tokens).logits - want).norm() / want.norm()))
    assert lost[0] < 0.9 * lost[1]


def test_keys_are_balanced_where_a_cache_rounds_them() -> None:
    kv4 = RECIPES["w4a4kv4"]
    assert kv4.balances_keys
    assert replace(kv4, turn=False).balances_keys
    for other in (
        RECIPES["w4a4"],
        replace(kv4, transform="hadamard"),
        replace(kv4, low_rank=LowRank("residual", 1.25)),
    ):
        assert not other.balances_keys


def _noise(sigma: torch.Tensor, gram: torch.Tensor, M: torch.Tensor) -> float:
    """tr(TΣTᵀ)·tr(T⁻ᵀGT⁻¹) with M = TᵀT."""
    return float((M @ sigma).trace() * (torch.linalg.inv(M) @ gram).trace())


def test_the_geometric_mean_has_less_noise_than_any_neighbour() -> None:
    a, b = torch.randn(12, 40).double(), torch.randn(12, 40).double()
    sigma, gram = a @ a.T, b @ b.T
    M = geometric_mean(sigma, gram)
    least = _noise(sigma, gram, M)
    assert least < 0.95 * _noise(sigma, gram, torch.eye(12).double())
    for _ in range(20):
        step = torch.randn(12, 12).double() * 0.05
        shift = torch.linalg.matrix_exp(step + step.T)
        half = torch.linalg.cholesky(M)
        assert _noise(sigma, gram, half @ shift @ half.T) > least * (1 - 1e-3)


def test_turns_bring_the_noise_of_a_diagonal_down() -> None:
    d = 16
    a, b = torch.randn(d, d).double(), torch.randn(48, d).double()
    sigma, w = a @ a.T, b

    def noise(turn: torch.Tensor) -> float:
        S, G = turn.T @ sigma @ turn, turn.T @ w.T @ w @ turn
        return float((S.diagonal() * G.diagonal()).sqrt().sum() ** 2)

    (turn,) = principal_turns(sigma, w, d, 1)
    torch.testing.assert_close(turn.T @ turn, torch.eye(d).double())
    assert noise(turn) < 0.9 * noise(torch.eye(d).double())


def test_an_invertible_transform_is_undone_in_the_weights() -> None:
    x, w = torch.randn(7, 96).double(), torch.randn(5, 96).double()
    both = (torch.randn(n, n).double() + 3 * torch.eye(n).double() for n in (8, 12))
    transform = Transform(torch.rand(96).double() + 0.5, 1, *both)
    torch.testing.assert_close(transform.inputs(x) @ transform.weights(w).T, x @ w.T)
    torch.testing.assert_close(transform.back(transform.weights(w)), w)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("case", ["zeros", "constant", "dead channels"])
def test_odd_activations_give_a_finite_transform(name, case) -> None:
    x = torch.zeros(16, 64) if case == "zeros" else torch.ones(16, 64)
    if case == "dead channels":
        x = torch.randn(16, 64)
        x[:, ::3] = 0
    w = torch.randn(8, 64)
    w[:, 5] = 0
    transform = starting_transform(x, w, replace(RECIPES["w4a4"], transform=name))
    assert (transform.diagonal > 0).all()
    assert transform.weights(w).isfinite().all()
    torch.testing.assert_close(
        transform.inputs(x) @ transform.weights(w).T, x @ w.T, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9, 12, 43, 86])
def test_hartley_is_orthonormal_symmetric_and_flat(size) -> None:
    H = hartley_matrix(size)
    torch.testing.assert_close(H @ H.T, torch.eye(size).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(H, H.T, rtol=0, atol=1e-12)
    assert H.abs().max() <= (2 / size) ** 0.5 + 1e-12


@pytest.mark.parametrize("K", [576, 1536, 4096, 11008, 14336, 96])
def test_a_full_rotation_covers_every_channel(K) -> None:
    B, left = rotation(K, RECIPES["w4a4"])
    assert B * (1 if left is None else left.shape[0]) == K
    spread = transform(torch.eye(K, dtype=torch.float32)[:1], hadamard=B, left=left)
    assert (spread.abs() > 1e-6).float().mean() > 0.9


def test_diagonal_balances_the_power_of_both_sides() -> None:
    rms_x, rms_w = torch.rand(64) * 10 + 0.1, torch.rand(64) + 0.1
    D = input_diagonal(rms_x, rms_w)
    ratio = (rms_x / D) / (rms_w * D)
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))


def test_dead_channels_keep_a_diagonal_of_one() -> None:
    rms_x, rms_w = torch.tensor([1.0, 0.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 4.0])
    D = input_diagonal(rms_x, rms_w)
    assert D.isfinite().all()
    assert D[1] == D[2] == 1


def test_diagonal_then_rotation_rounds_better_than_either_alone() -> None:
    x = torch.randn(512, 256) * torch.exp(torch.randn(256) * 1.5)
    w = torch.randn(64, 256) * torch.exp(torch.randn(256) * 0.3)
    want = x.double() @ w.double().T

    def error(diagonal: bool, rotate: bool) -> float:
        D = torch.ones(256).double()
        if diagonal:
            D = input_diagonal(x.square().mean(0).sqrt(), w.square().mean(0).sqrt())
        B = 256 if rotate else 1
        codes, scale, _ = quantize(transform(x, 1 / D, B), 4)
        w_codes, w_scale, _ = quantize(transform(w, D, B), 4)
        got = (codes.double() * scale[:, None]) @ (w_codes.double() * w_scale[:, None]).T
        return float((got - want).norm() / want.norm())

    both = error(True, True)
    assert both < 0.6 * error(True, False)
    assert both < 0.6 * error(False, True)
