"""What is learned lessens error on text that was held out, and never changes a code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saltire.errors import SaltireError
from saltire.models.adapters import adapter_for
from saltire.nn.quant_linear import QuantLinear
from saltire.quant import RECIPES, quantize
from saltire.quant.layer import round_weights
from saltire.quant.learning import end_to_end
from saltire.quant.learning.end_to_end import Teacher, tune
from saltire.quant.learning.group import Rounding, learn_transform
from saltire.quant.learning.losses import LOSSES, token_loss
from saltire.quant.learning.straight_through import round_tokens
from saltire.quant.learning.tuned_linear import PART, TunedInput, TunedLinear
from saltire.quant.recipe import Learning, LowRank, Recipe
from saltire.quant.recipes import EFFORTS, parse_recipe, with_effort
from saltire.quant.transforms import Transform, starting_transform
from saltire.reference.transform_quantize import quantize as round_reference
from saltire.reference.transform_quantize import transform as transform_reference
from tests.tiny import random_tokens, tiny_model

W4A4 = RECIPES["w4a4"]


def _uneven(tokens: int = 640, K: int = 64, N: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    mix = torch.randn(K, K) / K**0.5
    return (torch.randn(tokens, K) * torch.randn(K).exp()) @ mix, torch.randn(N, K) * 0.1


def _start(
    x: torch.Tensor, w: torch.Tensor, recipe: Recipe, clip: float = 0.9
) -> tuple[Transform, Rounding]:
    start = starting_transform(x, w, recipe)
    return start, Rounding.of(start, w, recipe.format(start.hadamard), recipe, clip)


@pytest.mark.parametrize("name", ["kronecker", "bdq", "hadamard"])
def test_learning_lessens_the_held_out_error(name) -> None:
    x, w = _uneven()
    recipe = replace(W4A4, transform=name, learning=Learning(group_steps=60))
    start, rounding = _start(x, w, recipe)
    learned = learn_transform(
        x, w, start, rounding, steps=60, rate=1e-2, orthogonal=name != "kronecker"
    )
    assert min(learned.losses) < 0.97 * learned.losses[0]
    assert 0 < learned.clip <= 1
    torch.testing.assert_close(
        learned.transform.inputs(x) @ learned.transform.weights(w).T, x @ w.T, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("K", [64, 96, 128])
def test_learned_rotations_stay_rotations(K) -> None:
    x, w = _uneven(K=K)
    start, rounding = _start(x, w, replace(W4A4, learning=Learning(group_steps=20)))
    learned = learn_transform(x, w, start, rounding, steps=20, rate=1e-2, orthogonal=True).transform
    for before, after in ((start.left, learned.left), (start.right, learned.right)):
        assert before is not None
        assert after is not None
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after.T @ after, torch.eye(len(after)), rtol=0, atol=1e-5)
    block = starting_transform(
        x, w, replace(W4A4, rotation="block", block=32, learning=Learning(group_steps=1))
    )
    assert block.left is None
    assert block.right.shape == (32, 32)


def test_learning_that_only_harms_returns_the_start() -> None:
    x, w = _uneven()
    start, rounding = _start(x, w, W4A4)
    learned = learn_transform(x, w, start, rounding, steps=200, rate=3.0, orthogonal=True)
    assert learned.transform is start
    assert learned.clip is None  # whoever asks searches it as for any transform
    assert len(learned.losses) < 200 // 10  # it stopped early


@pytest.mark.parametrize("name", ["bdq", "hadamard", "smooth"])
@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 8), (2, 4)])
def test_learning_by_groups_never_harms_a_linear(name, bits) -> None:
    """Held out here, where what comes back is rounded as a layer is."""
    x, w = _uneven(tokens=2000)
    seen, held = x[:1500], x[1500:]
    recipe = replace(W4A4, transform=name, weight_bits=bits[0], act_bits=bits[1])
    lost = []
    for learning in (None, Learning(group_steps=40)):
        layer = round_weights(seen, w, replace(recipe, learning=learning), "w").layer(0, len(w))
        lost.append(float((layer(held) - held @ w.T).norm()))
        if bits[1] == 8:
            assert layer.format.clip == 1
    assert lost[1] < 1.02 * lost[0]


def test_learning_without_clips_learns_none() -> None:
    x, w = _uneven()
    recipe = replace(W4A4, clip=False, learning=Learning(group_steps=20))
    made = round_weights(x, w, recipe, "w")
    assert made.format.clip == 1
    _, rounding = _start(x, w, recipe)
    assert rounding.act_clip is None
    torch.testing.assert_close(rounding.weight_clip, torch.ones_like(rounding.weight_clip))


def test_straight_through_rounds_as_the_kernel_does() -> None:
    y = torch.randn(9, 64)
    codes, scale, _ = round_reference(y, 4, 0.8)
    torch.testing.assert_close(round_tokens(y, 4, 0.8), codes.float() * scale[:, None])


def test_losses_are_least_at_the_teacher_except_the_printed_one() -> None:
    teacher = torch.randn(16, 32)
    for loss in LOSSES:
        student = teacher.clone().requires_grad_()
        value = token_loss(student, teacher, loss)
        (gradient,) = torch.autograd.grad(value, student)
        at_rest = gradient.norm() < 1e-5
        assert at_rest == (not loss.startswith("rce")), loss
    at_teacher = {loss: token_loss(teacher, teacher, loss) for loss in LOSSES}
    torch.testing.assert_close(at_teacher["rce"] + at_teacher["rce-printed"], 2 * at_teacher["ce"])
    assert at_teacher["kl"] < 1e-6


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (3, 0), (2, 32)])
def test_gradients_through_the_kernels_are_those_of_the_dense_product(bits, group) -> None:
    model = tiny_model("llama")
    recipe = replace(W4A4, weight_bits=bits, group=group, head_bits=16)
    quantize(model, None, recipe, random_tokens(model, 4, 64))
    layer = model.get_submodule("model.layers.0.mlp.gate_proj")
    tuned = TunedLinear(layer, TunedInput(layer), learn_bias=True)
    x = torch.randn(2 * PART + 40, 64).requires_grad_()
    y = tuned(x)
    torch.testing.assert_close(y.detach(), layer(x).detach(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        tuned.bias.normal_()
    y = tuned(x)
    dy = torch.randn_like(y)
    y.backward(dy)

    rounded = tuned.shared(x)[0]
    levels = tuned.log_scale.detach().exp().requires_grad_()
    centred = tuned.centred().view(*levels.shape, -1)
    dense = rounded.detach() @ (centred * levels[..., None]).flatten(1).T
    dense.backward(dy)
    torch.testing.assert_close(
        tuned.log_scale.grad, levels.grad * levels.detach(), rtol=2e-3, atol=2e-3
    )
    torch.testing.assert_close(tuned.bias.grad, dy.sum(0))

    diag, f = tuned.shared.log_diag.detach().exp().requires_grad_(), layer.format
    kept = x.detach().clone().requires_grad_()
    how = {"hadamard": f.hadamard, "left": layer.left, "right": layer.right}
    rotated = transform_reference(kept.double(), diag.double(), **how)
    top = tuned.shared(x)[2][:, None] * 7.5
    inside = rotated.abs() <= top
    assert 0 < (~inside).sum() < 0.1 * inside.numel()
    weight = (centred * levels[..., None]).flatten(1).detach().double()
    rotated.backward((dy.double() @ weight) * inside)
    for got, want in ((x.grad, kept.grad), (tuned.shared.log_diag.grad, diag.grad * diag)):
        assert (got - want).norm() < 0.01 * want.norm()


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_what_is_learned_of_a_branch_is_what_is_stored(bits) -> None:
    model = tiny_model("llama")
    low_rank = LowRank("residual", 1.4, branch_bits=bits)
    recipe = replace(RECIPES["w4a8"], head_bits=16, low_rank=low_rank)
    quantize(model, None, recipe, random_tokens(model, 4, 64))
    layer = model.get_submodule("model.layers.0.mlp.gate_proj")
    assert layer.diag.std() > 0.01 * layer.diag.mean()
    tuned = TunedLinear(layer, TunedInput(layer), learn_bias=True)
    x = torch.randn(40, 64)
    torch.testing.assert_close(tuned(x), layer(x), rtol=1e-3, atol=1e-3)
    for parameter in tuned.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.shared.forget()
    torch.testing.assert_close(tuned.result()(x), tuned(x), rtol=2e-3, atol=2e-3)


def test_the_end_to_end_step_brings_the_model_nearer_to_its_teacher_and_keeps_codes() -> None:
    model = tiny_model("qwen2")
    tokens = random_tokens(model, 16, 64)
    adapter = adapter_for(model.config)
    teacher = Teacher.of(model, adapter, tokens)
    quantize(model, None, replace(RECIPES["w2a4"], head_bits=16), tokens)
    name = "model.layers.1.mlp.down_proj"
    before = model.get_submodule(name).checkpoint_weight()[0].clone()
    losses = tune(model, adapter, teacher, epochs=4, rate=5e-3).losses
    assert min(losses) < 0.9 * losses[0]
    after = model.get_submodule(name)
    assert isinstance(after, QuantLinear)
    assert torch.equal(after.checkpoint_weight()[0], before)
    assert after.bias is not None


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_end_to_end_step_keeps_a_branch_and_learns_its_scales(bits) -> None:
    model = tiny_model("llama")
    tokens = random_tokens(model, 16, 64)
    adapter = adapter_for(model.config)
    teacher = Teacher.of(model, adapter, tokens)
    low_rank = LowRank("residual", 1.4, branch_bits=bits)
    quantize(model, None, replace(RECIPES["w2a4"], head_bits=16, low_rank=low_rank), tokens)
    name = "model.layers.1.mlp.gate_proj"
    before, want = model.get_submodule(name), model(tokens).logits
    assert before.format.rank > 0
    tune(model, adapter, teacher, epochs=3, rate=3.0)  # far too fast: all of it is undone
    assert (model(tokens).logits - want).norm() < 0.01 * want.norm()
    losses = tune(model, adapter, teacher, epochs=4, rate=5e-3).losses
    assert min(losses) < 0.95 * losses[0]
    after = model.get_submodule(name)
    x = torch.randn(5, 64)
    product = after.multiply(after.quantized(x), torch.float32, x)
    branch = (x @ after.low_rank_in) @ after.low_rank_out
    assert branch.norm() > 0.01 * product.norm()
    assert not torch.equal(after.low_rank_out, before.low_rank_out)


def test_what_is_judged_and_kept_is_the_mean_of_the_steps(monkeypatch) -> None:
    """A mean that never moves keeps the start, whatever the steps do."""
    model = tiny_model("llama")
    tokens = random_tokens(model, 16, 64)
    adapter = adapter_for(model.config)
    teacher = Teacher.of(model, adapter, tokens)
    quantize(model, None, replace(RECIPES["w2a4"], head_bits=16), tokens)
    want = model(tokens).logits
    monkeypatch.setattr(end_to_end, "MEMORY", 1.0)
    losses = tune(model, adapter, teacher, epochs=2, rate=5e-3).losses
    assert losses == pytest.approx([losses[0]] * 3)
    assert (model(tokens).logits - want).norm() < 0.01 * want.norm()
    monkeypatch.setattr(end_to_end, "MEMORY", 0.8)
    assert min(tune(model, adapter, teacher, epochs=2, rate=5e-3).losses) < 0.95 * losses[0]


def test_an_end_to_end_step_that_harms_is_undone() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(model, 8, 64)
    adapter = adapter_for(model.config)
    teacher = Teacher.of(model, adapter, tokens)
    quantize(model, None, replace(W4A4, head_bits=16), tokens)
    want = model(tokens).logits
    losses = tune(model, adapter, teacher, epochs=5, rate=2.0).losses
    assert len(losses) < 6  # it stopped early
    torch.testing.assert_close(model(tokens).logits, want, rtol=1e-4, atol=1e-4)


def test_a_learned_checkpoint_loads_to_the_same_logits(tmp_path) -> None:
    from saltire.models.loading import load_model
    from saltire.models.saving import save_checkpoint
    from tests.tiny import tiny_tokenizer

    model, tokenizer = tiny_model("llama", vocab_size=259), tiny_tokenizer()
    recipe = replace(W4A4, learning=Learning(group_steps=10, epochs=1))
    tokens = random_tokens(model, 8, 64)
    quantize(model, tokenizer, recipe, tokens)
    save_checkpoint(model, tokenizer, tmp_path / "q")
    loaded, _ = load_model(str(tmp_path / "q"))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("transform", ["smooth", "kronecker", "bdq"])
def test_fewer_tokens_than_channels_still_learn(transform) -> None:
    model = tiny_model("llama")
    recipe = replace(W4A4, transform=transform, learning=Learning(group_steps=10, epochs=1))
    quantize(model, None, recipe, random_tokens(model, 2, 8))
    assert model(random_tokens(model, 1, 8)).logits.isfinite().all()


def test_efforts_and_recipes_by_file(tmp_path) -> None:
    assert with_effort(W4A4, "fast").learning is None
    assert with_effort(W4A4, "normal").learning == EFFORTS["normal"].learning
    with pytest.raises(SaltireError, match="expected one of fast, normal, best"):
        with_effort(W4A4, "some")
    path = tmp_path / "mine.yaml"
    path.write_text("base: w2a4-g64\ntransform: hadamard\nlearning: {epochs: 2, loss: rce}\n")
    recipe = parse_recipe(str(path))
    assert (recipe.name, recipe.weight_bits, recipe.group) == ("mine", 2, 64)
    assert recipe.transform == "hadamard"
    assert (recipe.learning.epochs, recipe.learning.loss) == (2, "rce")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight_bitz: 4", "unknown field 'weight_bitz'"),
        ("weight_bits: four", "weight_bits"),
        ("learning: {epochs: 1.5}", "epochs = 1.5; expected a int"),
        ("transform: magic", "transform = 'magic'"),
        ("- 4", "holds no mapping"),
        ("a: [", "cannot read the recipe"),
        ("!!python/object/apply:os.system ['true']", "cannot read the recipe"),
    ],
)
def test_a_bad_recipe_file_is_refused_by_field(tmp_path, text, message) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SaltireError, match=message):
        parse_recipe(str(path))
