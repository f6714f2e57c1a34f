"""A run and an adapter of the tiny model; read them, do not write into them."""

from __future__ import annotations

from pathlib import Path

import pytest

from phlora.display import Display
from phlora.testing import chat_rows, tiny_adapter
from phlora.train.finetune import finetune

ROWS = chat_rows(20)
QUIET = Display(quiet=True)


@pytest.fixture(scope="session")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, trained for two steps."""
    done = finetune(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu"},
        data=ROWS[:14],
        eval_data=ROWS[14:],
        training_config={"max_steps": 2, "learning_rate": 2e-2},
        peft_config={"r": 4},
        evaluation={"enabled": False},
        output=tmp_path_factory.mktemp("runs") / "run",
        display=QUIET,
    )
    assert done.folder is not None
    return done.folder


@pytest.fixture
def adapter(model_folder: Path, tmp_path: Path) -> Path:
    """A bare PEFT adapter, as another tool would have written it."""
    return tiny_adapter(model_folder, tmp_path / "adapter")
