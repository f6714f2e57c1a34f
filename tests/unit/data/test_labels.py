"""Which tokens are trained: the answers and what ends them, as templates, keys of messages and weights say."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tokenized_chats import (
    FAMILIES,
    TOOL_TEMPLATE,
    TOOLS,
    TRAINING,
    any_chat,
    assistant,
    full_text,
    kinds,
    random_chat,
    row_of,
    system,
    tokenized,
    tokenizer_of,
    trained_text,
    user,
)

from phlora.data.tokenize import (
    IGNORED,
    tokenize_row,
    tokenize_rows,
)
from phlora.testing import LANGUAGES, chatml_tokenizer
from phlora.testing.tokenizers import (
    CHATML,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_text_is_the_answers_with_their_end_tokens(family):
    tokenizer = tokenizer_of(family)
    _, _, end, final = FAMILIES[family]
    for seed in range(60):
        messages = random_chat(seed)
        if family in ("phi3", "llama2"):  # swallowed white space has its own test
            messages = [{**message, "content": message["content"].strip() or "x"} for message in messages]
        (row,) = tokenized(tokenizer, *messages).rows
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if family == "trimmed":
            answers = [answer.strip() for answer in answers]
        if family == "reasoning":
            answers[:-1] = [answer.split("</think>")[-1].lstrip("\n") for answer in answers[:-1]]
        expected = "".join(answer + end for answer in answers) + final
        trained = trained_text(tokenizer, row)
        if family == "llama2":
            # Its decoder cannot tell the space before a stretch of text from a space in it.
            trained, expected = trained.replace(" ", ""), expected.replace(" ", "")
        if family not in ("phi3", "trimmed"):
            # A merge may carry the line break of a header into an answer's first token.
            trained, expected = trained.replace("\n", ""), expected.replace("\n", "")
        assert trained == expected, messages


@pytest.mark.parametrize("family", TRAINING)
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_rows_of_a_training_template_are_trained_where_its_own_mask_says(family, train_on, monkeypatch):
    make, template = TRAINING[family]
    generator = random.Random(2)
    rows = [replace(row_of(*any_chat(generator)), weight=generator.choice((1, 2))) for _ in range(200)]
    options = {"train_on": train_on, "max_length": 250, "training_template": template, "on_bad": "collect"}
    fast = tokenize_rows(rows, make(template), **options)
    monkeypatch.setattr("phlora.data.chat_template.writes_contents_only", lambda template: False)
    oracle = tokenize_rows(rows, make(template), **options)
    assert list(fast.rows) == list(oracle.rows)
    assert (fast.skipped, fast.cut) == (oracle.skipped, oracle.cut)
    assert {note.kind: note.origins for note in fast.notes} == {
        note.kind: note.origins for note in oracle.notes
    }
    assert len(fast.rows) > len(rows) / 2


@pytest.mark.parametrize(
    "family", ["phi3", "phi3_plain", "phi3_sentencepiece", "phi3_5", "answer_and_end", "whole_turn"]
)
def test_a_training_template_is_asked_once_for_chats_of_one_shape(family, monkeypatch):
    make, template = TRAINING[family]
    tokenizer = make(template)
    options = {"training_template": template, "train_on": "assistant"}
    rows = [row_of(system(""), user(text), assistant(text)) for text in LANGUAGES.values()]
    asked = []
    apply = tokenizer.apply_chat_template

    def count(*args, **kwargs):
        asked.append(args)
        return apply(*args, **kwargs)

    monkeypatch.setattr(tokenizer, "apply_chat_template", count)
    tokenize_rows(rows[:1], tokenizer, **options)
    for_one = len(asked)
    monkeypatch.setattr("phlora.data.labels.token_range", None)
    assert len(tokenize_rows(rows, tokenizer, **options).rows) == len(rows)
    # One mask for each shape and call; the rendering is remembered with the tokenizer.
    assert len(asked) == for_one + 1


def test_train_on_and_the_keys_of_a_message():
    tokenizer = tokenizer_of("phi3")
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]

    def trained(*messages, train_on="assistant"):
        return trained_text(tokenizer, tokenized(tokenizer, *messages, train_on=train_on).rows[0])

    assert trained(*chat) == "b<|end|>d<|end|><|endoftext|>"
    assert trained(*chat, train_on="last") == "d<|end|><|endoftext|>"
    assert trained(*chat, train_on="all") == tokenizer.apply_chat_template(chat, tokenize=False).replace(
        "\n", ""
    )
    muted = [chat[0], assistant("b", train=False), *chat[2:]]
    assert trained(*muted) == "d<|end|><|endoftext|>"
    assert "b" not in trained(*muted, train_on="all")
    assert trained(chat[0], assistant("b", train=True), *chat[2:], train_on="last") == trained(*chat)
    assert trained(user("a", train=True), *chat[1:]) == "a<|end|>" + trained(*chat)


def test_weights_of_messages_and_files():
    tokenizer = tokenizer_of("chatml")
    chat = [
        user("a"),
        assistant("b", weight=0.5),
        user("c"),
        assistant("d"),
        user("e"),
        assistant("f", weight=0),
    ]
    (row,) = tokenized(tokenizer, *chat).rows
    weights = [weight for weight, label in zip(row.weights, row.labels, strict=True) if label != IGNORED]
    assert weights == [0.5, 0.5, 1.0, 1.0]
    assert not any(weight for weight, label in zip(row.weights, row.labels, strict=True) if label == IGNORED)
    assert tokenized(tokenizer, *chat[:1], assistant("b")).rows[0].weights is None


def test_a_message_without_weight_keeps_the_weight_of_its_file(tmp_path):
    import dataclasses

    row = dataclasses.replace(row_of(user("a"), assistant("b", weight=0.5), assistant("c")), weight=2.0)
    weights = tokenize_row(row, tokenizer_of("chatml")).weights
    assert [weight for weight in weights if weight] == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("family", TRAINING)
def test_white_space_before_an_answer_does_not_change_what_is_trained_before_it(family):
    make, template = TRAINING[family]
    tokenizer = make(template)
    before = {}
    for content in ("def f()", " \n def f()"):
        chat = [user("a"), assistant(content), user("b"), assistant(content)]
        result = tokenize_rows([row_of(*chat)], tokenizer, training_template=template)
        trained = trained_text(tokenizer, result.rows[0])
        before[content] = [part.rstrip() for part in trained.split("def f()")]
    plain, spaced = before.values()
    assert spaced == plain


def test_tool_calls_are_trained_where_the_template_writes_them():
    tokenizer = chatml_tokenizer(TOOL_TEMPLATE)
    call = {"type": "function", "function": {"name": "lamp", "arguments": {"on": True}}}
    chat = [
        user("on"),
        assistant(None, tool_calls=[call]),
        {"role": "tool", "content": "ok"},
        assistant("Done"),
    ]
    result = tokenized(tokenizer, *chat, tools=TOOLS)
    called = '<call>{"name": "lamp", "arguments": {"on": true}}</call><|im_end|>'
    assert trained_text(tokenizer, result.rows[0]) == called + "Done<|im_end|>"
    assert '"parameters"' in full_text(tokenizer, result.rows[0])
    assert kinds(result) == set()
    both = tokenized(tokenizer, user("on"), assistant("Yes", tool_calls=[call]))
    assert trained_text(tokenizer, both.rows[0]) == "Yes" + called


def test_an_end_marker_that_is_no_token_is_trained_too():
    tokenizer = chatml_tokenizer(CHATML.replace("im_end", "fin").replace("im_start", "go"))
    assert trained_text(tokenizer, tokenized(tokenizer, user("a"), assistant("b")).rows[0]).startswith(
        "b<|fin|>"
    )
