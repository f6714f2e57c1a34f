"""Weights stored in 16 bits and computed with in float32: what the same weights in float32 give, everywhere."""

from __future__ import annotations

import copy
import io
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

from phlora.adapters.attach import attach
from phlora.adapters.peft_layer import LoraLinear
from phlora.adapters.speed import at_speed
from phlora.lora import workspace
from phlora.lora.operands import DenseWeight, WidenedWeight
from phlora.models.lm_head import token_losses
from phlora.models.load import load_model
from phlora.models.stored_layers import StoredEmbedding, StoredLinear, compute_dtype, store, widen
from phlora.testing import tiny_folder, tiny_phi3

ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bfloat16."""
    place = tiny_folder(tmp_path_factory.mktemp("half"))
    tiny_phi3()[0].bfloat16().save_pretrained(place)
    return place


def both(folder: Path) -> tuple[nn.Module, nn.Module]:
    """The model stored in bfloat16, and the same weights in float32 as transformers loads them."""
    stored = load_model(folder, device="cpu", dtype="float32", storage_dtype="bfloat16").model
    return stored, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def adapted(model: nn.Module, **settings: object) -> nn.Module:
    torch.manual_seed(1)
    values = {"r": 4, "target_modules": ALL, "init_lora_weights": False, **settings}
    return attach(model, LoraConfig(**values)).model  # type: ignore[arg-type]


def gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    losses, _, _ = token_losses(model.train(), batch())
    losses.mean().backward()
    return losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------------------------------------- operand


@pytest.mark.parametrize("tokens", [1, 8, 9, 300])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_products_are_those_of_the_widened_matrix(tokens: int, stored: torch.dtype, monkeypatch) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(130, 70).to(stored), torch.randn(130)
    x, dy = torch.randn(2, tokens, 70)[0], torch.randn(tokens, 130)
    dense = DenseWeight(weight.double())
    for most in (1 << 26, 1 << 11):
        monkeypatch.setattr("phlora.lora.operands._MOST_NUMBERS", most)
        monkeypatch.setattr("phlora.lora.operands._CACHED_NUMBERS", most)
        y, dx = WidenedWeight(weight).matmul(x, bias), WidenedWeight(weight).matmul_t(dy)
        assert y.dtype == dx.dtype == torch.float32
        torch.testing.assert_close(y.double(), dense.matmul(x.double(), bias.double()), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx.double(), dense.matmul_t(dy.double()), rtol=1e-5, atol=2e-5)


def test_what_autograd_records_does_not_lie_in_the_shared_buffer() -> None:
    first, second = (torch.randn(20, 10).bfloat16() for _ in range(2))
    x = torch.randn(3, 10, requires_grad=True)
    y = WidenedWeight(first).matmul(x)
    WidenedWeight(second).matmul(x.detach())
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, first.float().sum(0).expand(3, 10))


def test_threads_do_not_share_a_buffer_at_the_same_time() -> None:
    with workspace.borrowed(10, torch.float32) as one, workspace.borrowed(10, torch.float32) as other:
        assert one.data_ptr() != other.data_ptr()
    with workspace.borrowed(10, torch.float32) as again:
        assert again.data_ptr() in (one.data_ptr(), other.data_ptr())


def test_the_buffer_is_freed_once_nobody_has_used_it_for_a_while(monkeypatch) -> None:
    monkeypatch.setattr(workspace, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(workspace, "_workspace", workspace._Workspace())
    with workspace.borrowed(1000, torch.float32):
        pass
    assert workspace.held_bytes() == 4000
    deadline = time.monotonic() + 5
    while workspace.held_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workspace.held_bytes() == 0


def test_a_buffer_of_inference_mode_can_be_written_to_afterwards() -> None:
    weight = torch.randn(20, 10).bfloat16()
    with torch.inference_mode():
        WidenedWeight(weight).matmul(torch.randn(3, 10))
    WidenedWeight(weight).matmul(torch.randn(3, 10))


# ------------------------------------------------------------------------------------------------------ model


def test_matrices_are_stored_and_the_rest_is_in_the_dtype_of_the_computation(folder: Path) -> None:
    stored, full = both(folder)
    for name, parameter in stored.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
        assert torch.equal(parameter.float(), full.get_parameter(name))
    assert isinstance(stored.lm_head, StoredLinear) and isinstance(stored.lm_head, nn.Linear)
    assert isinstance(stored.get_input_embeddings(), StoredEmbedding)
    assert compute_dtype(stored) == torch.float32
    assert stored.get_memory_footprint() < 0.52 * full.get_memory_footprint()


def test_logits_are_those_of_float32(folder: Path) -> None:
    stored, full = both(folder)
    ids = batch()["input_ids"]
    with torch.no_grad():
        ours, theirs = stored(ids).logits, full(ids).logits
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("speed", ["auto", "reference"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": [*ALL, "embed_tokens"]},
        {"trainable_token_indices": [5, 9]},
        {"lora_dropout": 0.1},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
    ids=["lora", "dora", "trained head", "embedding", "trained tokens", "dropout", "row blocks"],
)
def test_loss_and_every_gradient_are_those_of_float32(folder: Path, speed, settings) -> None:
    stored, full = (adapted(model, **settings) for model in both(folder))
    with at_speed(stored, speed):
        losses, ours = gradients(stored)
    # PEFT's and transformers' own layers; where there is chance, those that draw the same masks.
    with at_speed(full, speed if "lora_dropout" in settings else "reference"):
        expected, theirs = gradients(full)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_changes_nothing(folder: Path) -> None:
    plain, checkpointed = (adapted(both(folder)[0]) for _ in range(2))
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    _, expected = gradients(plain)
    _, found = gradients(checkpointed.train())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_peft_merges_and_restores_every_bit(folder: Path) -> None:
    stored, full = (adapted(model) for model in both(folder))
    before = {name: p.detach().clone() for name, p in stored.named_parameters()}
    ids = batch()["input_ids"]
    with at_speed(stored, "auto"), torch.no_grad():
        assert any(isinstance(module, LoraLinear) for module in stored.modules())
        unmerged = stored(ids).logits
        stored.merge_adapter()
        merged = stored(ids).logits
        stored.unmerge_adapter()
        torch.testing.assert_close(stored(ids).logits, unmerged)
    assert all(torch.equal(p, before[name]) for name, p in stored.named_parameters())
    # Merged weights are rounded to what they are stored as, as in a model of bfloat16.
    assert (merged - unmerged).abs().max() < 0.05 * unmerged.abs().max()
    plain = stored.merge_and_unload()
    assert all(p.dtype == torch.bfloat16 for name, p in plain.named_parameters() if "proj" in name)
    expected = full.merge_and_unload()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name).to(parameter.dtype)), name


def test_copies_pickles_and_saved_folders_are_whole(folder: Path, tmp_path: Path) -> None:
    stored, full = both(folder)
    ids = batch()["input_ids"]
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected = stored(ids).logits
        assert torch.equal(copy.deepcopy(stored)(ids).logits, expected)
        assert torch.equal(torch.load(buffer, weights_only=False)(ids).logits, expected)
    stored.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(p, full.get_parameter(name)) for name, p in again.named_parameters())


def test_greedy_answers_are_those_of_float32(folder: Path) -> None:
    stored, full = both(folder)
    ids = batch()["input_ids"][:1]
    answers = [model.generate(ids, max_new_tokens=12, do_sample=False) for model in (stored, full)]
    assert torch.equal(*answers)


def test_second_derivatives_go_through(folder: Path) -> None:
    weight = torch.randn(6, 4).bfloat16()
    layer = nn.Linear(4, 6, bias=False).requires_grad_(False)
    layer.weight.data = weight.float()
    dense = copy.deepcopy(layer)
    store(layer, torch.bfloat16)
    found = []
    for module in (layer, dense):
        x = torch.arange(8.0).view(2, 4).div(10).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.pow(2).sum(), x)[0])
    torch.testing.assert_close(*found)


def test_shared_weights_stay_shared_and_widening_undoes_storing() -> None:
    model = tiny_phi3()[0]
    model.config.tie_word_embeddings = True
    model.tie_weights(recompute_mapping=True)
    assert store(model, torch.bfloat16) == 10
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert store(model, torch.bfloat16) == 0
    head = model.lm_head
    widen(head)
    assert type(head) is nn.Linear and head.weight.dtype == torch.float32
