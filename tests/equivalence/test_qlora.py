"""Training on a quantised base is training on its dequantised weights, from one product to a whole run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from phlora import evaluate_run, finetune
from phlora.adapters.attach import attach
from phlora.adapters.load import load_adapter
from phlora.adapters.peft_layer import fuse_lora
from phlora.config import QuantizationConfig
from phlora.data.collate import Collator
from phlora.data.rows import Origin
from phlora.data.tokenize import TokenizedRow
from phlora.display import Display
from phlora.errors import ModelError, RunError
from phlora.evaluate.compare import score_loss
from phlora.lora import functional, fused, row_blocks
from phlora.models.generate import generate
from phlora.models.load import load_model
from phlora.models.operands import frozen_weight
from phlora.models.quantization import dequantize, quantize
from phlora.testing import tiny_phi3

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
STORAGES = ("nf4", "int8")
# Sums of at most 112 products in fp32, in another order.
ROUNDING = dict(rtol=1e-5, atol=1e-5)


def quantized_tiny(storage: str) -> nn.Module:
    model, _ = tiny_phi3()
    quantize(model, QuantizationConfig(type=storage), device=CPU)
    return model


# --------------------------------------------------------------------------------------------- fused functions


def adapted_layer(storage: str, dtype: torch.dtype) -> tuple[Any, list[Tensor], dict[str, Any]]:
    """A quantised q|k|v weight as an operand, leaves x, A, B_q, B_v, and the arguments of `lora_blocks`."""
    operand = frozen_weight(quantized_tiny(storage).model.layers[0].self_attn.qkv_proj)
    blocks = row_blocks({"q": 64, "k": 32, "v": 32}, ["q", "v"], r={"q": 4, "v": 2}, scaling=0.5)
    torch.manual_seed(0)
    shapes = ((2, 5, 64), (6, 64), (64, 4), (32, 2))
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return operand, leaves, {"blocks": blocks, "bias": torch.randn(128, dtype=dtype)}


@pytest.mark.parametrize("storage", STORAGES)
def test_fused_functions_equal_the_reference_on_the_dequantised_weight(storage: str) -> None:
    operand, (x, A, *B), arguments = adapted_layer(storage, torch.float32)
    results = []
    for module, weight in ((fused, operand), (functional, operand.dense(torch.float32))):
        y = module.lora_blocks(x, weight, A, B, **arguments)
        results.append([y, *torch.autograd.grad(y.sin().sum(), (x, A, *B))])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, **ROUNDING)


@pytest.mark.parametrize("storage", STORAGES)
def test_fused_gradients_are_those_of_finite_differences(storage: str) -> None:
    operand, leaves, arguments = adapted_layer(storage, torch.float64)

    def run(x: Tensor, A: Tensor, *B: Tensor) -> Tensor:
        return fused.lora_blocks(x, operand, A, B, **arguments)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("storage", STORAGES)
def test_fused_functions_keep_no_dense_weight(storage: str) -> None:
    operand, (x, A, *B), arguments = adapted_layer(storage, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused.lora_blocks(x, operand, A, B, **arguments)
    assert kept and not any(tensor.numel() == 128 * 64 for tensor in kept)


# --------------------------------------------------------------------------------------------------- the model


def adapted_model(base: nn.Module) -> PeftModel:
    torch.manual_seed(0)
    model = fuse_lora(attach(base, {"r": 4, "init_lora_weights": False}).model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    return model


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("storage", STORAGES)
def test_base_and_adapter_equal_the_dense_model_with_dequantised_weights(
    storage: str, training: bool
) -> None:
    ours = adapted_model(quantized_tiny(storage)).train(training)
    dense = dequantize(copy.deepcopy(ours))
    ids = torch.arange(3, 43).view(2, 20)
    logits, gradients = [], []
    for model in (ours, dense):
        result = model(input_ids=ids, labels=ids)
        result.loss.backward()
        logits.append(result.logits)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*logits, **ROUNDING)
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, **ROUNDING)


@pytest.mark.parametrize("storage", STORAGES)
def test_loss_and_answers_are_those_of_the_dense_model_with_dequantised_weights(storage: str) -> None:
    ours = quantized_tiny(storage)
    dense = dequantize(copy.deepcopy(ours))
    prompts = [list(range(5, 15)), list(range(40, 47))]
    answers = [
        generate(m, prompts, max_new_tokens=6, stop_token_ids=[0], pad_token_id=0) for m in (ours, dense)
    ]
    assert answers[0] == answers[1] and all(answers[0])
    losses = [loss_of(model, token_rows()) for model in (ours, dense)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def token_rows() -> list[TokenizedRow]:
    ids = [list(range(5 + i, 25 + i)) for i in range(3)]
    return [
        TokenizedRow(
            input_ids=row,
            labels=[-100, -100, *row[2:]],
            weights=[0.0, 0.0, *[1.0] * 18],
            origin=Origin(file="rows", line=number),
        )
        for number, row in enumerate(ids)
    ]


def loss_of(model: nn.Module, rows: list[TokenizedRow]) -> float:
    return score_loss(model, rows, collate=Collator(0), batch_size=3).loss


# -------------------------------------------------------------------------------------------------- whole runs

TEXTS = ["salam دنیا", "namaste नमस्ते", "zdravo свете", "merhaba dünya", "xin chào"]


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    chats = [
        [
            {"role": "user", "content": f"say {i} {TEXTS[i % 5]}"},
            {"role": "assistant", "content": f"yes {TEXTS[i % 5]}"},
        ]
        for i in range(40)
    ]
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run_it(model_folder: Path, chat_file: Path, output: Path, quantization: Any, **changes: Any) -> Any:
    arguments: dict[str, Any] = dict(
        model={
            "name": str(model_folder),
            "dtype": "float32",
            "device": "cpu",
            "quantization": quantization,
        },
        data=chat_file,
        training_config={"learning_rate": 2e-2, "num_train_epochs": 3, "logging_steps": 1, "save_steps": 5},
        peft_config={"r": 4},
        evaluation={"max_answers": 3, "max_new_tokens": 4},
        output=output,
        display=Display(quiet=True),
    )
    return finetune(**{**arguments, **changes})


@pytest.fixture(scope="module", params=STORAGES)
def finished(
    request: Any, model_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any]:
    output = tmp_path_factory.mktemp("runs") / request.param
    return request.param, run_it(model_folder, chat_file, output, request.param)


def test_a_run_on_a_quantised_base_learns_and_is_proven_again(finished: tuple[str, Any]) -> None:
    _, run = finished
    before = run.report.to_json()
    assert before["tuned"]["loss"] < 0.7 * before["base"]["loss"]
    after = evaluate_run(run.folder, display=Display(quiet=True)).to_json()
    for side in ("base", "tuned"):
        assert after[side]["loss"] == pytest.approx(before[side]["loss"], rel=1e-5)
        assert after[side]["exact_match"] == before[side]["exact_match"]


def test_the_adapter_trains_in_fp32(finished: tuple[str, Any]) -> None:
    """TRL casts the adapter of a base that says `is_loaded_in_4bit` to bfloat16, and its updates vanish there."""
    _, run = finished
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
    for weight in load_file(run.folder / "adapter" / "last" / "adapter_model.safetensors").values():
        assert weight.dtype == torch.float32
        assert (weight != weight.bfloat16().float()).float().mean() > 0.9


def test_updates_smaller_than_bfloat16_arrive(model_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-6, "max_steps": 4, "lr_scheduler_type": "constant"}
    untrained = run_it(model_folder, chat_file, tmp_path / "a", "nf4", dry_run=True).model
    trained = run_it(model_folder, chat_file, tmp_path / "b", "nf4", training_config=settings).model
    for (name, before), after in zip(untrained.named_parameters(), trained.parameters(), strict=True):
        if "lora_A" in name:
            assert (before != after).float().mean() > 0.9
            assert (before.bfloat16() == after.bfloat16()).float().mean() > 0.9


def test_no_saved_file_holds_quantised_weights(finished: tuple[str, Any]) -> None:
    _, run = finished
    files = list(run.folder.rglob("*.safetensors"))
    assert {"best", "last"} <= {file.parent.name for file in files}
    assert any("checkpoint-" in str(file) for file in files)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            assert all("lora_" in name for name in tensors.keys())
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float32}


def test_resuming_in_another_form_of_the_base_is_refused(
    finished: tuple[str, Any], model_folder: Path, chat_file: Path
) -> None:
    storage, run = finished
    # One that names no form goes on with that of the run.
    for other in set(STORAGES) - {storage}:
        with pytest.raises(RunError, match="quantization|base model"):
            run_it(model_folder, chat_file, run.folder, other, resume=True)


def test_an_adapter_of_nf4_can_be_measured_in_both_bases_that_it_may_be_merged_into(
    finished: tuple[str, Any], model_folder: Path
) -> None:
    storage, run = finished
    adapter = run.folder / "adapter" / "best"

    def base(quantization: str | None = None) -> nn.Module:
        return load_model(model_folder, device="cpu", dtype="float32", quantization=quantization).model

    rows = token_rows()
    trained = loss_of(load_adapter(base(storage), adapter).model, rows)
    merged = {
        "dequantised": load_adapter(dequantize(base(storage)), adapter).model.merge_and_unload(),
        "original": load_adapter(base(), adapter).model.merge_and_unload(),
    }
    losses = {name: loss_of(model, rows) for name, model in merged.items()}
    assert losses["dequantised"] == pytest.approx(trained, rel=1e-5)
    assert losses["original"] != pytest.approx(trained, rel=1e-5)


def test_an_adapter_is_never_merged_into_quantised_weights(finished: tuple[str, Any]) -> None:
    _, run = finished
    layer = run.model.base_model.model.model.layers[0].mlp.down_proj
    before = layer.get_base_layer().weight.data.clone()
    with pytest.raises(ModelError, match="quantised weight"):
        copy.deepcopy(run.model).merge_and_unload()
    assert torch.equal(layer.get_base_layer().weight.data, before)
