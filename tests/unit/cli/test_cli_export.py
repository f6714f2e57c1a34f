"""`phlora convert` and `phlora merge`: options, results, exit codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CommandLine

from phlora.errors import Finding


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
        (["--to", "peft", "--lora-alpha", "8", "--base", "full"], "--base, --dtype and --rows are for"),
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


@dataclass
class FakeReport:
    def summary(self) -> str:
        return "8 modules merged"

    def to_json(self) -> dict[str, Any]:
        return {"changed_tokens": 0}


def test_merge_passes_its_options_on(phlora: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def merge_run(*arguments: Any, **options: Any) -> FakeReport:
        options.pop("display")
        calls.append((*arguments, options))
        return FakeReport()

    for module in ("merge", "convert"):
        monkeypatch.setattr(f"phlora.export.{module}.merge_run", merge_run)
    assert phlora("merge", "runs/a", "-o", "out").out == "8 modules merged\n"
    options = ["--model", "base", "--dtype", "bfloat16", "--rows", "r.jsonl", "--max-rows", "5", "--json"]
    done = phlora("merge", "runs/a", "-o", "out", *options, "--device", "cpu", "--base", "full")
    assert done.json == {"changed_tokens": 0}
    plain: dict[str, Any] = {"base": "auto"}
    plain |= {
        "model": None,
        "dtype": "auto",
        "rows": None,
        "max_rows": 64,
        "device": "auto",
        "offline": False,
    }
    asked = {"model": "base", "dtype": "bfloat16", "rows": ["r.jsonl"], "max_rows": 5, "device": "cpu"}
    asked["base"] = "full"
    assert calls == [("runs/a", "out", plain), ("runs/a", "out", plain | asked)]
    of_convert = {name: plain[name] for name in ("base", "model", "dtype", "rows", "offline")}
    phlora("convert", "runs/a", "--to", "merged", "-o", "out", "--dtype", "float16")
    phlora("convert", "runs/a", "--to", "merged", "-o", "out", "--base", "dequantized")
    assert calls[2] == ("runs/a", "out", of_convert | {"dtype": "float16"})
    assert calls[3] == ("runs/a", "out", of_convert | {"base": "dequantized"})


@pytest.mark.parametrize("command", [["merge"], ["convert", "--to", "merged"]])
def test_a_base_that_there_is_not_is_exit_code_2(phlora: CommandLine, command: list[str]) -> None:
    done = phlora(*command, "runs/a", "-o", "out", "--base", "quantised")
    assert done.code == 2 and "dequantized" in done.err


def test_a_refused_merge_is_exit_code_1(phlora: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge_run(*_: Any, **__: Any) -> None:
        raise Finding("The merged model does not answer like base and adapter", where="out")

    monkeypatch.setattr("phlora.export.merge.merge_run", merge_run)
    done = phlora("merge", "runs/a", "-o", "out", "--json")
    assert done.code == 1 and done.json["error"]["kind"] == "Finding"


def test_a_missing_source_is_exit_code_2(phlora: CommandLine, tmp_path: Path) -> None:
    done = phlora("merge", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert done.code == 2 and "does not exist" in done.err
