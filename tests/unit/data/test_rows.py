"""The digests of rows."""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata

from phlora.data.dataset import load_rows
from phlora.data.rows import (
    Origin,
    Row,
    fingerprint_of,
    key_and_digest,
    key_mark,
    row_digest,
    row_key,
    single_spaced,
)


def _texts(*texts):
    return load_rows([{"text": text} for text in texts]).rows


def test_fingerprint_sees_content_order_and_weight():
    def fingerprint(rows):
        return fingerprint_of(map(row_digest, rows))

    one, two = _texts("a", "b"), _texts("b", "a")
    assert fingerprint(one) == fingerprint(_texts("a", "b"))
    assert len({fingerprint(one), fingerprint(two), fingerprint(one[:1])}) == 3


def _by_json(row):
    """`row_key` and `row_digest` as `json` itself would write what they digest."""

    def digest(value):
        text = json.dumps(value, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def normal(text):
        return " ".join(unicodedata.normalize("NFC", text).split())

    parts = [normal(part) for part in (row.prompt, row.completion, row.text) if part is not None]
    if row.messages is not None:
        parts = [[m["role"], normal(m["content"]), m.get("tool_calls")] for m in row.messages]
    content = [row.messages, row.prompt, row.completion, row.text, row.tools, row.weight]
    return digest([parts, row.tools]), digest(content)


TEXTS = [
    "", " ", "Hi", " Hi", "Hi\n", "a  b", "a\tb", 'say "no"\\', "سلام", "e\u0301", "é", "\u00a0x", "a\u2028b", "\x7f",
    "\x1c", "😀", "</s>", "a\u3000b", "\u200b",
]  # fmt: skip


def test_digests_put_together_by_hand_are_those_of_json():
    chance = random.Random(3)
    marks: dict[bytes, set[bytes]] = {}
    for number in range(3000):
        messages = [
            {"role": chance.choice(["system", "user", "assistant", "tool"]), "content": "".join(content)}
            for content in (chance.choices(TEXTS, k=chance.randrange(4)) for _ in range(chance.randrange(5)))
        ]
        if messages and number % 3 == 0:
            key = chance.choice(["name", "train", "weight", "tool_calls"])
            messages[-1][key] = [{"name": "f", "arguments": {"b": "é", "a": None}}] if key[1] == "o" else "x"
        chat = tuple(messages) if number % 5 else None
        plain = [None if chat else chance.choice([None, *TEXTS]) for _ in range(3)]
        tools = chance.choice([None, None, [], [{"name": "f"}]])
        weight = chance.choice([1.0, 1, 0.5, 1e-300, 1e22, 3, float("inf")])
        row = Row(chat, *plain, tools, Origin("rows", 1), weight)
        key, digest = key_and_digest(row)
        assert (key, digest) == _by_json(row)
        assert (row_key(row), row_digest(row)) == (key.hex(), digest)
        marks.setdefault(key, set()).add(key_mark(row))
    assert all(len(found) == 1 for found in marks.values())
    assert len(set().union(*marks.values())) == len(marks) > 100


def test_single_spaced_is_split_and_join_for_every_white_space():
    spaces = [chr(code) for code in range(0x3100) if chr(code).isspace()]
    for text in [*spaces, *(f"a{space}b" for space in spaces), *(f"{space}a" for space in spaces), *TEXTS]:
        assert single_spaced(text) == " ".join(text.split())
