"""DoRA on row blocks: against the formula, and stock PEFT on the unfused layers of a Llama."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import layer as peft_lora
from peft_blocks import BLOCKS, ROUNDING, logits
from safetensors.torch import load_file
from torch import Tensor
from unfused_blocks import UNEQUAL, by_block, fused, llama, loss_of, qkv, randomize, train, weights

from phlora.adapters.attach import split_adapter
from phlora.adapters.block_modules import BlockMagnitude
from phlora.adapters.peft_layer import fuse_lora
from phlora.errors import ModelError
from phlora.testing import tiny_phi3


def dora(**fields: Any) -> PeftModel:
    """A tiny Phi-3 with DoRA on row blocks, at values as after some training."""
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": BLOCKS, "use_dora": True, **fields}
    return randomize(fused(tiny_phi3()[0], fields).model)


# ------------------------------------------------------------------------------------------------------ the formula


def naive(layer: peft_lora.Linear, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Row for row `m · (w + s·b A) / ‖w + s·b A‖`, the norm a constant, and copies of all that it was made of."""
    W, up = layer.base_layer.weight, layer.lora_B["default"]
    A = layer.lora_A["default"].weight.detach().clone().requires_grad_()
    Bs = [B.detach().clone().requires_grad_() for B in up.parts]
    ms = [m.detach().clone().requires_grad_() for m in layer.lora_magnitude_vector["default"].parts]
    rows = list(W)
    stacked = A.split([block.r for block in up.blocks])
    for block, A_i, B, m in zip(up.blocks, stacked, Bs, ms, strict=True):
        for i in range(block.size):
            row = W[block.start + i] + block.scaling * B[i] @ A_i
            rows[block.start + i] = m[i] * row / row.norm().detach()
    return x @ torch.stack(rows).t(), [x, A, *Bs, *ms]


@pytest.mark.parametrize("fields", [{}, UNEQUAL, {"use_rslora": True, "target_modules": ["k_proj"]}])
def test_output_and_every_gradient_are_the_formulas(fields: dict[str, Any]) -> None:
    layer = qkv(dora(**fields)).double()
    torch.manual_seed(2)
    x, dy = torch.randn(5, 64).double().requires_grad_(), torch.randn(5, 128).double()
    expected, leaves = naive(layer, x.detach().clone().requires_grad_())
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.backward(dy), expected.backward(dy)
    magnitude = layer.lora_magnitude_vector["default"]
    ours = [x, layer.lora_A["default"].weight, *layer.lora_B["default"].parts, *magnitude.parts]
    for one, leaf in zip(ours, leaves, strict=True):
        torch.testing.assert_close(one.grad, leaf.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rows_in_no_block_are_the_bases_to_the_bit_and_have_no_parameter(dropout: float, device: str) -> None:
    model = dora(lora_dropout=dropout).to(device)
    train(model)
    layer, x = qkv(model).train(), torch.randn(7, 64, device=device)
    y, base = layer(x), layer.base_layer(x)
    assert torch.equal(y[:, 64:96], base[:, 64:96])
    assert (y[:, :64] - base[:, :64]).abs().max() > 1e-2 and (y[:, 96:] - base[:, 96:]).abs().max() > 1e-2
    magnitude = layer.lora_magnitude_vector["default"]
    assert {name: len(part) for name, part in magnitude.named_parameters()} == {
        "weight_q_proj": 64,
        "weight_v_proj": 32,
    }
    torch.testing.assert_close(magnitude.weight[64:96], layer.base_layer.weight[64:96].norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_a_fresh_adapter_is_the_base(dtype: torch.dtype, init: Any) -> None:
    model = fused(
        tiny_phi3()[0].to(dtype),
        {"r": 4, "target_modules": BLOCKS[:3], "use_dora": True, "init_lora_weights": init},
    ).model
    layer, x = qkv(model), torch.randn(7, 64, dtype=dtype)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    base = layer.base_layer(x)
    tolerance = ROUNDING if dtype == torch.float32 else dict(rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(layer(x), base, **tolerance)
    assert torch.equal(layer(x)[:, 64:96], base[:, 64:96])
    # Lengths in full precision: bfloat16 would be 2^-9 off.
    exact = layer.base_layer.weight.double().norm(dim=1)
    torch.testing.assert_close(
        layer.lora_magnitude_vector["default"].weight.double(), exact, rtol=1e-6, atol=0
    )


# --------------------------------------------------------------------------------------- stock PEFT, unfused layers


def unfused(model: PeftModel, **fields: Any) -> PeftModel:
    """Stock PEFT's DoRA on a Llama with the values of an adapter on row blocks."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": BLOCKS, "use_dora": True, **fields}
    theirs = get_peft_model(llama(tiny_phi3()[0]), LoraConfig(task_type="CAUSAL_LM", **config))
    values = by_block(model, of=lambda p: p.detach().clone())
    parameters = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert values.keys() == parameters.keys()
    for name, parameter in parameters.items():
        parameter.data = values[name]
    return theirs


@pytest.mark.parametrize(
    "fields",
    [
        {},
        UNEQUAL,
        {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "use_rslora": True},
    ],
)
def test_blocks_train_like_stock_peft_on_unfused_layers(fields: dict[str, Any], device: str) -> None:
    ours = dora(**fields)
    theirs = unfused(ours, **fields)
    ours, theirs = ours.to(device), theirs.to(device)
    torch.testing.assert_close(logits(ours), logits(theirs), **ROUNDING)
    losses = []
    for model in (ours, theirs):
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    gradients = by_block(ours, of=lambda p: p.grad)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients.pop(name), parameter.grad, **ROUNDING)
    assert not gradients
    train(ours), train(theirs)
    trained = by_block(ours, of=lambda p: p.detach())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=1e-4)


def test_fresh_blocks_have_the_lengths_and_the_counts_of_unfused_layers() -> None:
    config = {"r": 4, "target_modules": BLOCKS, "use_dora": True}
    attached = fused(tiny_phi3()[0], config)
    theirs = get_peft_model(llama(tiny_phi3()[0]), LoraConfig(task_type="CAUSAL_LM", **config))
    ours = by_block(attached.model, of=lambda p: p.detach())
    expected = {n: p.detach() for n, p in theirs.named_parameters() if p.requires_grad}
    assert ours.keys() == expected.keys()
    for name in ours:
        assert ours[name].shape == expected[name].shape
        if "lora_magnitude_vector" in name:
            torch.testing.assert_close(ours[name], expected[name])
    counts = theirs.get_nb_trainable_parameters()
    assert attached.model.get_nb_trainable_parameters() == counts
    assert (attached.summary.num_trainable, attached.summary.num_total) == counts
    assert attached.summary.modules["qkv_proj"] == (2, 2 * (4 * (2 * 64 + 96) + 96))
    status = attached.model.get_model_status()
    assert (status.trainable_params, status.total_params) == counts
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True}


# ---------------------------------------------------------------------------------------------- files, PEFT's methods


@pytest.mark.parametrize("fields", [{}, UNEQUAL, {"lora_dropout": 0.1}])
def test_the_saved_adapter_has_equal_logits_in_stock_peft(
    tmp_path: Path, fields: dict[str, Any], device: str
) -> None:
    model = dora(**fields).to(device)
    train(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rows = {n.split(".")[-2]: len(t) for n, t in tensors.items() if n.endswith("lora_magnitude_vector")}
    assert rows == {"qkv_proj": 128, "gate_up_proj": 224, "o_proj": 64}
    theirs = PeftModel.from_pretrained(tiny_phi3()[0], tmp_path).to(device).eval()
    assert not any(isinstance(module, BlockMagnitude) for module in theirs.modules())
    torch.testing.assert_close(logits(theirs), logits(model), **ROUNDING)


@pytest.mark.parametrize("fields", [{}, UNEQUAL])
def test_a_saved_adapter_comes_back_into_blocks_bit_for_bit(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = dora(**fields)
    train(model)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny_phi3()[0], tmp_path, is_trainable=True)
    back = fuse_lora(split_adapter(plain, tmp_path)).eval()
    ours = {n: p for n, p in model.named_parameters() if "lora_" in n}
    theirs = {n: p for n, p in back.named_parameters() if "lora_" in n}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and theirs[n].requires_grad for n in ours)
    assert torch.equal(logits(back), logits(model))
    back.save_pretrained(tmp_path / "again")
    files = [folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_state_dict_goes_into_fresh_blocks_bit_for_bit(tmp_path: Path) -> None:
    model = dora(**UNEQUAL)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    fresh = fused(
        tiny_phi3()[0], {"r": 4, "target_modules": BLOCKS, "use_dora": True, **UNEQUAL}
    ).model.eval()
    result = set_peft_model_state_dict(fresh, tensors)
    assert not result.unexpected_keys and not [k for k in result.missing_keys if "lora_" in k]
    for (name, ours), theirs in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(logits(fresh), logits(model))
    name = next(name for name in tensors if name.endswith("qkv_proj.lora_magnitude_vector"))
    with pytest.raises(ModelError, match=r"(?s)shape \(64,\).*one length for each of 128 rows"):
        qkv(fresh).lora_magnitude_vector["default"].load_state_dict({"weight": tensors[name][:64]})


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def steps(model: PeftModel, optimizer: Any) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    def start() -> tuple[PeftModel, Any]:
        model = dora(**UNEQUAL)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    whole, optimizer = start()
    steps(whole, optimizer)
    whole.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    steps(whole, optimizer)

    resumed, optimizer = start()
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    steps(resumed, optimizer)
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_keeps_the_logits_and_leaves_the_other_rows(safe_merge: bool) -> None:
    model = dora()
    expected, before = logits(model), weights(model)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model), expected, **ROUNDING)
    model.unmerge_adapter()
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, before[name], **ROUNDING)
    torch.testing.assert_close(logits(model), expected, **ROUNDING)

    merged = dora().merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(logits(merged), expected, **ROUNDING)
    base, result = (
        m.get_submodule("model.layers.0.self_attn.qkv_proj").weight for m in (tiny_phi3()[0], merged)
    )
    assert torch.equal(result[64:96], base[64:96])
    assert (result[:64] - base[:64]).abs().max() > 1e-2 and (result[96:] - base[96:]).abs().max() > 1e-2


def test_disabling_gives_the_base_model_to_the_bit() -> None:
    model = dora()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_phi3()[0]))


def test_several_adapters(tmp_path: Path) -> None:
    model = dora()
    first = logits(model)
    model.save_pretrained(tmp_path)
    config = LoraConfig(r=3, target_modules=["qkv_proj"], use_dora=True)
    model.add_adapter("other", config)
    randomize(model)
    model.set_adapter("other")
    assert not torch.allclose(logits(model), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "default" in n)
    model.load_adapter(str(tmp_path), "again")
    fuse_lora(split_adapter(model, tmp_path, "again"))
    model.set_adapter("again")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    for name in ("other", "default"):
        model.delete_adapter(name)
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    assert list(qkv(model).lora_magnitude_vector) == ["again"]


def test_copies_and_other_dtypes() -> None:
    model = dora()
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    single, double = logits(model), logits(copied.double())
    torch.testing.assert_close(double.float(), single, **ROUNDING)
    half = qkv(copied.bfloat16())
    assert half.lora_magnitude_vector["default"].weight.dtype == torch.bfloat16


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = dora().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
