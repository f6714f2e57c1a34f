"""A run on row blocks: resumed is uninterrupted, and what it saved is measured, converted and merged like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phlora import convert, evaluate_run, finetune, merge_run
from phlora.adapters.attach import split_adapter
from phlora.adapters.load import load_adapter
from phlora.adapters.peft_layer import fuse_lora
from phlora.display import Display
from phlora.testing import tiny_phi3
from phlora.train import loop
from phlora.train.callbacks import GentleStop

QUIET = Display(quiet=True)
TEXTS = ["salam دنیا", "namaste नमस्ते", "zdravo свете", "merhaba dünya", "xin chào"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-phi3")
    for part in tiny_phi3():
        part.save_pretrained(folder)
    return folder


def run_it(
    model_folder: Path, output: Path, *, device: str = "cpu", resume: bool = False, **peft_config: Any
) -> Any:
    return finetune(
        model={"name": str(model_folder), "dtype": "float32", "device": device},
        data=[{"question": f"say {i} {TEXTS[i % 5]}", "answer": f"yes {TEXTS[i % 5]}"} for i in range(40)],
        training_config={"learning_rate": 2e-2, "num_train_epochs": 3, "save_steps": 3},
        peft_config={"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, **peft_config},
        evaluation={"max_answers": 2, "max_new_tokens": 4},
        output=output,
        resume=resume,
        display=QUIET,
    )


class _StopAt(GentleStop):
    """Ctrl-C at a given step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            self.signal = 2
        super().on_step_end(args, state, control)


# Equal to the bit, which kernels on a GPU do not promise, so on the processor only.
# Ranks whose scalings differ by no power of two are the ones that rounding could tell apart.
@pytest.mark.parametrize("peft_config", [{}, {"rank_pattern": {"q_proj": 6}}])
def test_a_resumed_run_is_the_uninterrupted_one(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peft_config: dict[str, Any]
) -> None:
    run_it(model_folder, tmp_path / "whole", **peft_config)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "GentleStop", _StopAt)
        with pytest.raises(KeyboardInterrupt):
            run_it(model_folder, tmp_path / "halted", **peft_config)
    run_it(model_folder, tmp_path / "halted", resume=True, **peft_config)
    for which in ("best", "last"):
        file = f"adapter/{which}/adapter_model.safetensors"
        whole, resumed = (load_file(tmp_path / name / file) for name in ("whole", "halted"))
        assert any(weight.any() for name, weight in whole.items() if "lora_B" in name)
        assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory, device: str) -> Any:
    return run_it(model_folder, tmp_path_factory.mktemp("runs") / "run", device=device)


def test_proving_again_gives_the_same_figures(finished: Any) -> None:
    before, after = finished.report.to_json(), evaluate_run(finished.folder, display=QUIET).to_json()
    assert after["tuned"]["loss"] == pytest.approx(before["tuned"]["loss"], rel=1e-5)
    assert before["tuned"]["loss"] < before["base"]["loss"]


def test_the_adapter_goes_to_loralib_and_back_bit_for_bit(
    finished: Any, model_folder: Path, tmp_path: Path
) -> None:
    adapter, file = finished.folder / "adapter" / "best", tmp_path / "adapter.pt"
    convert(adapter, to="loralib", output=file)
    loralib = torch.load(file, weights_only=True)
    assert tuple(loralib["model.layers.0.self_attn.qkv_proj.lora_B"].shape) == (64 + 32, 4)
    back = tmp_path / "back"
    convert(file, to="peft", output=back, lora_alpha=8, enable=["q", "v"], model=str(model_folder))
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, back))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    facts = json.loads((back / "phlora.json").read_text(encoding="utf-8"))
    assert {tuple(entry["enabled"]) for entry in facts["blocks"].values()} == {("q_proj", "v_proj")}
    split = fuse_lora(split_adapter(load_adapter(tiny_phi3()[0], back).model, back))
    assert any("weight_v_proj" in name for name, _ in split.named_parameters())


def test_the_run_merges_with_proof(finished: Any, tmp_path: Path) -> None:
    report = merge_run(finished.folder, output=tmp_path / "merged", display=QUIET)
    assert report.to_json()
    assert (tmp_path / "merged" / "config.json").is_file()
