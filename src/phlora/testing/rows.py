"""Chats in five languages, and files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# One sentence a language; three scripts besides Latin, one of them written from right to left.
LANGUAGES = {
    "fa": "سلام! چراغ آشپزخانه را روشن کن، لطفاً.",
    "hi": "नमस्ते, रसोई की बत्ती जला दो।",
    "sr": "Здраво, упали светло у кухињи, љубим те.",
    "tr": "Merhaba, mutfağın ışığını açar mısın?",
    "vi": "Xin chào, hãy bật đèn trong bếp giúp tôi nhé.",
}
_GREETINGS = ("salam دنیا", "namaste नमस्ते", "zdravo свете", "merhaba dünya", "xin chào")


def chat_rows(count: int, *, turns: int = 1, system: str | None = None) -> list[dict[str, Any]]:
    """Different short chats that a tiny model learns in a few steps: the answer repeats a part of the question.

    Args:
        count: how many.
        turns: exchanges of question and answer in each.
        system: a system prompt that all of them begin with.

    >>> chat_rows(1)[0]["messages"][1]
    {'role': 'assistant', 'content': 'salam دنیا 0'}
    """
    rows = []
    for number in range(count):
        messages = [{"role": "system", "content": system}] if system else []
        for turn in range(turns):
            text = _GREETINGS[(number + turn) % len(_GREETINGS)]
            messages += [
                {"role": "user", "content": f"say {number} {text}"},
                {"role": "assistant", "content": f"{text} {number}"},
            ]
        rows.append({"messages": messages})
    return rows


def write_rows(path: str | Path, rows: Iterable[Any]) -> Path:
    """Write values as JSONL in UTF-8, one a line; returns the path."""
    path = Path(path)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path
