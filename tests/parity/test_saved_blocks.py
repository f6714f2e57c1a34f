"""Saved row blocks under PeftModel's methods and in stock PEFT, and hot swapping."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_blocks import (
    BLOCKS,
    ROUNDING,
    logits,
)
from safetensors.torch import load_file
from torch import nn

from phlora.adapters.attach import attach, split_adapter
from phlora.adapters.peft_layer import fuse_lora
from phlora.testing import tiny_phi3

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
    model = fuse_lora(attach(tiny_phi3()[0], fields).model)
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
            fuse_lora(split_adapter(model, saved / name, name))
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
        model = fuse_lora(attach(tiny_phi3()[0], {**fields, **old}).model).to(device).eval()
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
    model = fuse_lora(attach(tiny_phi3()[0], {**fields, "r": 4}).model)
    for r, shapes in ((2, {"weight_q_proj": (64, 2), "weight_v_proj": (32, 6)}), (9, None)):
        hotswap_adapter(model, str(save(tmp_path / str(r), seed=r, r=r, **fields)), adapter_name="default")
        up = model.get_submodule("base_model.model.model.layers.0.self_attn.qkv_proj").lora_B["default"]
        # A smaller adapter is padded with zeros, which fall to the last block.
        expected = shapes or {"weight_q_proj": (64, 9), "weight_v_proj": (32, 9)}
        assert {name: tuple(part.shape) for name, part in up.named_parameters()} == expected
