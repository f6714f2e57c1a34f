"""examples/guide/sample_finetune.py runs, and differs from a TRL script by the import of `SFTTrainer` alone."""

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
SCRIPT = ROOT / "examples" / "guide" / "sample_finetune.py"


# One process for both scripts: what they import takes longer than what they train. TRL's comes first, untouched.
RUN = """
import runpy, sys
import torch
for script, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    torch.manual_seed(0)
    sys.argv = [script, "--model", folder + "/model", "--output", folder + "/out"]
    sys.argv += ["--train", {data!r}, "--test", {data!r}, "--max-steps", "5", "--max-answers", "3"]
    runpy.run_path(script, run_name="__main__")
""".format(data=str(ROOT / "examples" / "home_assistant" / "heldout.jsonl"))


def losses_of(tmp_path: Path, scripts: dict[str, Path]) -> list[list[float]]:
    """The losses of each script, by the name of its folder."""
    model, tokenizer = tiny_phi3()
    tokenizer.chat_template = phi3_chat_template
    command = [sys.executable, "-c", RUN]
    for name, script in scripts.items():
        model.save_pretrained(tmp_path / name / "model")
        tokenizer.save_pretrained(tmp_path / name / "model")
        command += [str(script), str(tmp_path / name)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = []
    for name in scripts:
        assert (tmp_path / name / "out" / "adapter_model.safetensors").is_file()
        state = json.loads((tmp_path / name / "out" / "trainer_state.json").read_text(encoding="utf-8"))
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    return losses


def test_the_script_trains_as_with_trl(tmp_path: Path) -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.count("from phlora import SFTTrainer") == text.count('"lora_dropout": 0.05') == 1
    # Fused layers draw masks of their own; without dropout only rounding is left.
    text = text.replace('"lora_dropout": 0.05', '"lora_dropout": 0.0')
    scripts = {"theirs": tmp_path / "theirs.py", "ours": tmp_path / "ours.py"}
    scripts["ours"].write_text(text, encoding="utf-8")
    trls = text.replace("from phlora import SFTTrainer", "from trl import SFTTrainer")
    scripts["theirs"].write_text(trls, encoding="utf-8")
    theirs, ours = losses_of(tmp_path, scripts)
    assert len(ours) == 5
    assert ours == pytest.approx(theirs, rel=1e-5)
