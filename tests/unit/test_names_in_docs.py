"""Every module and name of Phlora that the documentation gives is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, _, last = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return bool(module) and hasattr(importlib.import_module(module), last)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_names_in_the_documentation_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = {match[0] for match in re.finditer(r"\bphlora/[\w/]+\.py\b", text)}
    assert not [name for name in files if not (ROOT / "src" / name).is_file()]
    names = {match[0] for match in re.finditer(r"(?<![\w./-])phlora(?:\.\w+){2,}(?![\w/])", text)}
    assert not [name for name in names if not name.endswith((".py", ".json")) and not is_there(name)]


def test_a_name_that_is_nowhere_is_found() -> None:
    assert is_there("phlora.train.arguments.DEFAULTS") and not is_there("phlora.train.arguments.NOTHING")
