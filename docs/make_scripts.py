"""Writes the tables of docs/scripts.md from the one table of old and new names, `phlora.names`.

    python docs/make_scripts.py

A test holds the page to the table. What stands outside of the marks is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from phlora.names import (
    AGING,
    ARGUMENTS,
    DATASET_KWARGS,
    FROM_PRETRAINED,
    IMPORTS,
    LORA,
    SETTINGS,
    TRAINER,
    VALUES,
    Old,
)

PAGE = Path(__file__).parent / "scripts.md"
_TITLES = {
    SETTINGS: "`SFTConfig`, `TrainingArguments`",
    TRAINER: "`SFTTrainer`",
    LORA: "`peft_config` as a dictionary",
    FROM_PRETRAINED: "`model_init_kwargs`",
}


def tables() -> dict[str, str]:
    """The tables by the names of their marks."""
    return {
        "names": "\n\n".join(
            f"**{_TITLES[of]}**\n\n" + _table("written", "what becomes of it", map(_told, olds.values()))
            for of, olds in ARGUMENTS.items()
        ),
        "values": _table(
            "written",
            "read as",
            [
                *(
                    (f"{name}: {old}", f"`{new}`")
                    for name, olds in VALUES.items()
                    for old, new in olds.items()
                ),
                *(
                    (f"dataset_kwargs: {name}", f"has no effect: {says}")
                    for name, says in DATASET_KWARGS.items()
                ),
            ],
        ),
        "aging": _table(
            "still taken",
            "say instead",
            ((name, says) for olds in AGING.values() for name, says in olds.items()),
        ),
        "imports": _table(
            "imported",
            "now",
            (
                (old.path, "; ".join(filter(None, [f"`{old.new}`" if old.new else "", old.says])))
                for old in IMPORTS.values()
            ),
        ),
    }


def render(page: str) -> str:
    """The page with the tables between their marks."""
    for name, table in tables().items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, found = mark.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page)
        assert found == 1, f"docs/scripts.md has no mark for {name}"
    return page


def _told(old: Old) -> tuple[str, str]:
    words = {
        "renamed": f"`{old.new}`",
        "moved": f"`{old.to}({old.new}=…)`",
        "idle": f"has no effect: {old.says}",
        "gone": f"an error: {old.says}",
    }[old.fate]
    if old.fate == "renamed" and old.values:
        said = [
            f"{was} is {'left out' if now is None else now}"
            for was, now in old.values.items()
            if was is not None
        ]
        words += f" ({', '.join(said)})"
    return old.name, words


def _table(left: str, right: str, rows: Iterable[tuple[str, str]]) -> str:
    def lines() -> Iterator[str]:
        yield f"| {left} | {right} |"
        yield "|---|---|"
        for one, other in rows:
            yield f"| `{one}` | {other} |"

    return "\n".join(lines())


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
