"""Tokens come back from the cache exactly where nothing that decides them has changed, and never damaged."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest

from phlora.data.cache import TokenCache, digest_tokenizer, token_key
from phlora.data.dataset import RowSubset, index_rows
from phlora.data.tokenize import tokenize_rows
from phlora.testing import LANGUAGES, chatml_tokenizer, phi3_tokenizer
from phlora.testing.tokenizers import CHATML

OPTIONS = {
    "train_on": "assistant",
    "max_length": 64,
    "too_long": "truncate_history",
    "training_template": None,
}


def _records():
    chats = [
        {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": text, "weight": 0.5},
            ]
        }
        for text in LANGUAGES.values()
    ]
    control = [{"role": "user", "content": "<|end|>"}, {"role": "assistant", "content": "  ok"}]
    long = [{"role": role, "content": "many words " * 9} for role in ("user", "assistant") * 3]
    return [*chats, {"messages": control}, {"messages": long}, {"messages": long[:2] * 9 + control}]


def _key(records=None, tokenizer=None, numbers=None, **options):
    survey = index_rows(records or _records())
    rows = survey.all() if numbers is None else RowSubset(survey, numbers)
    return token_key(rows, digest_tokenizer(tokenizer or phi3_tokenizer()), {**OPTIONS, **options})


def _tokenized():
    return tokenize_rows(index_rows(_records()).all(), phi3_tokenizer(), **OPTIONS, on_bad="collect")


def _same(one, other):
    return list(one.rows) == list(other.rows) and all(
        getattr(one, name) == getattr(other, name) for name in ("skipped", "cut", "notes")
    )


@pytest.fixture
def cache(tmp_path):
    return TokenCache(tmp_path / "tokens")


def test_what_was_saved_is_loaded(cache):
    tokenized = _tokenized()
    assert (
        tokenized.skipped and tokenized.cut and tokenized.notes and any(row.weights for row in tokenized.rows)
    )
    assert cache.load("a") is None
    cache.save("a", tokenized)
    found = cache.load("a")
    assert _same(found, tokenized)
    assert not found.rows.input_ids.flags.owndata  # mapped, not read
    assert [file.name for file in cache.folder.iterdir()] == ["a.safetensors"]


def test_rows_without_weights_have_none_afterwards(cache):
    rows = index_rows([{"prompt": "1 + 1 = ", "completion": "2"}]).all()
    cache.save("a", tokenize_rows(rows, phi3_tokenizer()))
    assert cache.load("a").rows.weights is None


def test_equal_keys_only_for_equal_tokens():
    records = _records()
    grown = phi3_tokenizer()
    grown.add_tokens(["kutscha"])
    other = phi3_tokenizer()
    other.chat_template = CHATML
    keys = {
        "same": _key(),
        "order": _key(records[::-1]),
        "content": _key([*records[:-1], records[0]]),
        "selection": _key(numbers=[0, 1, 2]),
        "tokenizer": _key(tokenizer=chatml_tokenizer()),
        "added token": _key(tokenizer=grown),
        "template": _key(tokenizer=other),
        **{name: _key(**{name: value}) for name, value in [("train_on", "all"), ("max_length", 32)]},
        **{name: _key(**{name: "drop"}) for name in ("too_long", "training_template")},
    }
    assert len(set(keys.values())) == len(keys)


def test_encoding_does_not_change_the_key():
    tokenizer = phi3_tokenizer()
    before = _key(tokenizer=tokenizer)
    tokenizer("many words", truncation=True, max_length=2)
    assert _key(tokenizer=tokenizer) == before


def test_a_template_that_writes_the_date_has_tokens_for_each_day(monkeypatch):
    class Tomorrow:
        @staticmethod
        def today():
            return "tomorrow"

    dated, plain = phi3_tokenizer("{{ strftime_now('%d') }}" + CHATML), phi3_tokenizer()
    before = [_key(tokenizer=tokenizer) for tokenizer in (dated, plain)]
    monkeypatch.setattr("phlora.data.cache.date", Tomorrow)
    after = [_key(tokenizer=tokenizer) for tokenizer in (dated, plain)]
    assert before[0] != after[0] and before[1] == after[1]


def test_the_same_rows_in_another_file_are_named_after_it(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text("".join(json.dumps(record) + "\n" for record in _records()), encoding="utf-8")
    assert _key(str(paths[0])) == _key(str(paths[0])) != _key(str(paths[1]))


@pytest.mark.parametrize("damage", ["empty", "short", "bit", "foreign", "list", "huge"])
def test_a_damaged_or_foreign_file_counts_as_absent_and_is_replaced(cache, damage):
    tokenized = _tokenized()
    cache.save("a", tokenized)
    file = cache.folder / "a.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(
        {
            "empty": b"",
            "short": bytes(content[: len(content) // 2]),
            "bit": bytes(content),
            "foreign": b"not a table of tokens",
            "list": (2).to_bytes(8, "little") + b"[]",
            "huge": b"\xff" * 8 + bytes(content[8:]),
        }[damage]
    )
    assert cache.load("a") is None
    cache.save("a", tokenized)
    assert _same(cache.load("a"), tokenized)


def test_the_entries_unused_for_longest_go_first(cache):
    tokenized = _tokenized()
    cache.save("0", tokenized)
    size = (cache.folder / "0.safetensors").stat().st_size
    small = dataclasses.replace(cache, max_bytes=3 * size)
    for number in range(1, 3):
        small.save(str(number), tokenized)
    for number in range(3):
        os.utime(cache.folder / f"{number}.safetensors", (number, number))
    assert small.load("0") is not None
    small.save("3", tokenized)
    assert sorted(file.stem for file in cache.folder.iterdir()) == ["0", "2", "3"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    cache = TokenCache(tmp_path / "file" / "tokens")
    cache.save("a", _tokenized())
    assert cache.load("a") is None


def test_a_set_larger_than_the_cache_is_not_kept(cache):
    dataclasses.replace(cache, max_bytes=100).save("a", _tokenized())
    assert not cache.folder.exists()


def test_a_row_is_the_same_from_the_table_by_any_index():
    rows = _tokenized().rows
    assert rows[-1] == rows[len(rows) - 1] == rows[-1:][0]
    assert np.array_equal(rows.lengths, [len(row.input_ids) for row in rows])
    assert rows.num_trained_tokens == sum(row.num_trained_tokens for row in rows)
    with pytest.raises(IndexError):
        rows[len(rows)]
