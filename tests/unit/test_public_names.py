"""The names of `phlora` itself: each is there, documented, and the same object as in its own module."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import phlora

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sorted(set(phlora.__all__) - {"__version__"}))
def test_every_public_name_loads_and_is_documented(name: str) -> None:
    value = getattr(phlora, name)
    module = importlib.import_module(phlora._DEFINED_IN[name])
    assert value is getattr(module, name)
    assert value.__module__ == module.__name__, "named after the module that defines it"
    assert value.__doc__ and not value.__doc__.startswith(f"{name}("), "a docstring of its own"


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "src/phlora/__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: line.module for line in block.body for alias in line.names}
    assert seen == phlora._DEFINED_IN


@pytest.mark.parametrize(
    "page",
    [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *(ROOT / "examples").glob("*.py")],
    ids=lambda p: p.name,
)
def test_pages_and_examples_use_public_names_only(page: Path) -> None:
    imports = re.findall(
        r"^\s*(?:from (phlora\S*) import|import (phlora\S*))", page.read_text(encoding="utf-8"), re.M
    )
    # phlora.lora is a package to be used on its own, as loralib is.
    assert {"".join(names) for names in imports} <= {"phlora", "phlora.lora"}
