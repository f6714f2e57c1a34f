"""Phlora: fine-tune Phi-3-class chat models with LoRA, and prove that it helped.

The public names are loaded when they are first used: `import phlora` and `phlora --help` stay instant. What is not
named here may move between versions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that defines it.
_DEFINED_IN = {
    # train, prove, use
    "finetune": "phlora.train.finetune",
    "Run": "phlora.train.finetune",
    "load": "phlora.serve.llm",
    "LLM": "phlora.serve.llm",
    "evaluate_run": "phlora.evaluate.run",
    "evaluate_model": "phlora.evaluate.in_memory",
    "merge_run": "phlora.export.merge",
    "convert": "phlora.export.convert",
    "export_run": "phlora.export.run",
    "SFTTrainer": "phlora.dropin.trainer",
    "SFTConfig": "phlora.dropin.config",
    "TrainingArguments": "phlora.dropin.config",
    "get_peft_model": "phlora.dropin.targets",
    # models and adapters
    "load_model": "phlora.models.load",
    "load_tokenizer": "phlora.models.tokenizer",
    "load_adapter": "phlora.adapters.load",
    "embedded_folder": "phlora.models.builtin",
    "dequantize": "phlora.models.quantization",
    "attach": "phlora.adapters.attach",
    "speed_up": "phlora.adapters.speed",
    "at_speed": "phlora.adapters.speed",
    # rows and batches
    "check": "phlora.data.checks",
    "preview": "phlora.data.checks",
    "load_rows": "phlora.data.dataset",
    "standardize_sharegpt": "phlora.data.sharegpt",
    "tokenize_rows": "phlora.data.tokenize",
    "Collator": "phlora.data.collate",
    "PackedCollator": "phlora.data.collate",
    "SharedPrefixCollator": "phlora.data.collate",
    "longrope_limit": "phlora.models.families",
    "score_loss": "phlora.evaluate.compare",
    "load_metric": "phlora.evaluate.named",
    "Report": "phlora.evaluate.report",
    # configuration
    "load_config": "phlora.config",
    "RunConfig": "phlora.config",
    "ModelConfig": "phlora.config",
    "QuantizationConfig": "phlora.config",
    "DataConfig": "phlora.config",
    "DataFile": "phlora.config",
    "EvaluationConfig": "phlora.config",
    # errors
    "PhloraError": "phlora.errors",
    "InputError": "phlora.errors",
    "ConfigError": "phlora.errors",
    "DataError": "phlora.errors",
    "ModelError": "phlora.errors",
    "RunError": "phlora.errors",
    "EnvironmentProblem": "phlora.errors",
    "MissingExtraError": "phlora.errors",
    "NoRoomError": "phlora.errors",
    "NetworkError": "phlora.errors",
    "Finding": "phlora.errors",
    "NonFiniteError": "phlora.errors",
}

if TYPE_CHECKING:
    from phlora.adapters.attach import attach as attach
    from phlora.adapters.load import load_adapter as load_adapter
    from phlora.adapters.speed import at_speed as at_speed
    from phlora.adapters.speed import speed_up as speed_up
    from phlora.config import DataConfig as DataConfig
    from phlora.config import DataFile as DataFile
    from phlora.config import EvaluationConfig as EvaluationConfig
    from phlora.config import ModelConfig as ModelConfig
    from phlora.config import QuantizationConfig as QuantizationConfig
    from phlora.config import RunConfig as RunConfig
    from phlora.config import load_config as load_config
    from phlora.data.checks import check as check
    from phlora.data.checks import preview as preview
    from phlora.data.collate import Collator as Collator
    from phlora.data.collate import PackedCollator as PackedCollator
    from phlora.data.collate import SharedPrefixCollator as SharedPrefixCollator
    from phlora.data.dataset import load_rows as load_rows
    from phlora.data.sharegpt import standardize_sharegpt as standardize_sharegpt
    from phlora.data.tokenize import tokenize_rows as tokenize_rows
    from phlora.dropin.config import SFTConfig as SFTConfig
    from phlora.dropin.config import TrainingArguments as TrainingArguments
    from phlora.dropin.targets import get_peft_model as get_peft_model
    from phlora.dropin.trainer import SFTTrainer as SFTTrainer
    from phlora.errors import ConfigError as ConfigError
    from phlora.errors import DataError as DataError
    from phlora.errors import EnvironmentProblem as EnvironmentProblem
    from phlora.errors import Finding as Finding
    from phlora.errors import InputError as InputError
    from phlora.errors import MissingExtraError as MissingExtraError
    from phlora.errors import ModelError as ModelError
    from phlora.errors import NetworkError as NetworkError
    from phlora.errors import NonFiniteError as NonFiniteError
    from phlora.errors import NoRoomError as NoRoomError
    from phlora.errors import PhloraError as PhloraError
    from phlora.errors import RunError as RunError
    from phlora.evaluate.compare import score_loss as score_loss
    from phlora.evaluate.in_memory import evaluate_model as evaluate_model
    from phlora.evaluate.named import load_metric as load_metric
    from phlora.evaluate.report import Report as Report
    from phlora.evaluate.run import evaluate_run as evaluate_run
    from phlora.export.convert import convert as convert
    from phlora.export.merge import merge_run as merge_run
    from phlora.export.run import export_run as export_run
    from phlora.models.builtin import embedded_folder as embedded_folder
    from phlora.models.families import longrope_limit as longrope_limit
    from phlora.models.load import load_model as load_model
    from phlora.models.quantization import dequantize as dequantize
    from phlora.models.tokenizer import load_tokenizer as load_tokenizer
    from phlora.serve.llm import LLM as LLM
    from phlora.serve.llm import load as load
    from phlora.train.finetune import Run as Run
    from phlora.train.finetune import finetune as finetune

__all__ = ["__version__", *_DEFINED_IN]


def __getattr__(name: str) -> object:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'phlora' has no attribute {name!r}")
    from phlora.others import without_known_messages, without_known_warnings

    with without_known_messages(), without_known_warnings():
        module = importlib.import_module(_DEFINED_IN[name])
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
