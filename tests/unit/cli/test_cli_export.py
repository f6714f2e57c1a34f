"""`phlora convert` and `phlora merge`: options, results, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import CommandLine
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from phlora.testing import chat_rows, tiny_adapter, write_rows


@pytest.fixture
def loralib_file(tmp_path: Path) -> Path:
    """q and v of one fused weight of 64, 32 and 32 rows, and a plain layer."""
    torch.manual_seed(0)
    state = {
        "model.layers.0.self_attn.qkv_proj.lora_A": torch.randn(4, 64),
        "model.layers.0.self_attn.qkv_proj.lora_B": torch.randn(96, 2),
        "model.layers.0.self_attn.o_proj.lora_A": torch.randn(2, 64),
        "model.layers.0.self_attn.o_proj.lora_B": torch.randn(64, 2),
    }
    torch.save(state, tmp_path / "in.pt")
    return tmp_path / "in.pt"


def test_there_and_back_on_the_command_line(phlora: CommandLine, loralib_file: Path, tmp_path: Path) -> None:
    peft, back = tmp_path / "peft", tmp_path / "back.pt"
    options = ["--lora-alpha", "8", "--enable", "q,v", "--blocks", "qkv_proj=64,32,32"]
    done = phlora("convert", loralib_file, "--to", "peft", "-o", peft, *options)
    assert done.code == 0 and "4 tensors converted to peft" in done.out
    done = phlora("convert", peft, "--to", "loralib", "-o", back, "--json")
    assert done.json["num_tensors"] == 4 and done.json["output"] == str(back)
    assert any("enable_lora=[True, False, True]" in line for line in done.json["layers"])
    before, after = (torch.load(file, weights_only=True) for file in (loralib_file, back))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_convolutions_go_there_and_back_with_their_kernel_named(phlora: CommandLine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"conv1.lora_A": torch.randn(6, 12), "conv1.lora_B": torch.randn(24, 6)}
    torch.save(state, tmp_path / "in.pt")
    peft, back = tmp_path / "peft", tmp_path / "back.pt"
    options = ["--lora-alpha", "8", "--kernel", "conv1=3,3"]
    assert phlora("convert", tmp_path / "in.pt", "--to", "peft", "-o", peft, *options).code == 0
    assert phlora("convert", peft, "--to", "loralib", "-o", back).code == 0
    after = torch.load(back, weights_only=True)
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
    refused = phlora("convert", peft, "--to", "loralib", "-o", tmp_path / "new.pt", "--kernel", "conv1=3,3")
    assert refused.code == 2 and "leave it out" in refused.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "peft"], "--lora-alpha"),
        (["--to", "peft", "--lora-alpha", "8", "--kernel", "o_proj=3,x"], "such as conv1=3,3"),
        (["--to", "merged", "--lora-alpha", "8", "--kernel", "o_proj=3,3"], "--kernel is for --to peft"),
        (["--to", "peft", "--lora-alpha", "8"], "no 2 equal blocks|several choices"),
        (["--to", "peft", "--lora-alpha", "8", "--blocks", "qkv_proj=64"], "--blocks"),
        (["--to", "peft", "--lora-alpha", "8", "--rows", "x.jsonl"], "--to merged"),
        (
            ["--to", "peft", "--lora-alpha", "8", "--base", "full"],
            "--base, --dtype, --rows, --format and --columns are for",
        ),
        (["--to", "merged", "--lora-alpha", "8"], "--model BASE"),
        (["--to", "gguf"], "gguf"),
    ],
)
def test_a_mistake_is_exit_code_2_and_writes_nothing(
    phlora: CommandLine, loralib_file: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = phlora("convert", loralib_file, "-o", tmp_path / "out", *options)
    assert done.code == 2
    assert any(part in done.err for part in message.split("|"))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- merging


def test_merge_writes_a_model_and_proves_it(phlora: CommandLine, trained: Path) -> None:
    done = phlora("merge", "runs/file", "-o", "merged")
    assert done.code == 0, done.err
    assert "modules merged into base, saved in float32" in done.out
    assert "changed greedy tokens   0" in done.out
    assert AutoModelForCausalLM.from_pretrained("merged").dtype == torch.float32
    again = phlora("merge", "runs/file", "-o", "merged")
    assert again.code == 2 and "merged" in again.err


def test_merge_takes_base_dtype_rows_and_device(phlora: CommandLine, trained: Path) -> None:
    write_rows(trained / "r.jsonl", chat_rows(7))
    (trained / "other").symlink_to(trained / "base")
    options = ["--model", "other", "--dtype", "bfloat16", "--rows", "r.jsonl", "--max-rows", 5]
    options += ["--device", "cpu", "--base", "full", "--offline", "--quiet"]
    done = phlora("merge", "runs/file/adapter/last", "-o", "merged", *options, "--json")
    assert done.code == 0 and done.err == ""
    report = done.json
    assert (report["dtype"], report["num_rows"], report["base_model"]) == ("bfloat16", 5, "other")
    assert AutoModelForCausalLM.from_pretrained("merged", dtype="auto").dtype == torch.bfloat16


def test_convert_merges_as_merge_does(phlora: CommandLine, trained: Path) -> None:
    merged = phlora("merge", "runs/file", "-o", "merged", "--dtype", "float16", "--json").json
    options = ["--to", "merged", "--dtype", "float16", "--base", "full", "--rows", "heldout.jsonl"]
    converted = phlora("convert", "runs/file", "-o", "converted", *options, "--json").json
    assert converted["largest_difference"] == merged["largest_difference"]
    before, after = (load_file(f"{folder}/model.safetensors") for folder in ("merged", "converted"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_of_a_quantised_base_is_merged_into_either(phlora: CommandLine, place: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert phlora("train", "run.yaml", "--quantization", "nf4", "--quiet").code == 0
    reports = {
        base: phlora("merge", "runs/file", "-o", base, "--base", base, "--json").json
        for base in ("full", "dequantized", "auto")
    }
    assert reports["full"]["storage"] == "nf4" and reports["dequantized"]["base"] == "dequantized"
    assert reports["auto"]["base"] == min(("full", "dequantized"), key=reports["auto"]["losses"].get)


@pytest.mark.parametrize("command", [["merge"], ["convert", "--to", "merged"]])
def test_a_base_that_there_is_not_is_exit_code_2(phlora: CommandLine, command: list[str]) -> None:
    done = phlora(*command, "runs/a", "-o", "out", "--base", "quantised")
    assert done.code == 2 and "dequantized" in done.err


def test_a_refused_merge_is_exit_code_1_and_leaves_nothing(
    phlora: CommandLine, place: Path, model_folder: Path
) -> None:
    """Deltas ten times the size of the weights: sixteen bits cannot hold the sum."""
    file = tiny_adapter(model_folder, place / "adapter") / "adapter_model.safetensors"
    save_file({name: 10 * tensor for name, tensor in load_file(file).items()}, file)
    options = ["--model", "base", "--rows", "heldout.jsonl", "--dtype", "bfloat16"]
    done = phlora("merge", "adapter", "-o", "merged", *options, "--json")
    assert done.code == 1 and done.json["error"]["kind"] == "Finding"
    assert "--dtype float32" in done.json["error"]["fix"]
    assert not (place / "merged").exists()


def test_a_missing_source_is_exit_code_2(phlora: CommandLine, tmp_path: Path) -> None:
    done = phlora("merge", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert done.code == 2 and "does not exist" in done.err
