"""Scripts and notebooks of 2024 run once `phlora migrate` has rewritten them: only models and data are exchanged.

One process runs several of them, since what they import takes longer than what they train.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from phlora.migrate.migration import migrate_text
from phlora.migrate.sources import read_source
from phlora.testing import tiny_adapter, tiny_phi3, write_rows

SHAPES = Path(__file__).parents[1] / "shapes"
GUIDE = sorted(path for path in (SHAPES / "guide").iterdir() if path.suffix in (".py", ".ipynb"))
PUBLIC = sorted((SHAPES / "public").glob("*.py"))
# Of the public shapes these run each time; all of them in `make test-all`.
QUICK = ("loralib_imports", "loralib_layers", "peft_loop", "trl_dictionaries", "trl_no_config")
NEEDS_BITSANDBYTES = ("finetune_qlora", "peft_qlora", "unsloth_nf4", "unsloth_alpaca", "finetuning_script")

RUN = """
import json, runpy, sys, traceback
for script in sys.argv[1:]:
    sys.argv, told = [script], {}
    try:
        space = runpy.run_path(script, run_name="__main__")
        trainer = space.get("trainer")
        if hasattr(trainer, "state"):
            told["kind"] = type(trainer).__module__
            told["steps"] = trainer.state.global_step
            told["loss"] = trainer.state.log_history[-1].get("train_loss") or next(
                entry["train_loss"] for entry in trainer.state.log_history[::-1] if "train_loss" in entry
            )
            told["text"] = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    except BaseException:
        told["error"] = traceback.format_exc()
    print("TOLD", json.dumps({"script": script, **told}), flush=True)
"""


def texts(number: int) -> dict[str, Any]:
    return {"text": f"Question: how many? Answer: {number}"}


def instructions(number: int) -> dict[str, Any]:
    return {"instruction": f"Add {number}", "input": "", "output": f"x + {number}"}


def shop(number: int) -> dict[str, Any]:
    turns = [("human", f"Where is order {number}?"), ("gpt", f"Order {number} is on its way.")]
    return {"conversations": [{"from": who, "value": said} for who, said in turns]}


def chats(number: int) -> dict[str, Any]:
    turns = [("user", f"Say {number}"), ("assistant", f"{number}")]
    return {"prompt": turns[0][1], "messages": [{"role": who, "content": said} for who, said in turns]}


DATA: dict[str, tuple[Callable[[int], dict[str, Any]], dict[str, int]]] = {
    "example/texts": (texts, {"train": 12, "test": 4}),
    "example/python-instructions": (instructions, {"train": 16}),
    "example/sharegpt-shop": (shop, {"train": 16}),
    "HuggingFaceH4/ultrachat_200k": (chats, {"train_sft": 16, "test_sft": 8}),
}


def run_migrated(shapes: list[Path], folder: Path) -> dict[str, dict[str, Any]]:
    """What each shape did after the migration, by its name."""
    model, tokenizer = tiny_phi3()
    tokenizer.unk_token = "<unk>"
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    tiny_adapter(folder / "model", folder / "adapter")
    in_place = {
        "microsoft/Phi-3-mini-4k-instruct": "model",
        "unsloth/Phi-3-mini-4k-instruct": "model",
        "example/adapter": "adapter",
    }
    for name, (make, splits) in DATA.items():
        in_place[name] = name.rpartition("/")[2]
        for split, count in splits.items():
            (folder / in_place[name] / "data").mkdir(parents=True, exist_ok=True)
            file = folder / in_place[name] / "data" / f"{split}-00000-of-00001.jsonl"
            write_rows(file, [make(number) for number in range(count)])
    scripts = []
    for shape in shapes:
        text = without_magics(migrate_text(read_source(shape).text).text)
        for name, local in in_place.items():
            text = text.replace(f'"{name}"', repr(str(folder / local)))
        # What is written to a place of the machine's is written here.
        text = text.replace('"/tmp/', '"')
        script = folder / f"{shape.stem}.py"
        script.write_text(text, encoding="utf-8")
        scripts.append(script)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, scripts)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    told = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    assert len(told) == len(shapes), done.stderr[-3000:]
    return {Path(entry["script"]).stem: entry for entry in told}


def without_magics(text: str) -> str:
    """A notebook's cells without what IPython alone does."""
    return re.sub(r"^.*_phlora_(?:cell|line)_\d+_.*$", "", text, flags=re.MULTILINE)


def can_run(shape: Path) -> bool:
    return shape.stem not in NEEDS_BITSANDBYTES or find_spec("bitsandbytes") is not None


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("guide")
    return folder, run_migrated([shape for shape in GUIDE if can_run(shape)], folder)


@pytest.mark.parametrize("shape", GUIDE, ids=lambda shape: shape.name)
def test_a_sample_of_the_guide_trains_what_its_author_meant(
    shape: Path, guide: tuple[Path, dict[str, dict[str, Any]]]
) -> None:
    if not can_run(shape):
        pytest.skip("needs bitsandbytes")
    told = guide[1][shape.stem]
    assert "error" not in told, told["error"]
    assert told["kind"].startswith("phlora.")
    assert told["steps"] >= 1 and 0 < told["loss"] < 20
    # Both sides of each chat, and no swallowed turn.
    expected = {
        "finetuning_script": ("<|user|>Where is order 0?", "Order 0 is on its way.<|end|>"),
        "inference_finetuning": ("<|user|>Where is order 0?", "Order 0 is on its way.<|end|>"),
        "sample_finetune": ("<|system|>", "<|user|>Say "),
        "finetune_lora": ("<|user|>Add ", "<|assistant|>x + "),
        "finetune_qlora": ("<|user|>Add ", "<|assistant|>x + "),
    }
    for part in expected[shape.stem]:
        assert part in told["text"]


def test_the_adapters_of_the_guide_are_whole(guide: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, told = guide
    assert "error" not in told["finetune_lora"], told["finetune_lora"]["error"]
    for name in ("phi-3-python", "checkpoint_dir"):
        with safe_open(folder / name / "adapter_model.safetensors", "pt") as file:
            modules = {key.split(".lora_")[0].rpartition(".")[2] for key in file.keys()}
        assert modules == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    shapes = [shape for shape in PUBLIC if shape.stem in QUICK]
    return run_migrated(shapes, tmp_path_factory.mktemp("quick"))


@pytest.mark.parametrize("name", QUICK)
def test_a_public_shape_runs(name: str, quick: dict[str, dict[str, Any]]) -> None:
    assert "error" not in quick[name], quick[name]["error"]


@pytest.mark.slow
def test_every_public_shape_runs(tmp_path: Path) -> None:
    assert len(PUBLIC) >= 20
    told = run_migrated([shape for shape in PUBLIC if can_run(shape)], tmp_path)
    errors = {name: entry["error"][-1500:] for name, entry in told.items() if "error" in entry}
    assert not errors, "\n".join(f"{name}: {error}" for name, error in errors.items())
    texts = [entry["text"] for entry in told.values() if "text" in entry]
    assert len(texts) >= 15 and all(len(text) > 20 for text in texts)
