"""The tiny model with its tokenizer, what a script's trainer says, and a trainer as a script would make it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from script_rows import chats, new_model
from torch import nn

import phlora
from phlora.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return new_model().state_dict()


@pytest.fixture
def model(weights: dict[str, torch.Tensor]) -> nn.Module:
    made = new_model()
    made.load_state_dict(copy.deepcopy(weights))
    return made


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, "phlora.dropin")
    return lambda: "\n".join(r.getMessage() for r in caplog.records if r.name == "phlora.dropin")


@pytest.fixture
def make(model: nn.Module, tokenizer: Any, tmp_path: Path) -> Callable[..., phlora.SFTTrainer]:
    def make_trainer(
        rows: Any = None, *, settings: dict[str, Any] | None = None, **kwargs: Any
    ) -> phlora.SFTTrainer:
        given = {"max_steps": 2, "report_to": "none", "per_device_train_batch_size": 2, "max_length": 96}
        kwargs.setdefault("args", phlora.SFTConfig(str(tmp_path / "out"), **{**given, **(settings or {})}))
        kwargs.setdefault("model", model)
        kwargs.setdefault("processing_class", tokenizer)
        kwargs.setdefault("train_dataset", chats() if rows is None else rows)
        return phlora.SFTTrainer(**kwargs)

    return make_trainer
