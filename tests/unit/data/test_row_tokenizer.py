"""Rows one batch after the other: their order, plain rows, and what becomes of rows that are too long."""

from __future__ import annotations

import pytest
from tokenized_chats import (
    assistant,
    length_of,
    plain_row,
    random_chat,
    row_of,
    system,
    tokenized,
    tokenizer_of,
    trained_text,
    user,
)

from phlora.data import row_tokenizer
from phlora.data.dataset import load_rows
from phlora.data.prompts import encode_prompt
from phlora.data.tokenize import (
    Skipped,
    TokenizedRow,
    tokenize_row,
    tokenize_rows,
)
from phlora.errors import DataError, ModelError
from phlora.testing import phi3_tokenizer
from phlora.testing.tokenizers import (
    PHI3,
)


def test_more_rows_than_a_batch_keep_their_order_and_their_notes(monkeypatch):
    monkeypatch.setattr("phlora.data.row_tokenizer.BATCH_ROWS", 4)
    monkeypatch.setattr("phlora.data.problems.MAX_NAMED_ORIGINS", 3)
    records = [{"messages": [user(f"{n}"), assistant(f" {n} <|end|>" if n % 2 else "b")]} for n in range(21)]
    result = tokenize_rows(load_rows(records).rows, tokenizer_of("phi3"))
    assert [row.origin.line for row in result.rows] == list(range(1, 22))
    notes = {note.kind: note for note in result.notes}
    assert notes["control_tokens"].count == 10
    assert [origin.line for origin in notes["control_tokens"].origins] == [2, 4, 6]


def test_batches_give_what_single_rows_give():
    tokenizer = tokenizer_of("phi3")
    rows = [row_of(*random_chat(seed)) for seed in range(30)]
    counts = []
    done = tokenize_rows(rows, tokenizer, progress=counts.append).rows
    assert [(row.input_ids, row.labels) for row in done] == [
        (row.input_ids, row.labels) for row in (tokenize_row(row, tokenizer) for row in rows)
    ]
    assert sum(counts) == 30


def test_a_turn_the_template_leaves_out_is_an_error():
    tokenizer = phi3_tokenizer(PHI3.replace("message['role'] == 'assistant'", "false"))
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    (skip,) = tokenized(tokenizer, *chat).skipped
    assert (skip.kind, skip.reason) == ("not_rendered", "the chat template leaves out turn 2 (assistant)")
    with pytest.raises(DataError, match="rows:1: The chat template leaves out turn 2"):
        tokenize_rows([row_of(*chat)], tokenizer)
    (skip,) = tokenized(tokenizer_of("llama2"), user("a"), system("b"), assistant("c")).skipped
    assert "Only user and assistant roles" in skip.reason


@pytest.mark.parametrize("family", ["phi3", "chatml", "llama2"])
def test_history_is_cut_by_whole_exchanges_and_never_the_last(family):
    tokenizer = tokenizer_of(family)
    exchanges = [(user(f"question {n}"), assistant(f"answer {n} " * n)) for n in range(1, 6)]
    chat = [message for exchange in exchanges for message in exchange]
    for kept in range(1, 6):
        expected = [message for exchange in exchanges[-kept:] for message in exchange]
        limit = length_of(tokenizer, *expected)
        result = tokenized(tokenizer, *chat, max_length=limit)
        assert result.rows[0].input_ids == tokenizer.apply_chat_template(expected)["input_ids"]
        assert result.rows[0].num_cut_messages == 10 - 2 * kept
        assert len(result.cut) == (kept < 5)
    (skip,) = tokenized(tokenizer, *chat, max_length=length_of(tokenizer, *exchanges[-1]) - 1).skipped
    assert skip.kind == "too_long"


def test_the_system_prompt_survives_and_tool_turns_stay_with_their_question():
    tokenizer = tokenizer_of("chatml")
    last = [user("c"), assistant("look"), {"role": "tool", "content": "42"}, assistant("d")]
    chat = [system("Be brief"), user("a" * 40), assistant("b"), *last]
    (row,) = tokenized(tokenizer, *chat, max_length=length_of(tokenizer, chat[0], *last) + 2).rows
    assert row.input_ids == tokenizer.apply_chat_template([chat[0], *last])["input_ids"]


def test_drop_error_and_rows_without_history():
    tokenizer = tokenizer_of("phi3")
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    (skip,) = tokenized(tokenizer, *chat, max_length=9, too_long="drop").skipped
    assert skip.reason == "the row has 13 tokens, more than max_length=9"
    with pytest.raises(DataError, match="rows:1: The row has 13 tokens"):
        tokenized(tokenizer, *chat, max_length=9, too_long="error")
    plain = load_rows([{"prompt": "long " * 20, "completion": "x"}]).rows[0]
    assert isinstance(tokenize_row(plain, tokenizer, max_length=9), Skipped)


def test_a_cut_that_leaves_nothing_to_train_skips_the_row():
    chat = [user("a" * 30), assistant("b"), user("c"), assistant("d", train=False)]
    (skip,) = tokenized(tokenizer_of("phi3"), *chat, max_length=12).skipped
    assert skip.kind == "no_trained_token"


def test_plain_completion_is_trained_with_the_end_token():
    tokenizer = tokenizer_of("phi3")
    (row,) = plain_row(tokenizer, prompt="1 + 1 = ", completion="سلام").rows
    assert trained_text(tokenizer, row) == "سلام<|endoftext|>"
    prompt = encode_prompt(load_rows([{"prompt": "1 + 1 = ", "completion": "2"}]).rows[0], tokenizer)
    assert (tokenizer.decode(prompt.prompt_ids), prompt.reference) == ("1 + 1 = ", "2")


def test_rows_without_messages_need_no_chat_template():
    tokenizer = tokenizer_of("phi3")
    tokenizer.chat_template = None
    assert isinstance(tokenize_row(load_rows([{"text": "a"}]).rows[0], tokenizer), TokenizedRow)
    with pytest.raises(ModelError, match="no chat template"):
        tokenize_row(row_of(user("a"), assistant("b")), tokenizer)


def test_a_huge_row_is_left_out_before_it_is_encoded(monkeypatch):
    monkeypatch.setattr(row_tokenizer, "MAX_CHARACTERS", 1000)
    monkeypatch.setattr(row_tokenizer, "MAX_CHARACTERS_A_TOKEN", 20)
    rows = load_rows([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b" * 2001}]).rows
    for max_length, limit in ((100, 2000), (10, 1000), (None, 1000)):
        done = tokenize_rows(rows, phi3_tokenizer(), max_length=max_length, on_bad="collect")
        assert len(done.rows) == 1, limit
        (skip,) = done.skipped
        assert skip.kind == "too_long" and str(skip.origin) == "rows:2" and "2,002 characters" in skip.reason
    with pytest.raises(DataError, match="rows:2: The row has 2,002 characters"):
        tokenize_rows(rows, phi3_tokenizer(), max_length=10, too_long="error")
