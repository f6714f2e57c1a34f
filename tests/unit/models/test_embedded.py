"""What the model cards of earlier adapters import is there, and no code of today leans on it."""

from __future__ import annotations

import re
from pathlib import Path

import phlora

ROOT = Path(__file__).parents[3]
CARDS_LINE = "from phlora.models.embedded import embedded_folder"


def test_the_line_of_earlier_model_cards_still_runs() -> None:
    names: dict[str, object] = {}
    exec(CARDS_LINE, names)
    assert names["embedded_folder"] is phlora.embedded_folder


def test_nothing_of_today_imports_from_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    code = [
        file for part in ("src", "benchmarks", "examples", "tests") for file in (ROOT / part).rglob("*.py")
    ]
    users = [
        str(file.relative_to(ROOT))
        for file in (*pages, *code)
        if file != Path(__file__)
        and re.search(
            r"(from|import) +phlora\.models(\.embedded\b| +import .*\bembedded\b)", file.read_text("utf-8")
        )
    ]
    assert users == []
