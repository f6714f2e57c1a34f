"""docs/scripts.md says what the table of names says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from phlora.names import ARGUMENTS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_tables_are_those_of_the_source() -> None:
    spec = importlib.util.spec_from_file_location("make_scripts", DOCS / "make_scripts.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "scripts.md").read_text(encoding="utf-8")
    assert page == module.render(page), (
        "docs/scripts.md is older than phlora/names.py: run docs/make_scripts.py"
    )
    for olds in ARGUMENTS.values():
        assert all(f"| `{name}` |" in page for name in olds)
