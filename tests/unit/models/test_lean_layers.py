import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.phi3.modeling_phi3 import (
    Phi3Attention,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3MLP,
    Phi3RMSNorm,
    apply_rotary_pos_emb,
)

from phlora.adapters import peft_layer
from phlora.adapters.attach import attach
from phlora.adapters.speed import at_speed
from phlora.data.collate import SharedPrefixCollator
from phlora.lora.frozen import FrozenLinear
from phlora.lora.recompute import recompute_of
from phlora.models import allocator, lean_layers
from phlora.models.lm_head import token_losses

SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
START = list(range(5, 20))
ROWS = [
    {"input_ids": [*START, *range(20, 20 + n)], "labels": [-100] * len(START) + [*range(20, 20 + n)]}
    for n in (3, 9, 5)
]


def phi3(dtype: torch.dtype = torch.float32, **changes) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        attn_implementation="sdpa",
        **changes,
    )
    return Phi3ForCausalLM(config).to(dtype)


def adapted(model: nn.Module, **changes) -> nn.Module:
    torch.manual_seed(1)
    peft_model = peft_layer.fuse_lora(attach(model, {**SETTINGS, **changes}).model)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return peft_model


def padded() -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in ROWS)
    return {
        "input_ids": torch.tensor(
            [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in ROWS]
        ),
        "labels": torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in ROWS]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in ROWS]
        ),
    }


def step(model: nn.Module, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    losses, _, weights = token_losses(model, batch)
    losses = losses * weights
    model.zero_grad()
    losses.sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model: nn.Module, batch) -> int:
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = token_losses(model, batch)[0]
    assert losses.requires_grad
    return sum(size for size, _ in kept.values())


MODELS = {
    "plain": {},
    "partial rotary": {"partial_rotary_factor": 0.5},
    "sliding window": {"sliding_window": 4},
    "longrope": {
        "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 4, "long_factor": [2.0] * 4},
        "original_max_position_embeddings": 8,
        "max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_losses_and_gradients_stay(changes):
    model = adapted(phi3(**changes))
    losses, gradients = step(model, padded())
    report = lean_layers.speed_pass(model)
    lean_losses, lean_gradients = step(model, padded())
    assert report.layers == {"frozen linears": 9, "RMS norms": 5, "gated MLPs": 2, "attentions": 2}
    torch.testing.assert_close(lean_losses, losses, rtol=1e-5, atol=1e-6)
    assert lean_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(lean_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
        {"target_modules": ["down_proj"]},
        {"lora_dropout": 0.3},
        {"use_dora": True},
        {"modules_to_save": ["norm"]},
        {"bias": "all"},
    ],
    ids=str,
)
def test_any_adapter_trains_the_same(settings):
    model = adapted(phi3(), **settings)
    torch.manual_seed(2)
    losses, gradients = step(model, padded())
    lean_layers.speed_pass(model)
    torch.manual_seed(2)
    lean_losses, lean_gradients = step(model, padded())
    torch.testing.assert_close(lean_losses, losses, rtol=1e-5, atol=1e-6)
    assert lean_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(lean_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_shared_prefixes_and_gradient_checkpointing_work_on_lean_layers():
    model = adapted(phi3())
    losses, gradients = step(model, padded())
    lean_layers.speed_pass(model)
    shared = SharedPrefixCollator()(ROWS)
    assert shared["segments"].num_positions < shared["num_tokens"]
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for batch in (padded(), shared):
        lean_losses, lean_gradients = step(model, batch)
        torch.testing.assert_close(lean_losses.sum(), losses.sum(), rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(lean_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_last_layer_computes_what_the_loss_asks_for():
    model, seen = adapted(phi3()), []
    lean_layers.speed_pass(model)
    for layer in model.get_decoder().layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    batch = padded()
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            token_losses(model, batch)
    assert seen == [batch["input_ids"].numel(), 17] * 2
    # Dropout draws one mask for all positions, and logits are wanted of all of them.
    seen.clear()
    model.get_decoder().layers[-1].mlp.down_proj.lora_dropout["default"] = nn.Dropout(0.5)
    token_losses(model.train(), batch)
    model.eval()(input_ids=batch["input_ids"])
    assert seen == [batch["input_ids"].numel()] * 4


def test_bf16_errors_are_no_larger_than_those_of_the_plain_layers():
    truth = step(adapted(phi3(torch.float32)).double(), padded())[1]

    def error(lean: bool) -> float:
        model = adapted(phi3(torch.float32)).bfloat16()
        if lean:
            lean_layers.speed_pass(model)
        gradients = step(model, padded())[1]
        return sum(float((gradients[n].double() - truth[n]).square().sum()) for n in truth) ** 0.5

    assert error(lean=True) <= 1.1 * error(lean=False)


def test_less_is_kept_for_backward():
    model = adapted(phi3())
    plain = kept_bytes(model, padded())
    lean_layers.speed_pass(model)
    assert kept_bytes(model, padded()) < 0.7 * plain


def test_evaluation_and_generation_give_the_same():
    model = adapted(phi3()).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits, reply = model(ids).logits, model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        lean_layers.speed_pass(model)
        torch.testing.assert_close(model(ids).logits, logits)
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), reply)


def test_the_pass_is_undone_and_changes_no_parameter():
    model = adapted(phi3())
    names = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    kinds = [type(module) for module in model.modules()]
    lean_layers.speed_pass(model)
    assert any(type(module) is FrozenLinear for module in model.modules())
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == names
    lean_layers.slow_down(model)
    assert [type(module) for module in model.modules()] == kinds


def test_layers_whose_weight_trains_are_left_alone():
    model = phi3()
    assert lean_layers.speed_pass(model).layers == {"gated MLPs": 2, "attentions": 2}
    losses, gradients = step(model, padded())
    plain_losses, plain_gradients = step(lean_layers.slow_down(model), padded())
    torch.testing.assert_close(losses, plain_losses, rtol=1e-5, atol=1e-6)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_lean_model_can_be_copied_and_merged():
    model = adapted(phi3())
    lean_layers.speed_pass(model)
    batch = padded()
    losses = step(copy.deepcopy(model), batch)[0]
    torch.testing.assert_close(losses, step(model, batch)[0])
    with torch.no_grad():
        before = model(batch["input_ids"]).logits
        torch.testing.assert_close(
            model.merge_and_unload()(batch["input_ids"]).logits, before, atol=1e-5, rtol=1e-4
        )


def test_nothing_is_recorded_below_the_lowest_adapted_layer():
    model = adapted(phi3(), layers_to_transform=[1], target_modules=["q_proj", "down_proj"])
    lean_layers.speed_pass(model)
    entering = []
    model.get_base_model().model.layers[1].register_forward_pre_hook(
        lambda module, args: entering.append(args[0])
    )
    step(model, padded())
    assert not entering[0].requires_grad


@pytest.mark.parametrize("rotary", [4, 8])
def test_rotation_has_its_own_gradient(rotary):
    qkv = torch.randn(2, 3, 8 * 8, dtype=torch.float64, requires_grad=True)
    # Halves that differ, which the rotary embeddings of today do not use.
    cos, sin = torch.randn(2, 3, rotary, dtype=torch.float64), torch.randn(2, 3, rotary, dtype=torch.float64)

    def rotate(qkv):
        return lean_layers._SplitAndRotate.apply(qkv, cos, sin, 2, 8)

    assert torch.autograd.gradcheck(rotate, (qkv,))
    q, k, v = qkv.detach().unflatten(-1, (8, 8)).transpose(1, 2).split([4, 2, 2], dim=1)
    expected = *apply_rotary_pos_emb(q, k, cos, sin), v
    for ours, theirs in zip(rotate(qkv), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gated_product_has_its_own_gradient():
    gate_up = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lean_layers._Gate.apply, (gate_up,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_equals_the_library_s_and_its_gradient_is_no_less_exact(dtype):
    norm = Phi3RMSNorm(16).to(dtype).requires_grad_(False)
    nn.init.normal_(norm.weight)
    x, dy = torch.randn(64, 16, dtype=dtype, requires_grad=True), torch.randn(64, 16, dtype=dtype)
    wide = x.detach().double().requires_grad_()
    exact = (
        norm.weight.double() * wide * (wide.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    )
    (truth,) = torch.autograd.grad(exact, wide, dy.double())

    def output_and_error() -> tuple[torch.Tensor, float]:
        y = norm(x)
        return y, float((torch.autograd.grad(y, x, dy)[0].double() - truth).norm())

    expected, error = output_and_error()
    norm.__class__ = lean_layers.LeanRMSNorm
    y, lean_error = output_and_error()
    assert torch.equal(y, expected)
    assert lean_error <= 1.2 * error


@pytest.mark.parametrize("rotary", [4, 8])
def test_rotation_has_its_own_second_derivative(rotary):
    qkv = torch.randn(1, 2, 8 * 8, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(1, 2, rotary, dtype=torch.float64), torch.randn(1, 2, rotary, dtype=torch.float64)
    # The transformers' rotation, whose gradient is recorded, knows halves of cos and sin that are alike.
    cos[..., rotary // 2 :], sin[..., rotary // 2 :] = cos[..., : rotary // 2], sin[..., : rotary // 2]

    def rotate(qkv):
        return [x.sin() for x in lean_layers._SplitAndRotate.apply(qkv, cos, sin, 2, 8)]

    assert torch.autograd.gradgradcheck(rotate, (qkv,))


def test_gated_product_has_its_own_second_derivative():
    gate_up = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lean_layers._Gate.apply, (gate_up,))


def test_norm_has_its_own_second_derivative():
    norm = Phi3RMSNorm(16).requires_grad_(False)
    x = torch.randn(4, 16, requires_grad=True)

    def second(module):
        y = module(x)
        # What a layer behind it computes again from the norm's input counts as well.
        found = recompute_of(y)
        y = y if found is None else found.function(*found.inputs)
        (dx,) = torch.autograd.grad((module(x) * y).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    expected = second(norm)
    norm.__class__ = lean_layers.LeanRMSNorm
    torch.testing.assert_close(second(norm), expected, rtol=1e-4, atol=1e-4)


def second_derivatives(model: nn.Module) -> list[torch.Tensor]:
    """Of the length of the gradient, as a gradient penalty has them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    logits = model(input_ids=padded()["input_ids"]).logits
    # Linear in the logits: the gradient that comes in depends on nothing.
    first = torch.autograd.grad(logits.sum() / logits.numel(), parameters, create_graph=True)
    torch.stack([g.square().sum() for g in first]).sum().backward()
    found = [p.grad.clone() for p in parameters]
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"]}], ids=str
)
def test_second_derivatives_of_a_whole_model(settings):
    model = adapted(phi3(), **settings)
    model.set_attn_implementation("eager")
    with at_speed(model, "reference"):
        expected = second_derivatives(model)
    lean_layers.speed_pass(peft_layer.fuse_lora(model))
    for ours, theirs in zip(second_derivatives(model), expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)


def test_transforms_of_torch_func_on_a_whole_model():
    model = adapted(phi3(), target_modules=["q_proj", "v_proj", "up_proj", "o_proj"])
    model.set_attn_implementation("eager")
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    ids = padded()["input_ids"]

    def loss(parameters, ids):
        y = torch.func.functional_call(model, parameters, (), {"input_ids": ids[None], "use_cache": False})
        return y.logits.square().mean()

    def per_row():
        return [torch.func.grad(loss)(parameters, row) for row in ids]

    with at_speed(model, "reference"):
        expected = per_row()
    lean_layers.speed_pass(peft_layer.fuse_lora(model))
    torch.testing.assert_close(per_row(), expected, rtol=1e-3, atol=1e-7)


def test_other_kinds_of_layers_are_never_touched():
    class Own(Phi3MLP):
        pass

    model = phi3()
    model.model.layers[0].mlp.__class__ = Own
    lean_layers.speed_pass(model.requires_grad_(False))
    assert type(model.model.layers[0].mlp) is Own
    assert isinstance(model.model.layers[1].self_attn, Phi3Attention)


@pytest.mark.skipif(allocator._glibc() is None, reason="glibc's allocator")
def test_freed_memory_is_kept_while_the_model_computes_and_returned_after():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    allocator.return_freed_memory()
    before, size = resident(), 200 << 20
    with at_speed(adapted(phi3()), "auto"):
        pieces = [torch.ones(1 << 18) for _ in range(200)]
        pieces.clear()
        assert resident() - before > 0.7 * size
    assert resident() - before < 0.3 * size


def test_the_log_names_what_was_chosen():
    model = adapted(phi3())
    text = lean_layers.speed_pass(model).describe()
    assert "2 gated MLPs" in text and "threads" in text and "products by" in text
