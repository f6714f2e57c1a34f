"""A model folder that a test may damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from phlora import testing


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """The tiny random Phi-3 with its tokenizer; a test may write into it."""
    return testing.tiny_folder(tmp_path / "model")
