"""What the tests of merging and converting share: rows, and adapters as other tools would have written them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from phlora.display import Display

TEXTS = ["salam دنیا", "namaste नमस्ते", "zdravo свете", "merhaba dünya", "xin chào"]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"say {i} {TEXTS[i % 5]}"},
            {"role": "assistant", "content": f"{TEXTS[i % 5]} {i}"},
        ]
    }
    for i in range(20)
]
QUIET = Display(quiet=True)


def save_adapter(base: Path, folder: Path, **config: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **config}))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(str(folder), save_embedding_layers=False)
    return folder
