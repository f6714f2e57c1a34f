"""DoRA on whole weights and on row blocks, from a run to stock PEFT and to a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from phlora import finetune, merge_run
from phlora.adapters.load import load_adapter
from phlora.display import Display
from phlora.models.load import load_model
from phlora.models.operands import frozen_weight, is_quantized
from phlora.train import loop
from phlora.train.callbacks import GentleStop

TEXTS = ["salam دنیا", "namaste नमस्ते", "zdravo свете", "merhaba dünya", "xin chào"]
ROWS = [{"question": f"say {i}", "answer": f"{TEXTS[i % 5]} {i}"} for i in range(20)]
IDS = torch.arange(3, 43).view(2, 20)


def run_it(model_folder: Path, output: Path, *, resume: bool = False, **peft_config: Any) -> Path:
    """A few steps, with the model's usual dictionary."""
    done = finetune(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu"} | peft_config.pop("model", {}),
        data=ROWS[:14],
        eval_data=ROWS[14:],
        training_config={"max_steps": 6, "learning_rate": 2e-2, "per_device_train_batch_size": 4},
        peft_config={"r": 4, "use_dora": True, **peft_config},
        evaluation={"max_answers": 0},
        output=output,
        resume=resume,
        display=Display(quiet=True),
    )
    assert done.folder is not None and done.report is not None
    losses = done.report.to_json()
    assert losses["tuned"]["loss"] < losses["base"]["loss"]
    return done.folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_it(
        model_folder,
        tmp_path_factory.mktemp("runs") / "dora",
        target_modules="all-linear",
        loraplus_lr_ratio=2,
    )


def test_a_trained_dora_adapter_is_stock_pefts(run: Path, model_folder: Path) -> None:
    tensors = load_file(run / "adapter" / "best" / "adapter_model.safetensors")
    lengths = {name: tensor for name, tensor in tensors.items() if "lora_magnitude_vector" in name}
    weights = load_file(model_folder / "model.safetensors")
    assert len(lengths) == 8
    for name, length in lengths.items():
        weight = weights[
            name.removeprefix("base_model.model.").removesuffix("lora_magnitude_vector") + "weight"
        ]
        assert length.shape == (weight.shape[0],)
        assert (length - weight.norm(dim=1)).abs().max() > 1e-3, f"{name} was not trained"

    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder), run / "adapter" / "best"
    )
    loaded = load_model(model_folder, dtype="float32", device="cpu")
    ours = load_adapter(loaded.model, run / "adapter" / "best").model
    torch.testing.assert_close(logits(ours), logits(stock), rtol=0, atol=0)
    with ours.disable_adapter():
        assert (logits(ours) - logits(stock)).abs().max() > 1e-2


def test_a_merged_dora_adapter_has_the_logits_of_the_adapter(
    run: Path, model_folder: Path, tmp_path: Path
) -> None:
    report = merge_run(run, tmp_path / "model", display=Display(quiet=True))
    assert report.changed_tokens == 0 and report.largest_difference < 1e-5 * report.largest_logit
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder), run / "adapter" / "best"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(merged), logits(stock), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_dora_on_a_quantised_base_merges_into_the_dequantised_one(
    storage: str, model_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    # PEFT takes the lengths from bitsandbytes, whose CPU kernel misreads rows that are no multiple of 64 long in NF4:
    # those of this model's down_proj.
    targets = ["qkv_proj", "o_proj", "gate_up_proj"]
    run = run_it(model_folder, tmp_path / "run", model={"quantization": storage}, target_modules=targets)
    report = merge_run(run, tmp_path / "model", base="dequantized", display=Display(quiet=True))
    assert report.losses["dequantized"] == pytest.approx(report.losses["adapter"], rel=1e-5)
    assert report.largest_difference < 1e-5 * report.largest_logit


@pytest.mark.parametrize("storage", [None, "nf4", "int8"])
def test_dora_on_row_blocks_from_a_run_to_a_merged_model(
    storage: str | None, model_folder: Path, tmp_path: Path
) -> None:
    if storage:
        pytest.importorskip("bitsandbytes")
    run = run_it(
        model_folder,
        tmp_path / "run",
        model={"quantization": storage},
        target_modules=["q_proj", "v_proj", "up_proj"],
        loraplus_lr_ratio=2,
    )
    tensors = load_file(run / "adapter" / "best" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.qkv_proj"
    length = tensors[f"base_model.model.{name}.lora_magnitude_vector"]
    loaded = load_model(model_folder, dtype="float32", device="cpu", quantization=storage)
    base = dense(loaded.model.get_submodule(name))
    moved = (length - base.norm(dim=1)).abs() > 1e-5
    assert moved[:64].any() and not moved[64:96].any() and moved[96:].any()

    ours = load_adapter(loaded.model, run / "adapter" / "best").model
    report = merge_run(
        run, tmp_path / "model", base="dequantized" if storage else "full", display=Display(quiet=True)
    )
    assert report.changed_tokens == 0 and report.largest_difference < 1e-5 * report.largest_logit
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(merged), logits(ours), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.get_submodule(name).weight[64:96], base[64:96])
    if not storage:
        stock = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model_folder), run / "adapter" / "best"
        )
        torch.testing.assert_close(logits(merged), logits(stock), rtol=1e-4, atol=1e-5)


def dense(layer: Any) -> Tensor:
    return frozen_weight(layer).dense(torch.float32) if is_quantized(layer) else layer.weight


class _StopAtThree(GentleStop):
    """Ctrl-C."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            self.signal = 2
        super().on_step_end(args, state, control)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"v_proj": 3}, "lora_dropout": 0.1},
        {"use_dora": False, "init_lora_weights": "pissa_niter_2"},
    ],
)
def test_row_blocks_interrupted_and_resumed_equal_uninterrupted(
    fields: dict[str, Any], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"target_modules": ["q_proj", "v_proj", "o_proj"], **fields}
    whole = run_it(model_folder, tmp_path / "whole", **fields)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "GentleStop", _StopAtThree)
        with pytest.raises(KeyboardInterrupt):
            run_it(model_folder, tmp_path / "cut", **fields)
    cut = run_it(model_folder, tmp_path / "cut", resume=True, **fields)
    one, other = (load_file(run / "adapter" / "last" / "adapter_model.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
