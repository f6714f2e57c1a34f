"""docs/architecture.md names every module, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Named as a whole.
WHOLE = {"testing"}


def test_the_page_names_every_module_and_no_other() -> None:
    source = ROOT / "src" / "phlora"
    there = {p.name for p in source.glob("*.py")} - {"__main__.py"}
    for package in (p for p in source.iterdir() if (p / "__init__.py").is_file() and p.name not in WHOLE):
        there |= {f"{package.name}/{p.name}" for p in package.glob("*.py") if p.name != "__init__.py"}
        there |= {f"{package.name}/{p.parent.name}/" for p in package.glob("*/__init__.py")}
    named, package_name = set(), ""
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        if top := re.match(r"      (\w+)/ ", line):
            package_name = top[1]
        elif entry := re.match(r"        (\w+(?:\.py|/)) ", line):
            named.add(f"{package_name}/{entry[1]}")
        elif entry := re.match(r"      (\w+\.py) ", line):
            named.add(entry[1])
    assert named == there
