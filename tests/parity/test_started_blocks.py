"""PiSSA and OLoRA on row blocks, which start out of the base, against stock PEFT on the unfused layers of a Llama."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_lora
from peft.utils.hotswap import hotswap_adapter
from peft_blocks import BLOCKS, ROUNDING, logits
from safetensors.torch import load_file
from unfused_blocks import UNEQUAL, by_block, fused, llama, loss_of, qkv, train, weights

from phlora.adapters.attach import split_adapter
from phlora.adapters.block_modules import BlockUp, StartedUp
from phlora.adapters.peft_layer import LoraLinear, fuse_lora, unfuse_lora
from phlora.errors import ModelError
from phlora.testing import tiny_phi3

DORA = {"use_dora": True}


def started(init: str, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": BLOCKS, "init_lora_weights": init, **fields}
    return fused(tiny_phi3()[0], fields).model.eval()


STARTS = [("pissa", {}), ("olora", {}), ("pissa", UNEQUAL), ("pissa", {"use_rslora": True}), ("olora", DORA)]


@pytest.mark.parametrize(("init", "fields"), STARTS)
def test_started_blocks_train_like_stock_peft_on_unfused_layers(
    init: str, fields: dict[str, Any], device: str
) -> None:
    ours = started(init, **fields)
    config = {"r": 4, "lora_alpha": 8, "target_modules": BLOCKS, "init_lora_weights": init, **fields}
    theirs = get_peft_model(llama(tiny_phi3()[0]), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert not any(
        type(m) is not LoraLinear
        for m in ours.modules()
        if isinstance(m, peft_lora.Linear) and not m.lora_variant
    )
    base, ours, theirs = (model.to(device) for model in (tiny_phi3()[0], ours, theirs))
    torch.testing.assert_close(logits(ours), logits(base), **ROUNDING)
    losses = []
    for model in (ours, theirs):
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    values, gradients = by_block(ours, of=lambda p: p.detach()), by_block(ours, of=lambda p: p.grad)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(values[name], parameter.detach(), **ROUNDING)
            torch.testing.assert_close(gradients.pop(name), parameter.grad, rtol=1e-3, atol=1e-4)
    assert not gradients
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
        )
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert (logits(ours) - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("init", "fields"), [*STARTS, ("pissa_niter_3", {})])
def test_a_started_adapter_is_a_plain_one_for_the_untouched_base(
    init: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = started(init, **fields)
    base = {n: p for n, p in tiny_phi3()[0].named_parameters()}
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny_phi3()[0], tmp_path).eval()
    assert stock.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(logits(stock), expected, **ROUNDING)
    for peft_model in (model, stock):
        for name, weight in weights(peft_model).items():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(weight, base[plain]), name

    back = fuse_lora(split_adapter(stock, tmp_path))
    assert sum(type(m) is BlockUp for m in back.modules()) == 6
    torch.testing.assert_close(logits(back), expected, **ROUNDING)
    back.save_pretrained(tmp_path / "again")
    files = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again")]
    assert all(torch.equal(files[1][name], tensor) for name, tensor in files[0].items())

    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_phi3()[0]))
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, **ROUNDING)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-3, atol=1e-4)


def test_a_state_dict_brings_back_what_was_started_from() -> None:
    model, other = (started("pissa_niter_1", **UNEQUAL) for _ in range(2))
    train(model)
    tensors = {n: t for n, t in model.state_dict().items() if "lora_" in n}
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, StartedUp):
                for start in module.starts:
                    start.zero_()
    other.load_state_dict(tensors, strict=False)
    assert torch.equal(logits(other), logits(model))
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in tensors.items())


def test_slowed_down_started_blocks_are_computed_by_peft() -> None:
    model = started("pissa")
    train(model)
    copied = unfuse_lora(copy.deepcopy(model))
    torch.testing.assert_close(logits(copied), logits(model), **ROUNDING)


def test_swapping_into_started_blocks_works_at_their_ranks_and_is_refused_at_others(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}
    model, other = started("pissa", **fields), started("olora", **fields)
    train(other)
    other.save_pretrained(tmp_path / "other")
    hotswap_adapter(model, str(tmp_path / "other"), "default")
    torch.testing.assert_close(logits(model), logits(other), **ROUNDING)
    started("olora", r=5, **fields).save_pretrained(tmp_path / "larger")
    with pytest.raises(ModelError, match="(?s)lora_A has the shape .*load the adapter instead"):
        hotswap_adapter(model, str(tmp_path / "larger"), "default")


def test_a_bfloat16_base_stays_as_it_is() -> None:
    model = fused(
        tiny_phi3()[0].bfloat16(), {"r": 4, "target_modules": BLOCKS, "init_lora_weights": "pissa"}
    ).model
    layer, x = qkv(model), torch.randn(5, 64, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=2**-7, atol=1e-3)
    assert not layer.get_delta_weight("default")[64:96].any()
    assert layer.get_delta_weight("default").abs().max() < 1e-5
