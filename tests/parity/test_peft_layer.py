"""Our PEFT layer against PEFT's own, and row blocks against LoRA on the unfused layers."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import Tensor, nn

import phlora
from phlora.adapters.attach import attach, split_adapter
from phlora.adapters.block_modules import BlockUp
from phlora.adapters.peft_layer import LoraLinear, slow_down
from phlora.errors import ModelError
from phlora.testing import tiny_phi3

# fp32 products of at most 112 terms in another order.
ROUNDING = dict(rtol=1e-4, atol=1e-5)
IDS = torch.arange(3, 51).view(2, 24)
BLOCKS = ["q_proj", "v_proj", "up_proj", "o_proj"]


def randomize(model: Any, adapter: str = "default") -> Any:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and adapter in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def stock(*, r: int = 4, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **fields)
    return randomize(get_peft_model(tiny_phi3()[0], config))


def blocks(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return randomize(attach(tiny_phi3()[0], {"r": 4, "target_modules": BLOCKS, **fields}).model)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(device_of(model))).logits


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    ids = IDS.to(device_of(model))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(gradient is not None for gradient in gradients)
    return [loss.detach(), *gradients]


def train(model: nn.Module, steps: int = 5) -> list[Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    ids = IDS.to(device_of(model))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters() if p.requires_grad]


def assert_same(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or ROUNDING))


def fused_layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


# ------------------------------------------------------------------------------------------- PEFT's layers, faster


def test_speeding_up_shares_every_parameter_and_can_be_undone() -> None:
    model = stock()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    assert phlora.speed_up(model) is model and len(fused_layers(model)) == 8
    assert list(model.state_dict()) == keys
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    slow_down(model)
    assert not fused_layers(model)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_forward_and_every_gradient(device: str) -> None:
    ours, theirs = phlora.speed_up(stock()).to(device), stock().to(device)
    assert_same(loss_and_gradients(ours), loss_and_gradients(theirs))


def test_five_steps(device: str) -> None:
    # AdamW divides by the root of squared gradients, which lifts rounding errors of tiny ones.
    ours, theirs = phlora.speed_up(stock()).to(device), stock().to(device)
    assert_same(train(ours), train(theirs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_autocast(checkpointing: bool, device: str) -> None:
    results = []
    for model in (phlora.speed_up(stock()).to(device), stock().to(device)):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        with torch.autocast(device, torch.bfloat16):
            results.append(loss_and_gradients(model))
    assert_same(*results, rtol=0.05, atol=0.02)


def test_a_bfloat16_base_with_fp32_adapters(device: str) -> None:
    results = []
    for hasten in (phlora.speed_up, lambda model: model):
        torch.manual_seed(0)
        base = tiny_phi3()[0].bfloat16()
        model = hasten(
            randomize(get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")))
        )
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        results.append(loss_and_gradients(model.to(device)))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=0.01)
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()


def test_dropout_has_pefts_mean_and_spread(device: str) -> None:
    model = stock(lora_dropout=0.3).to(device)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.o_proj").train()
    x = torch.randn(3, 64, device=device)
    samples = []
    for hasten in (lambda m: m, phlora.speed_up):
        hasten(model)
        with torch.no_grad():
            samples.append(torch.stack([layer(x) for _ in range(4000)]))
    theirs, ours = samples
    assert type(layer) is LoraLinear
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 6 * spread * (2 / 4000) ** 0.5).all()
    torch.testing.assert_close(ours.std(0), spread, rtol=0.1, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ row blocks


class Unfused(nn.Module):
    """A fused linear layer as three linear layers side by side, each with PEFT's LoRA where it is adapted."""

    def __init__(self, layer: LoraLinear, sizes: dict[str, int]) -> None:
        super().__init__()
        up = layer.lora_B["default"]
        ranks = [block.r for block in up.blocks]
        downs = dict(
            zip((b.name for b in up.blocks), layer.lora_A["default"].weight.split(ranks), strict=True)
        )
        ups = dict(zip((b.name for b in up.blocks), zip(up.parts, up.blocks, strict=True), strict=True))
        rows = dict(zip(sizes, layer.base_layer.weight.split(list(sizes.values())), strict=True))
        self.parts = nn.ModuleDict()
        for name, size in sizes.items():
            linear = nn.Linear(64, size, bias=False, device=rows[name].device).requires_grad_(False)
            linear.weight.data = rows[name].detach().clone()
            self.parts[name] = linear
            if name in ups:
                B, block = ups[name]
                config = LoraConfig(r=block.r)
                part = peft_lora.Linear(
                    linear, "default", config=config, r=block.r, lora_alpha=block.scaling * block.r
                )
                part.lora_A["default"].weight.data = downs[name].detach().clone()
                part.lora_B["default"].weight.data = B.detach().clone()
                self.parts[name] = part

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts.values()], -1)


def unfused(model: PeftModel) -> PeftModel:
    """A copy in which every layer with row blocks is unfused."""
    sizes = {
        "qkv_proj": {"q_proj": 64, "k_proj": 32, "v_proj": 32},
        "gate_up_proj": {"gate_proj": 112, "up_proj": 112},
    }
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear) and isinstance(layer.lora_B["default"], BlockUp):
            model.set_submodule(name, Unfused(layer, sizes[name.rpartition(".")[2]]))
    return slow_down(model)


def by_block(model: PeftModel, *, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """A value of every trainable parameter, row blocks apart, under the names of the unfused model."""
    values = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        value, layer = of(parameter), model.get_submodule(name.rpartition(".lora_")[0])
        up = layer.lora_B["default"]
        if not isinstance(up, BlockUp):
            values[name] = value
        elif "lora_A" in name:
            for block, part in zip(up.blocks, value.split([b.r for b in up.blocks]), strict=True):
                values[name.replace(".lora_A", f".parts.{block.name}.lora_A")] = part
        else:
            head, _, block_name = name.rpartition(".weight_")
            values[head.replace(".lora_B", f".parts.{block_name}.lora_B") + ".weight"] = value
    return values


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "use_rslora": True},
    ],
)
def test_blocks_train_like_unfused_layers(fields: dict[str, Any], device: str) -> None:
    ours = blocks(**fields).to(device)
    theirs = unfused(ours)
    torch.testing.assert_close(logits(ours), logits(theirs), **ROUNDING)
    loss_and_gradients(ours), loss_and_gradients(theirs)
    gradients = by_block(ours, of=lambda p: p.grad)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], **ROUNDING)
    train(ours), train(theirs)
    trained = by_block(ours, of=lambda p: p.detach())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"up_proj": 3}}])
def test_the_saved_adapter_has_equal_logits_in_stock_peft(
    tmp_path: Path, fields: dict[str, Any], device: str
) -> None:
    model = blocks(**fields).to(device)
    train(model)
    model.eval().save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(tiny_phi3()[0], tmp_path).to(device)
    assert not fused_layers(theirs)
    torch.testing.assert_close(logits(theirs), logits(model), **ROUNDING)


def test_slowed_down_blocks_are_computed_by_peft(device: str) -> None:
    model = blocks().to(device)
    fast = loss_and_gradients(model)
    slow = slow_down(copy.deepcopy(model))
    slow.zero_grad()
    assert not fused_layers(slow)
    assert_same(loss_and_gradients(slow), fast)


def test_a_resumed_block_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def steps(model: PeftModel, optimizer: Any, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()

    def start() -> tuple[PeftModel, Any]:
        model = blocks(rank_pattern={"q_proj": 6}, alpha_pattern={"up_proj": 3})
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    whole, optimizer = start()
    steps(whole, optimizer, 2)
    whole.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    steps(whole, optimizer, 2)

    resumed, optimizer = start()
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    steps(resumed, optimizer, 2)
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


# ------------------------------------------------------------------------------------------- PeftModel's own methods


@pytest.fixture(params=["plain", "blocks"])
def model(request: Any, device: str) -> PeftModel:
    return (phlora.speed_up(stock()) if request.param == "plain" else blocks()).to(device).eval()


def test_merging_keeps_the_logits_and_unmerging_every_bit(model: PeftModel) -> None:
    expected, base = logits(model), logits(tiny_phi3()[0].to(model.device))
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(logits(model), expected, **ROUNDING)
        model.unmerge_adapter()
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters() if "base_layer" in n)
    assert not torch.allclose(expected, base)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, **ROUNDING)
    assert not any(isinstance(module, peft_lora.LoraLayer) for module in merged.modules())


def test_merging_a_broken_adapter_is_refused(model: PeftModel) -> None:
    layer = fused_layers(model)[0]
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


def test_disabling_gives_the_base_model(model: PeftModel) -> None:
    expected = logits(tiny_phi3()[0].to(model.device).eval())
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_several_adapters(model: PeftModel, tmp_path: Path) -> None:
    first = logits(model)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["qkv_proj", "down_proj"]))
    phlora.speed_up(randomize(model, "other"))
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    mixed = model(input_ids=IDS.to(model.device), adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), **ROUNDING)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    torch.testing.assert_close(both, logits(slow_down(copy.deepcopy(model))), **ROUNDING)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, **ROUNDING)
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("other")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)

    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "again")
    model.set_adapter("again")
    torch.testing.assert_close(logits(model), first, **ROUNDING)


@pytest.mark.parametrize("combination", ["svd", "cat"])
def test_weighted_adapters(model: PeftModel, combination: str) -> None:
    model.add_weighted_adapter(["default"] * 2, [0.25, 0.5], "blend", combination_type=combination)
    delta = {}
    for layer in fused_layers(model):
        delta = {name: layer.get_delta_weight(name) for name in ("default", "blend")}
        tolerance = 1e-4 if combination == "cat" else 1e-3
        torch.testing.assert_close(delta["blend"], 0.75 * delta["default"], rtol=1e-3, atol=tolerance)
    assert delta


def test_status_and_parameter_counts(model: PeftModel) -> None:
    status = model.get_model_status()
    assert (status.enabled, status.merged_adapters, status.active_adapters) == (True, [], ["default"])
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(model.get_layer_status()) == len(fused_layers(model))


def test_gradient_checkpointing_changes_nothing(model: PeftModel) -> None:
    expected = loss_and_gradients(model.train())
    model.zero_grad()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        # To the bit where kernels are deterministic.
        tolerance = ROUNDING if model.device.type == "cuda" else {"rtol": 0, "atol": 0}
        assert_same(loss_and_gradients(model), expected, **tolerance)
        model.zero_grad()


def test_scaling_an_adapter(model: PeftModel) -> None:
    layer, x = fused_layers(model)[0], torch.randn(2, 64, device=model.device)
    with torch.no_grad():
        base, full = layer.base_layer(x), layer(x)
        layer.scale_layer(0.5)
        torch.testing.assert_close(layer(x), (base + full) / 2, **ROUNDING)
        layer.unscale_layer()
        torch.testing.assert_close(layer(x), full, **ROUNDING)


def test_hooks_on_inner_layers_are_called(model: PeftModel) -> None:
    layer, x = fused_layers(model)[0], torch.randn(2, 64, device=model.device)
    with torch.no_grad():
        expected, called = layer(x), []
        for inner in (layer.base_layer, layer.lora_B["default"]):
            inner.register_forward_hook(lambda module, *_: called.append(module))
        torch.testing.assert_close(layer(x), expected, **ROUNDING)
    assert called == [layer.base_layer, layer.lora_B["default"]]


def test_copies_and_pickles(model: PeftModel) -> None:
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(copied), expected, rtol=0, atol=0)
        assert fused_layers(copied)


def test_compiles_without_a_break(model: PeftModel) -> None:
    layer, x = fused_layers(model)[0], torch.randn(2, 64, device=model.device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), **ROUNDING)


# ------------------------------------------------------------------- saved adapters, the same methods in stock PEFT

# Rows of q (64) and v (32), of all of it (128), and so on: unequal blocks, unequal ranks, and one without any block.
SAVED: dict[str, dict[str, Any]] = {
    "one": {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"], "r": 4},
    "two": {"target_modules": ["k_proj", "v_proj", "gate_proj", "down_proj"], "r": 4},
    "ranks": {"target_modules": ["q_proj", "v_proj", "gate_proj"], "r": 2, "rank_pattern": {"q_proj": 5}},
    "whole": {"target_modules": "all-linear", "r": 3},
}
ROWS = torch.randint(3, 60, (5, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders with the adapters of `SAVED`, at random values."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, fields) in enumerate(SAVED.items()):
        save(folder / name, seed=number, **fields)
    return folder


def save(folder: Path, *, seed: int, **fields: Any) -> Path:
    model = attach(tiny_phi3()[0], fields).model
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def load(saved: Path, *names: str, as_blocks: bool, device: str = "cpu") -> PeftModel:
    model = PeftModel.from_pretrained(tiny_phi3()[0], saved / names[0], names[0])
    for name in names[1:]:
        model.load_adapter(str(saved / name), name)
    for name in names if as_blocks else ():
        if (saved / name / "phlora.json").is_file():
            split_adapter(model, saved / name, name)
    return model.to(device).eval()


def merged(model: PeftModel) -> PeftModel:
    model.base_model.set_adapter(["one", "two"])
    model.merge_adapter()
    return model


def unmerged(model: PeftModel) -> PeftModel:
    merged(model).unmerge_adapter()
    return model


def switched(model: PeftModel) -> PeftModel:
    model.set_adapter("two")
    return model


def without_the_other(model: PeftModel) -> PeftModel:
    model.set_adapter("one")
    model.delete_adapter("two")
    return model


def blended(**how: Any) -> Callable[[PeftModel], PeftModel]:
    def blend(model: PeftModel) -> PeftModel:
        model.add_weighted_adapter(["one", "two"], [0.75, -0.5], "blend", **how)
        model.set_adapter("blend")
        return model

    return blend


@pytest.mark.parametrize(
    "operate",
    [
        lambda model: model,
        switched,
        without_the_other,
        merged,
        unmerged,
        lambda model: model.merge_and_unload(adapter_names=["two"]),
        lambda model: model.unload(),
        blended(combination_type="linear"),
        blended(combination_type="cat"),
        blended(combination_type="svd"),
        blended(combination_type="svd", svd_rank=3),
        blended(combination_type="ties", density=0.5),
        blended(combination_type="magnitude_prune", density=0.5),
    ],
)
def test_methods_do_on_blocks_what_they_do_on_plain_adapters(saved: Path, operate: Any, device: str) -> None:
    ours, theirs = (
        operate(load(saved, "one", "two", as_blocks=kind, device=device)) for kind in (True, False)
    )
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-4)


def test_blocks_survive_saving_and_loading_to_the_bit(saved: Path, tmp_path: Path) -> None:
    model = load(saved, "one", "ranks", as_blocks=True)
    model.save_pretrained(tmp_path)
    for name in ("one", "ranks"):
        files = [folder / name / "adapter_model.safetensors" for folder in (saved, tmp_path)]
        before, after = map(load_file, files)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert (tmp_path / name / "phlora.json").read_text() == (saved / name / "phlora.json").read_text()


def test_disabled_blocks_are_the_base_model_to_the_bit(saved: Path) -> None:
    model = load(saved, "one", "two", as_blocks=True)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_phi3()[0].eval()))


def test_status_says_of_blocks_what_it_says_of_plain_adapters(saved: Path) -> None:
    ours, theirs = (load(saved, "one", "two", as_blocks=kind) for kind in (True, False))
    for operate in (lambda model: model, without_the_other, lambda model: model.merge_adapter() or model):
        status, expected = (dataclasses.asdict(operate(model).get_model_status()) for model in (ours, theirs))
        # The plain form's zeros are parameters too.
        for key in ("total_params", "trainable_params"):
            assert status.pop(key) <= expected.pop(key)
        assert status == expected
        layers = [
            [dataclasses.replace(layer, module_type="") for layer in model.get_layer_status()]
            for model in (ours, theirs)
        ]
        assert layers[0] == layers[1]


def test_adapters_mixed_in_one_batch(saved: Path, device: str) -> None:
    names = ["two", "__base__", "one", "whole", "ranks"]
    model, rows = load(saved, *SAVED, as_blocks=True, device=device), ROWS.to(device)
    with torch.no_grad():
        mixed = model(input_ids=rows, adapter_names=names).logits
        alone = []
        for row, name in zip(rows, names, strict=True):
            if name == "__base__":
                with model.disable_adapter():
                    alone.append(model(input_ids=row[None]).logits)
                continue
            model.set_adapter(name)
            alone.append(model(input_ids=row[None]).logits)
        plain = load(saved, *SAVED, as_blocks=False, device=device)
        theirs = plain(input_ids=rows, adapter_names=names).logits
    for ours, expected in zip(mixed, alone, strict=True):
        torch.testing.assert_close(ours, expected[0], **ROUNDING)
    torch.testing.assert_close(mixed, theirs, **ROUNDING)
    assert min((one - other).abs().max() for one, other in itertools.combinations(mixed, 2)) > 0.1


# ----------------------------------------------------------------------------------------------------- hot swapping

# What is in place, and what is swapped in. PEFT itself wants equal `alpha_pattern`s.
SWAPS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 24}),
    ({"lora_alpha": 8}, {"lora_alpha": 8, "r": 2}),
    ({"lora_alpha": 8}, {"lora_alpha": 8, "r": 7}),
    ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "k_proj"]}),
    ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "k_proj", "v_proj"], "r": 6}),
    ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["qkv_proj"], "r": 3}),
    ({"target_modules": ["qkv_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
    ({"target_modules": ["qkv_proj"]}, {"target_modules": ["qkv_proj"], "r": 7}),
    ({"target_modules": ["qkv_proj"]}, {"target_modules": ["qkv_proj"], "r": 2}),
]


@pytest.mark.parametrize("prepared", [None, {}, {"target_rank": 18}])
@pytest.mark.parametrize(("old", "new"), SWAPS)
def test_hot_swapping(
    tmp_path: Path, old: dict[str, Any], new: dict[str, Any], prepared: Any, device: str
) -> None:
    fields = {"target_modules": BLOCKS, "r": 4}
    folders = [
        save(tmp_path / str(seed), seed=seed, **{**fields, **kind}) for seed, kind in enumerate((old, new))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = attach(tiny_phi3()[0], {**fields, **old}).model.to(device).eval()
    if prepared is not None:
        prepare_model_for_compiled_hotswap(model, **prepared)
    expected = [
        logits(PeftModel.from_pretrained(tiny_phi3()[0], folder).to(device).eval()) for folder in folders
    ]
    assert not torch.allclose(*expected)
    # There, and back to the first.
    for folder, result in [*zip(folders, expected, strict=True), (folders[0], expected[0])]:
        hotswap_adapter(model, str(folder), adapter_name="default")
        torch.testing.assert_close(logits(model), result, **ROUNDING)


def test_hot_swapping_keeps_the_blocks_of_the_same_parameters(saved: Path, tmp_path: Path) -> None:
    model = load(saved, "one", as_blocks=True)
    parameters = dict(model.named_parameters())
    hotswap_adapter(model, str(save(tmp_path, seed=9, **SAVED["one"])), adapter_name="one")
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_swapped_in_blocks_of_other_ranks_stay_blocks(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}
    model = attach(tiny_phi3()[0], {**fields, "r": 4}).model
    for r, shapes in ((2, {"weight_q_proj": (64, 2), "weight_v_proj": (32, 6)}), (9, None)):
        hotswap_adapter(model, str(save(tmp_path / str(r), seed=r, r=r, **fields)), adapter_name="default")
        up = model.get_submodule("base_model.model.model.layers.0.self_attn.qkv_proj").lora_B["default"]
        # A smaller adapter is padded with zeros, which fall to the last block.
        expected = shapes or {"weight_q_proj": (64, 9), "weight_v_proj": (32, 9)}
        assert {name: tuple(part.shape) for name, part in up.named_parameters()} == expected


# Merging, as exact as the weight that was kept, and never over what was written since.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [stock, blocks], ids=["whole", "blocks"])
def test_dora_unmerges_to_the_bit(make: Callable[..., PeftModel], dtype: torch.dtype) -> None:
    model = phlora.speed_up(make(use_dora=True).to(dtype))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_other_values_for_a_merged_weight_are_refused_and_its_own_are_not() -> None:
    model = phlora.speed_up(stock())
    unmerged_state = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    model.load_state_dict(model.state_dict())
    adapter = {name: 2 * value for name, value in unmerged_state.items() if "lora_B" in name}
    for state in (unmerged_state, {**model.state_dict(), **adapter}):
        with pytest.raises(ModelError, match="unmerge_adapter"):
            model.load_state_dict(state)
    model.unmerge_adapter()
    model.load_state_dict(unmerged_state)
    assert all(torch.equal(value, unmerged_state[name]) for name, value in model.state_dict().items())


def test_a_weight_written_while_merged_is_not_thrown_away() -> None:
    ours, theirs = phlora.speed_up(stock()), stock()
    for model in (ours, theirs):
        model.merge_adapter()
        for name, parameter in model.named_parameters():
            if "base_layer" in name:
                parameter.data.mul_(1.5)
        model.unmerge_adapter()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


# Precision in 16 bits.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target_modules", ["all-linear", BLOCKS], ids=["whole", "blocks"])
def test_a_16_bit_base_is_no_further_from_fp64_than_peft(target_modules: Any, dtype: torch.dtype) -> None:
    """One layer after the other, as the model's own rounding would hide theirs: output, and each gradient."""
    torch.manual_seed(0)
    fields = {"r": 8, "lora_alpha": 32, "target_modules": target_modules}
    model = attach(tiny_phi3()[0], fields).model
    errors, gradients = torch.zeros(2), torch.zeros(2)
    for layer in [module for module in model.modules() if isinstance(module, LoraLinear)]:
        for parameter in layer.parameters():
            parameter.data = torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
        layer.base_layer.to(dtype)
        stocks = copy.deepcopy(layer)
        stocks.__class__ = peft_lora.Linear
        x, dy = (
            torch.randn(64, layer.in_features, dtype=dtype),
            torch.randn(64, layer.out_features, dtype=dtype),
        )
        exact, exact_gradients = run_layer(copy.deepcopy(layer).double(), x.double(), dy.double())
        for i, module in enumerate((layer, stocks)):
            y, found = run_layer(module, x, dy)
            errors[i] += float((y - exact).norm() / exact.norm())
            gradients[i] += float((found - exact_gradients).norm() / exact_gradients.norm())
    assert errors[0] <= 1.001 * errors[1], errors
    # dx is rounded once here and twice there.
    assert gradients[0] <= 0.8 * gradients[1], gradients


def run_layer(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradients of the input and the adapter in one row; both in fp64."""
    x = x.clone().requires_grad_()
    y = module(x)
    leaves = [x, *(p for name, p in module.named_parameters() if "lora_" in name)]
    found = torch.autograd.grad(y, leaves, dy)
    return y.detach().double(), torch.cat([g.flatten().double() for g in found])


@pytest.mark.parametrize("make", [stock, blocks], ids=["whole", "blocks"])
def test_print_shows_what_peft_shows(make: Callable[..., PeftModel]) -> None:
    model = phlora.speed_up(make())
    assert repr(model) == repr(slow_down(copy.deepcopy(model)))
