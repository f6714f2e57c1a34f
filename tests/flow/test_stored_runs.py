"""Whole runs on a base in bfloat16 that is computed with in float32: as on the same weights in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phlora import testing
from phlora.display import Display
from phlora.export.merge import merge_run
from phlora.runs.resolve import load_pair, resolve
from phlora.train.finetune import finetune

QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = testing.tiny_folder(tmp_path_factory.mktemp("half"))
    testing.tiny_phi3()[0].bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(half_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    rows = testing.chat_rows(20)
    for storage in ("bfloat16", "float32"):
        finetune(
            model={
                "name": str(half_folder),
                "dtype": "float32",
                "storage_dtype": storage,
                "device": "cpu",
            },
            data=rows[:14],
            eval_data=rows[14:],
            training_config={"max_steps": 6, "learning_rate": 1e-2, "save_steps": 3},
            peft_config={"r": 4, "target_modules": "all-linear"},
            evaluation={"max_answers": 2, "max_new_tokens": 8},
            output=place / storage,
            display=QUIET,
        )
    return {storage: place / storage for storage in ("bfloat16", "float32")}


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "last" / "adapter_model.safetensors")


def test_both_train_the_same_adapter_and_prove_it_alike(runs: dict[str, Path]) -> None:
    ours, theirs = (adapter_of(runs[storage]) for storage in ("bfloat16", "float32"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5, msg=name)
    ours, theirs = (json.loads((runs[s] / "report.json").read_text()) for s in ("bfloat16", "float32"))
    assert ours["tuned"]["loss"] == pytest.approx(theirs["tuned"]["loss"], rel=1e-4)


def test_the_run_says_what_its_base_was_stored_as(runs: dict[str, Path]) -> None:
    model = json.loads((runs["bfloat16"] / "run.json").read_text())["model"]
    assert (model["dtype"], model["storage"], model["storage_reason"]) == ("float32", "bfloat16", "asked for")
    other = json.loads((runs["float32"] / "run.json").read_text())["model"]
    assert model["fingerprint"] == other["fingerprint"]


def test_the_adapter_opens_on_either_storage(runs: dict[str, Path]) -> None:
    ids = torch.arange(3, 30)[None]
    logits = []
    for run in runs.values():
        pair = load_pair(resolve(run))
        assert not any("trained on" in note for note in pair.notes)
        with torch.no_grad():
            logits.append(pair.model(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_merged_sums_are_rounded_once(runs: dict[str, Path], half_folder: Path, tmp_path: Path) -> None:
    run = runs["bfloat16"]
    report = merge_run(run, tmp_path / "model", display=QUIET)
    assert report.dtype == "bfloat16"
    merged, base = (load_file(f / "model.safetensors") for f in (tmp_path / "model", half_folder))
    adapter = load_file(next((run / "adapter").glob("best/*.safetensors")))
    name = "model.layers.1.mlp.down_proj"
    A, B = (adapter[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    scaling = json.loads((run / "adapter" / "best" / "adapter_config.json").read_text())["lora_alpha"] / 4
    exact = base[f"{name}.weight"].double() + scaling * B @ A
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    # Half of the last of 8 bits, and what float32 sums are off.
    assert ((merged[f"{name}.weight"].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()
    assert (merged[f"{name}.weight"] == exact.to(torch.bfloat16)).double().mean() > 0.999
