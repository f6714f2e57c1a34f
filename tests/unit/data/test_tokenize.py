"""Rows of every format and language as tokens, and as the prompts of inference."""

from __future__ import annotations

import pytest
from tokenized_chats import (
    FAMILIES,
    RECORDS,
    assistant,
    random_chat,
    row_of,
    tokenized,
    tokenizer_of,
    user,
)

from phlora.data.dataset import load_rows
from phlora.data.prompts import encode_prompt
from phlora.data.tokenize import (
    TokenizedRow,
    tokenize_row,
    tokenize_rows,
)
from phlora.errors import DataError
from phlora.testing import LANGUAGES


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_inference(family):
    tokenizer = tokenizer_of(family)
    for seed in range(20):
        messages = [message for message in random_chat(seed) if message["role"] != "system"]
        (row,) = tokenized(tokenizer, *messages).rows
        assert row.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
        prompt = encode_prompt(row_of(*messages), tokenizer)
        ids = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert prompt.prompt_ids == ids
        assert prompt.reference == messages[-1]["content"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_all_formats_and_languages_are_tokenised_as_row_by_row_with_every_chat_rendered(
    family, train_on, monkeypatch
):
    rows = [
        row
        for record in RECORDS.values()
        for row in load_rows([record(text) for text in LANGUAGES.values()]).rows
    ]
    options = {"train_on": train_on, "max_length": 300, "too_long": "truncate_history"}
    fast = list(tokenize_rows(rows, tokenizer_of(family), **options, on_bad="collect").rows)
    monkeypatch.setattr("phlora.data.chat_template.writes_contents_only", lambda template: False)
    oracle = tokenizer_of(family)
    results = [tokenize_row(row, oracle, **options) for row in rows]
    assert fast == [result for result in results if isinstance(result, TokenizedRow)]
    assert len(fast) > len(rows) / 2


def test_no_answer_and_no_row_left():
    with pytest.raises(DataError, match="rows:1: The chat has no assistant turn"):
        tokenize_rows([row_of(user("a"))], tokenizer_of("phi3"))
    with pytest.raises(DataError, match="No row is left to train on.*1 too long"):
        tokenize_rows([row_of(user("a" * 50), assistant("b"))], tokenizer_of("phi3"), max_length=10)
    assert len(tokenized(tokenizer_of("phi3"), user("a"), train_on="all").rows) == 1


def test_prompts_of_rows_without_an_answer():
    tokenizer = tokenizer_of("phi3")
    assert encode_prompt(row_of(user("a")), tokenizer) is None
    assert encode_prompt(load_rows([{"text": "a"}]).rows[0], tokenizer) is None
    item = encode_prompt(row_of(user("a"), assistant("b"), user("c")), tokenizer)
    assert (item.reference, tokenizer.decode(item.prompt_ids)) == ("b", "<|user|>a<|end|><|assistant|>")
