"""examples/sample_finetune.py runs, and differs from a TRL script by the import of `SFTTrainer` alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trl.chat_template_utils import phi3_chat_template

from phlora.testing import tiny_phi3

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "sample_finetune.py"


def losses_of(script: Path, folder: Path) -> list[float]:
    model, tokenizer = tiny_phi3()
    tokenizer.chat_template = phi3_chat_template
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    command = [sys.executable, str(script), "--model", str(folder / "model"), "--max-steps", "5"]
    command += [
        "--data",
        str(ROOT / "examples/home_assistant/heldout.jsonl"),
        "--output",
        str(folder / "out"),
    ]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "out" / "adapter_model.safetensors").is_file()
    state = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_the_script_trains_as_with_trl(tmp_path: Path) -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.count("from phlora import SFTTrainer") == 1
    trl_script = tmp_path / "trl_script.py"
    trl_script.write_text(
        text.replace("from phlora import SFTTrainer", "from trl import SFTTrainer"), encoding="utf-8"
    )
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    ours = losses_of(SCRIPT, tmp_path / "ours")
    assert len(ours) == 5
    # The same masks of dropout are drawn on both sides, so only rounding is left.
    assert ours == pytest.approx(losses_of(trl_script, tmp_path / "theirs"), rel=1e-4)
