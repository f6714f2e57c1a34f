"""Phlora: fine-tune Phi-3-class chat models with LoRA, and prove that it helped.

The public names are loaded when they are first used: `import phlora` and `phlora --help` stay instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "finetune": "phlora.train.finetune",
    "evaluate_run": "phlora.train.proof",
    "Run": "phlora.train.finetune",
    "SFTTrainer": "phlora.train.trainer",
    "convert": "phlora.export.convert",
    "merge_run": "phlora.export.merge",
    "load_model": "phlora.models.load",
    "load_tokenizer": "phlora.models.load",
    "speed_up": "phlora.adapters.peft_layer",
    "PhloraError": "phlora.errors",
}

if TYPE_CHECKING:
    from phlora.adapters.peft_layer import speed_up
    from phlora.errors import PhloraError
    from phlora.export.convert import convert
    from phlora.export.merge import merge_run
    from phlora.models.load import load_model, load_tokenizer
    from phlora.train.finetune import Run, finetune
    from phlora.train.proof import evaluate_run
    from phlora.train.trainer import SFTTrainer

__all__ = [
    "PhloraError",
    "Run",
    "SFTTrainer",
    "__version__",
    "convert",
    "evaluate_run",
    "finetune",
    "load_model",
    "load_tokenizer",
    "merge_run",
    "speed_up",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'phlora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
