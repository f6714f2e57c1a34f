"""The two dictionaries of a script written for an earlier TRL, as they are, given to `finetune`."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

import phlora
from phlora.display import Display
from phlora.testing import chat_rows

SCRIPT = Path(__file__).parents[1] / "shapes" / "guide" / "sample_finetune.py"


def dictionaries() -> tuple[dict[str, Any], dict[str, Any]]:
    """`training_config` and `peft_config` of the guide's sample."""
    found = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    }
    return found["training_config"], found["peft_config"]


@pytest.mark.parametrize("kind", ["dictionaries", "objects", "packed"])
def test_they_train(kind: str, model_folder: Path, tmp_path: Path) -> None:
    training: Any
    lora: Any
    training, lora = dictionaries()
    training |= {"output_dir": str(tmp_path / "run"), "packing": kind == "packed"}
    if kind == "objects":
        training, lora = phlora.SFTConfig(**training), LoraConfig(**lora)
    said = io.StringIO()
    run = phlora.finetune(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu"},
        data=chat_rows(12),
        training_config=training,
        peft_config=lora,
        evaluation={"enabled": False},
        display=Display(said),
    )
    assert (
        run.folder == tmp_path / "run" and (run.folder / "adapter" / "best" / "adapter_config.json").is_file()
    )
    if kind == "dictionaries":
        for name in ("warmup_ratio", "overwrite_output_dir", "bf16"):
            assert f"training_config.{name}" in said.getvalue()
