"""A whole run with shared starts and the same run by the plain path."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phlora import finetune
from phlora.config import build_config
from phlora.display import Display
from phlora.testing import tiny_phi3

SYSTEM = "سلام नमस्ते zdravo merhaba xin chào: " + "answer with one word. " * 6


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-phi3")
    for part in tiny_phi3():
        part.save_pretrained(folder)
    return folder


def run(model_folder: Path, folder: Path, rows: Path, speed: str, **training: Any) -> tuple[Any, str]:
    stream = io.StringIO()
    config = {
        "model": {"name": str(model_folder), "dtype": "float32", "device": "cpu"},
        "data": str(rows),
        "training_config": {"learning_rate": 5e-3, "num_train_epochs": 3, "logging_steps": 1, **training},
        "peft_config": {"r": 4},
        "evaluation": {"max_answers": 0},
        "output": str(folder),
        "speed": speed,
    }
    return finetune(build_config(config), display=Display(stream)), stream.getvalue()


@pytest.mark.parametrize("training", [{}, {"packing": True, "max_length": 600}], ids=["rows", "packs"])
def test_sharing_is_the_same_run_in_fewer_positions(
    model_folder: Path, tmp_path: Path, training: dict[str, Any]
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [
        f'{{"messages": [{{"role": "system", "content": "{SYSTEM}"}}, {{"role": "user", "content": "word {n}"}}, '
        f'{{"role": "assistant", "content": "{"xin chào" * (1 + n % 3)}"}}]}}\n'
        for n in range(24)
    ]
    rows.write_text("".join(lines), encoding="utf-8")
    plain, told = run(model_folder, tmp_path / "plain", rows, "reference", **training)
    assert "shared prefixes off: speed is reference" in told
    shared, told = run(model_folder, tmp_path / "shared", rows, "auto", **training)
    assert "shared prefixes on" in told
    tokens, positions = (
        int(number.replace(",", ""))
        for number in re.search(r"([\d,]+) tokens computed as ([\d,]+)", told).groups()
    )
    assert positions < 0.5 * tokens
    expected = load_file(plain.folder / "adapter" / "last" / "adapter_model.safetensors")
    for name, weight in load_file(shared.folder / "adapter" / "last" / "adapter_model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=5e-5, msg=name)
    for side in ("base", "tuned"):
        ours, theirs = (run.report.to_json()[side]["loss"] for run in (shared, plain))
        assert ours == pytest.approx(theirs, rel=1e-4)
