"""Text to tokens: control tokens within messages are text, and one thread at a time asks the tokenizer."""

from __future__ import annotations

import functools
import threading

import pytest
from tokenized_chats import (
    FAMILIES,
    RECORDS,
    TRAINING,
    assistant,
    full_text,
    kinds,
    plain_row,
    tokenized,
    tokenizer_of,
    user,
)

from phlora.data.dataset import load_rows
from phlora.data.prompts import encode_chat
from phlora.data.tokenize import (
    IGNORED,
    tokenize_rows,
)
from phlora.testing.tokenizers import (
    CHATML,
)


class _Guarded:
    """A Rust tokenizer that reports who sets it up or encodes while another thread encodes.

    Encoding in the background waits a moment for somebody to do so.
    """

    USES = ("encode", "encode_batch", "encode_batch_fast", "no_truncation", "no_padding")

    def __init__(self, backend):
        self.__dict__.update(backend=backend, encoding=None, used=threading.Event(), intrusions=[])

    def __getattr__(self, name):
        found = getattr(self.backend, name)
        return functools.partial(self.use, name, found) if name in self.USES else found

    def __setattr__(self, name, value):
        self.use(name, lambda: setattr(self.backend, name, value))

    def use(self, name, function, *args, **kwargs):
        own = threading.current_thread()
        state = self.__dict__
        if state["encoding"] not in (None, own):
            self.intrusions.append(name)
            self.used.set()
        state["encoding"] = own if name.startswith("encode") else state["encoding"]
        try:
            if name.startswith("encode_batch") and own is not threading.main_thread():
                self.used.wait(0.1)
            return function(*args, **kwargs)
        finally:
            state["encoding"] = None if state["encoding"] is own else state["encoding"]


CALLERS = {
    "the BOS token": ("llama2", None, [RECORDS["text"]("a")] * 4),
    "quoted control tokens": ("chatml", None, [RECORDS["messages"]("a <|im_end|>")] * 4),
    "chats of another shape": (
        "chatml",
        TRAINING["whole_turn"][1],
        [{"messages": [user("a"), assistant("b")] * turns} for turns in (1, 1, 2, 2, 3, 3)],
    ),
    "a mask for each chat": ("chatml", TRAINING["answer_alone"][1], [RECORDS["messages"]("a")] * 4),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_nothing_else_asks_the_tokenizer_while_it_encodes(caller, monkeypatch):
    """Rust tokenizers refuse to be set up, or change what they do, while they encode on another thread."""
    monkeypatch.setattr("phlora.data.row_tokenizer.BATCH_ROWS", 2)
    family, template, records = CALLERS[caller]
    tokenizer = tokenizer_of(family)
    guarded = tokenizer._tokenizer = _Guarded(tokenizer._tokenizer)
    rows = load_rows(records).rows
    assert len(tokenize_rows(rows, tokenizer, training_template=template).rows) == len(records)
    assert guarded.intrusions == []


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_contents_stay_text(family):
    tokenizer = tokenizer_of(family)
    controls = [token for token in tokenizer.all_special_tokens if token != "<unk>"]
    controls.append(FAMILIES[family][2].strip())
    quoted = " and ".join(controls)
    chat = [user(f"ignore {quoted} please"), assistant(f"I see {quoted}{controls[0]}.")]
    result = tokenized(tokenizer, *chat)
    (row,) = result.rows
    harmless = [{**message, "content": "x"} for message in chat]
    control_ids = set(tokenizer.convert_tokens_to_ids(controls))
    expected = [
        token for token in tokenizer.apply_chat_template(harmless)["input_ids"] if token in control_ids
    ]
    assert [token for token in row.input_ids if token in control_ids] == expected
    assert kinds(result) == {"control_tokens"}
    assert f"I see {quoted}{controls[0]}." in full_text(tokenizer, row)
    prompt = encode_chat(chat[:1], tokenizer)
    assert row.input_ids[: len(prompt) - 1] == prompt[:-1]


def test_a_control_token_that_cannot_be_plain_text_is_broken_up():
    tokenizer = tokenizer_of("chatml")
    tokenizer.add_tokens(["<turn>"])  # an added token that is not flagged as special is never split
    tokenizer.chat_template = CHATML.replace("'\n' + message", "'<turn>' + message")
    result = tokenized(tokenizer, user("a <turn> b"), assistant("c"))
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert result.rows[0].input_ids.count(turn) == 2
    assert "a <\u200bturn> b" in full_text(tokenizer, result.rows[0])
    assert kinds(result) == {"control_tokens_broken"}


def test_tools_stay_where_a_control_token_is_broken_up():
    tokenizer = tokenizer_of("chatml")
    tokenizer.add_tokens(["<turn>"])
    named = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    tokenizer.chat_template = named + CHATML.replace("'\n' + message", "'<turn>' + message")
    tools = [{"type": "function", "function": {"name": "probe", "parameters": {}}}]
    chat = [user("a <turn> b"), assistant("c")]
    result = tokenize_rows(load_rows([{"messages": chat, "tools": tools}]).rows, tokenizer)
    assert "control_tokens_broken" in kinds(result)
    expected = [user("a <\u200bturn> b"), assistant("c")]
    assert result.rows[0].input_ids == tokenizer.apply_chat_template(expected, tools=tools)["input_ids"]


@pytest.mark.parametrize("text", ["Once upon", "<s>Once upon", "<s>Once upon</s>"])
def test_plain_text_has_one_bos_and_one_end_token(text):
    tokenizer = tokenizer_of("llama2")
    (row,) = plain_row(tokenizer, text=text).rows
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (row.input_ids.count(bos), row.input_ids.count(eos), row.labels[-1]) == (1, 1, eos)
    assert row.labels.count(IGNORED) <= 1
    assert kinds(plain_row(tokenizer, text=text)) == set()


def test_the_pad_token_does_not_take_the_end_token_away():
    tokenizer = tokenizer_of("phi3")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (row,) = tokenized(tokenizer, user("a"), assistant("b")).rows
    assert row.labels[-1] == tokenizer.eos_token_id
