"""Turns that are found between control tokens, without character offsets."""

from __future__ import annotations

import random

import pytest
from tokenized_chats import FAMILIES, assistant, random_chat, row_of, tokenizer_of, user

from phlora.data.tokenize import (
    tokenize_rows,
)
from phlora.testing import LANGUAGES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_turns_found_between_control_tokens_are_those_found_by_offsets(family, train_on, monkeypatch):
    generator = random.Random(1)
    chats = [random_chat(seed) for seed in range(120)]
    for chat in chats:
        chat[-1].update(generator.choice([{}, {}, {"train": False}, {"weight": 0.5}]))
        chat[-2].update(generator.choice([{}, {}, {"train": True}]))
    rows = [row_of(*chat) for chat in chats]
    options = {"train_on": train_on, "on_bad": "collect"}
    fast = tokenize_rows(rows, tokenizer_of(family), **options)
    monkeypatch.setattr("phlora.data.chat_template.writes_contents_only", lambda template: False)
    oracle = tokenize_rows(rows, tokenizer_of(family), **options)
    assert list(fast.rows) == list(oracle.rows) and fast.skipped == oracle.skipped

    def by_kind(result):
        return {note.kind: note.origins for note in result.notes}

    assert by_kind(fast) == by_kind(oracle)


@pytest.mark.parametrize("family", ["phi3", "phi3_plain", "chatml"])
def test_the_common_templates_need_no_offsets(family, monkeypatch):
    tokenizer = tokenizer_of(family)
    rows = [row_of(user(text), assistant(text)) for text in LANGUAGES.values()]
    tokenize_rows(rows, tokenizer)
    monkeypatch.setattr("phlora.data.labels.token_range", None)
    assert len(tokenize_rows(rows, tokenizer).rows) == len(rows)
