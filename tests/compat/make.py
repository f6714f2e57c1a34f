"""Writes what test_compat.py reads. Run once, with the package of the version whose files are kept:

    PYTHONPATH=OLD_CHECKOUT/src python tests/compat/make.py tests/compat/stored

Never run it again for files that are there already: that they are old is what they are for. Files of a later
version go into a folder of their own beside `stored`. It may use that version's inner modules.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from phlora import convert, finetune
from phlora.adapters.load import load_adapter
from phlora.display import Display
from phlora.models.load import load_model
from phlora.testing import tiny_phi3
from phlora.train import loop
from phlora.train.callbacks import GentleStop

TEXTS = ["salam دنیا", "namaste नमस्ते", "zdravo свете", "merhaba dünya", "xin chào"]
STOP_AT = 4
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 2},
    "blocks": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"r": 2, "use_dora": True, "target_modules": ["qkv_proj", "down_proj"]},
    "blocks_dora": {"r": 2, "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
}
COMMON: dict[str, Any] = {
    "model": {"name": "base", "dtype": "float32", "device": "cpu"},
    "training_config": {
        "learning_rate": 2e-2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_steps": 3,
        "max_length": 128,
        "per_device_train_batch_size": 4,
    },
    "evaluation": {"max_answers": 3, "max_new_tokens": 4},
    "display": Display(quiet=True),
}


class _StopsItself(GentleStop):
    """Ctrl-C in the step STOP_AT."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STOP_AT:
            self.signal = 2
        super().on_step_end(args, state, control)


def write_base() -> None:
    model, tokenizer = tiny_phi3()
    # Values that 16 bits hold, so that half the bytes keep them all.
    model.to(torch.bfloat16).save_pretrained("base")
    tokenizer.save_pretrained("base")


def write_chats() -> None:
    """Chats of one and two exchanges; some begin alike, and some answer one question in several ways."""
    rows = []
    for i in range(24):
        messages = [
            {"role": "user", "content": f"say {i // 2 if i % 4 == 1 else i} {TEXTS[i % 5]}"},
            {"role": "assistant", "content": f"yes {i}"},
        ]
        if i % 3 == 0:
            messages = [{"role": "system", "content": "Be brief."}, *messages]
            messages += [{"role": "user", "content": "again"}, {"role": "assistant", "content": f"yes {i}!"}]
        rows.append({"messages": messages})
    for name, part in (("chats", rows[:20]), ("heldout", rows[20:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        Path(f"{name}.jsonl").write_text(text, encoding="utf-8")


def interrupted(**arguments: Any) -> None:
    kept, loop.GentleStop = loop.GentleStop, _StopsItself
    try:
        with contextlib.suppress(KeyboardInterrupt):
            finetune(**arguments)
    finally:
        loop.GentleStop = kept


def write_runs() -> None:
    for name, peft_config in ADAPTERS.items():
        run = finetune(
            **COMMON, peft_config=peft_config, data="chats.jsonl", eval_data="heldout.jsonl", output=name
        )
        assert run.folder is not None
        shutil.copytree(run.folder / "adapter" / "best", Path("adapters") / name)
    Path("plain").rename("finished")
    for name in ("blocks", "dora", "blocks_dora"):
        shutil.rmtree(name)
    lora = {"r": 2, "lora_dropout": 0.1, "target_modules": "all-linear"}
    for suffix, rows in (("", {"eval_data": "heldout.jsonl"}), ("_split", {})):
        whole, stopped = f"uninterrupted{suffix}", f"interrupted{suffix}"
        arguments = {**COMMON, **rows, "peft_config": lora, "data": "chats.jsonl"}
        finetune(**arguments, output=whole)
        for which in ("best", "last"):
            file = Path(whole) / "adapter" / which / "adapter_model.safetensors"
            shutil.copy(file, f"{whole}_{which}.safetensors")
        shutil.rmtree(whole)
        interrupted(**arguments, output=stopped)


def write_logits() -> None:
    """Of the base alone and under every adapter, for one fixed row of ids."""
    ids = torch.arange(3, 43)[None]
    found = {"ids": ids}
    for name in ("base", *ADAPTERS):
        model: Any = load_model("base", dtype="float32", device="cpu").model
        if name != "base":
            model = load_adapter(model, Path("adapters") / name).model.eval()
        with torch.no_grad():
            found[name] = model(ids).logits[0, -8:].clone()
    save_file(found, "logits.safetensors")


def drop_what_no_test_reads() -> None:
    """Tokenizers that stand in `base` already, and drawings."""
    for folder in [*Path("adapters").iterdir(), *Path("finished", "adapter").iterdir()]:
        if folder.name not in ("plain", "best"):
            (folder / "tokenizer.json").unlink()
            (folder / "tokenizer_config.json").unlink()
    shutil.rmtree(Path("finished", "checkpoints"))
    Path("finished", "report.html").unlink()


def main() -> None:
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    os.chdir(target)
    write_base()
    write_chats()
    write_runs()
    for name in ("plain", "blocks"):
        convert(Path("adapters") / name, f"{name}.pt", to="loralib")
    write_logits()
    drop_what_no_test_reads()


if __name__ == "__main__":
    main()
