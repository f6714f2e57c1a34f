"""Trained are the answers and the tokens that end them, whatever the template; nothing is lost silently."""

from __future__ import annotations

import functools
import random
import threading
from dataclasses import replace

import pytest
from tokenizers import AddedToken
from trl.chat_template_utils import phi3_5_training_chat_template, phi3_training_chat_template

from phlora.data import row_tokenizer
from phlora.data.dataset import load_rows
from phlora.data.prompts import encode_chat, encode_prompt
from phlora.data.tokenize import (
    IGNORED,
    Skipped,
    TokenizedRow,
    tokenize_row,
    tokenize_rows,
)
from phlora.errors import DataError, ModelError
from phlora.testing import LANGUAGES, chatml_tokenizer, llama2_tokenizer, phi3_tokenizer
from phlora.testing.tokenizers import (
    CHATML,
    LLAMA2,
    PHI3,
    PHI3_SPECIALS,
    PHI3_WITHOUT_SYSTEM,
    REASONING,
    TRIMMED,
)

FAMILIES = {
    "phi3": (phi3_tokenizer, PHI3, "<|end|>", "<|endoftext|>"),
    "phi3_plain": (
        lambda template: phi3_tokenizer(template, rstrip=False),
        PHI3,
        "<|end|>",
        "\n<|endoftext|>",
    ),
    "chatml": (chatml_tokenizer, CHATML, "<|im_end|>", ""),
    "trimmed": (chatml_tokenizer, TRIMMED, "<|im_end|>", ""),
    "reasoning": (chatml_tokenizer, REASONING, "<|im_end|>", ""),
    "llama2": (llama2_tokenizer, LLAMA2, " </s>", ""),
}
PARTS = [
    *LANGUAGES.values(),
    "user",
    "assistant",
    "\n",
    "  ",
    "Paris",
    "[INST]",
    "</think>",
    "{}",
    "x",
    "<|",
    "end",
    "\ue0f00",
    "👩‍👩‍👧",
]


def _tokenizer(family):
    make, template, *_ = FAMILIES[family]
    return make(template)


def user(content, **keys):
    return {"role": "user", "content": content, **keys}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def system(content):
    return {"role": "system", "content": content}


def _row(*messages, **columns):
    return load_rows([{"messages": list(messages), **columns}]).rows[0]


def _run(tokenizer, *messages, tools=None, **options):
    columns = {"tools": tools} if tools else {}
    return tokenize_rows([_row(*messages, **columns)], tokenizer, on_bad="collect", **options)


def _trained(tokenizer, row):
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


def _text(tokenizer, row):
    return tokenizer.decode(row.input_ids)


def _kinds(result):
    return {note.kind for note in result.notes}


def _random_chat(seed):
    generator = random.Random(seed)
    messages = [system("Be brief.")] if generator.random() < 0.3 else []
    for _ in range(generator.randint(1, 6)):
        question, answer = ("".join(generator.choices(PARTS, k=generator.randint(1, 4))) for _ in range(2))
        # Equal contents in several turns and roles.
        messages += [user(question), assistant(question if generator.random() < 0.3 else answer)]
    return messages


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_text_is_the_answers_with_their_end_tokens(family):
    tokenizer = _tokenizer(family)
    _, _, end, final = FAMILIES[family]
    for seed in range(60):
        messages = _random_chat(seed)
        if family in ("phi3", "llama2"):  # swallowed white space has its own test
            messages = [{**message, "content": message["content"].strip() or "x"} for message in messages]
        (row,) = _run(tokenizer, *messages).rows
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if family == "trimmed":
            answers = [answer.strip() for answer in answers]
        if family == "reasoning":
            answers[:-1] = [answer.split("</think>")[-1].lstrip("\n") for answer in answers[:-1]]
        expected = "".join(answer + end for answer in answers) + final
        trained = _trained(tokenizer, row)
        if family == "llama2":
            # Its decoder cannot tell the space before a stretch of text from a space in it.
            trained, expected = trained.replace(" ", ""), expected.replace(" ", "")
        if family not in ("phi3", "trimmed"):
            # A merge may carry the line break of a header into an answer's first token.
            trained, expected = trained.replace("\n", ""), expected.replace("\n", "")
        assert trained == expected, messages


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_inference(family):
    tokenizer = _tokenizer(family)
    for seed in range(20):
        messages = [message for message in _random_chat(seed) if message["role"] != "system"]
        (row,) = _run(tokenizer, *messages).rows
        assert row.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
        prompt = encode_prompt(_row(*messages), tokenizer)
        ids = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert prompt.prompt_ids == ids
        assert prompt.reference == messages[-1]["content"]


RECORDS = {
    "messages": lambda text: {"messages": [user(text), assistant(text), user(f"{text}?"), assistant(text)]},
    "system": lambda text: {"messages": [system(text), user(text), assistant(f"{text} <|end|> {text}")]},
    "conversations": lambda text: {
        "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
    },
    "prompt_completion": lambda text: {"prompt": text, "completion": text},
    "chat_prompt_completion": lambda text: {"prompt": [user(text)], "completion": [assistant(text)]},
    "alpaca": lambda text: {"instruction": text, "input": text, "output": text},
    "qa": lambda text: {"question": text, "answer": text},
    "text": lambda text: {"text": text},
}


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
    fast = list(tokenize_rows(rows, _tokenizer(family), **options, on_bad="collect").rows)
    monkeypatch.setattr("phlora.data.chat_template.writes_contents_only", lambda template: False)
    oracle = _tokenizer(family)
    results = [tokenize_row(row, oracle, **options) for row in rows]
    assert fast == [result for result in results if isinstance(result, TokenizedRow)]
    assert len(fast) > len(rows) / 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_turns_found_between_control_tokens_are_those_found_by_offsets(family, train_on, monkeypatch):
    generator = random.Random(1)
    chats = [_random_chat(seed) for seed in range(120)]
    for chat in chats:
        chat[-1].update(generator.choice([{}, {}, {"train": False}, {"weight": 0.5}]))
        chat[-2].update(generator.choice([{}, {}, {"train": True}]))
    rows = [_row(*chat) for chat in chats]
    options = {"train_on": train_on, "on_bad": "collect"}
    fast = tokenize_rows(rows, _tokenizer(family), **options)
    monkeypatch.setattr("phlora.data.chat_template.writes_contents_only", lambda template: False)
    oracle = tokenize_rows(rows, _tokenizer(family), **options)
    assert list(fast.rows) == list(oracle.rows) and fast.skipped == oracle.skipped

    def by_kind(result):
        return {note.kind: note.origins for note in result.notes}

    assert by_kind(fast) == by_kind(oracle)


@pytest.mark.parametrize("family", ["phi3", "phi3_plain", "chatml"])
def test_the_common_templates_need_no_offsets(family, monkeypatch):
    tokenizer = _tokenizer(family)
    rows = [_row(user(text), assistant(text)) for text in LANGUAGES.values()]
    tokenize_rows(rows, tokenizer)
    monkeypatch.setattr("phlora.data.labels.token_range", None)
    assert len(tokenize_rows(rows, tokenizer).rows) == len(rows)


def _marked_chatml(before, inside, after):
    """ChatML with generation markers around a part of each assistant turn."""
    turn = f"{{{{ {before!r} }}}}{{% generation %}}{{{{ {inside} }}}}{{% endgeneration %}}{{{{ {after!r} }}}}"
    return CHATML.replace(
        "{{ '<|im_start|>'",
        f"{{% if message['role'] == 'assistant' %}}{turn}{{% else %}}{{{{ '<|im_start|>'",
        1,
    ).replace("{% endfor %}", "{% endif %}{% endfor %}")


def phi3_sentencepiece(template):
    """Phi-3's control tokens in a vocabulary like Llama's, as Phi-3-mini has them."""
    tokenizer = llama2_tokenizer(template)
    tokens = [AddedToken(token, rstrip=True, normalized=False) for token in PHI3_SPECIALS]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


HEADER, CONTENT, END = "<|im_start|>assistant\n", "message['content']", "<|im_end|>\n"
TRAINING = {
    "phi3": (phi3_tokenizer, phi3_training_chat_template),
    "phi3_plain": (FAMILIES["phi3_plain"][0], phi3_training_chat_template),
    "phi3_sentencepiece": (phi3_sentencepiece, phi3_training_chat_template),
    "phi3_5": (phi3_tokenizer, phi3_5_training_chat_template),
    "answer_and_end": (chatml_tokenizer, _marked_chatml(HEADER, f"{CONTENT} + {END!r}", "")),
    "whole_turn": (chatml_tokenizer, _marked_chatml("", f"{HEADER!r} + {CONTENT} + {END!r}", "")),
    "answer_alone": (chatml_tokenizer, _marked_chatml(HEADER, CONTENT, END)),
    "end_alone": (
        chatml_tokenizer,
        CHATML.replace("+ '<|im_end|>", "}}{% generation %}{{ '<|im_end|>").replace(
            "{% endfor %}", "{% endgeneration %}{% endfor %}"
        ),
    ),
    "all_turns": (
        phi3_tokenizer,
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% generation %}"
        "{{ message['content'] + '<|end|>\n' }}{% endgeneration %}{% endfor %}",
    ),
    "no_turn": (
        chatml_tokenizer,
        CHATML.replace("{% endfor %}", "{% endfor %}{% generation %}{% endgeneration %}"),
    ),
}


def _any_chat(generator):
    """Turns of all kinds: empty, with control tokens, with white space around them, with keys of their own."""
    pieces = [*PARTS, *PARTS, "<|end|>", "<|im_end|>", "<|assistant|>", " ", "\n"]
    keys = [{}, {}, {}, {}, {"train": True}, {"train": False}, {"weight": 0.5}, {"weight": 0}]

    def turn(role):
        content = "".join(generator.choices(pieces, k=generator.randint(1, 4)))
        content = generator.choice([content.strip(), content.strip(), content, ""])
        return {"role": role, "content": content, **generator.choice(keys)}

    chat = [system(generator.choice(["", "Be brief."]))] if generator.random() < 0.4 else []
    return chat + [turn(role) for role in ("user", "assistant") * generator.randint(1, 4)]


@pytest.mark.parametrize("family", TRAINING)
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_rows_of_a_training_template_are_trained_where_its_own_mask_says(family, train_on, monkeypatch):
    make, template = TRAINING[family]
    generator = random.Random(2)
    rows = [replace(_row(*_any_chat(generator)), weight=generator.choice((1, 2))) for _ in range(200)]
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
    rows = [_row(system(""), user(text), assistant(text)) for text in LANGUAGES.values()]
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
    tokenizer = _tokenizer(family)
    guarded = tokenizer._tokenizer = _Guarded(tokenizer._tokenizer)
    rows = load_rows(records).rows
    assert len(tokenize_rows(rows, tokenizer, training_template=template).rows) == len(records)
    assert guarded.intrusions == []


def test_more_rows_than_a_batch_keep_their_order_and_their_notes(monkeypatch):
    monkeypatch.setattr("phlora.data.row_tokenizer.BATCH_ROWS", 4)
    monkeypatch.setattr("phlora.data.tokenize_notes.MAX_NAMED_ORIGINS", 3)
    records = [{"messages": [user(f"{n}"), assistant(f" {n} <|end|>" if n % 2 else "b")]} for n in range(21)]
    result = tokenize_rows(load_rows(records).rows, _tokenizer("phi3"))
    assert [row.origin.line for row in result.rows] == list(range(1, 22))
    notes = {note.kind: note for note in result.notes}
    assert notes["control_tokens"].count == 10
    assert [origin.line for origin in notes["control_tokens"].origins] == [2, 4, 6]


def test_batches_give_what_single_rows_give():
    tokenizer = _tokenizer("phi3")
    rows = [_row(*_random_chat(seed)) for seed in range(30)]
    counts = []
    done = tokenize_rows(rows, tokenizer, progress=counts.append).rows
    assert [(row.input_ids, row.labels) for row in done] == [
        (row.input_ids, row.labels) for row in (tokenize_row(row, tokenizer) for row in rows)
    ]
    assert sum(counts) == 30


def test_train_on_and_the_keys_of_a_message():
    tokenizer = _tokenizer("phi3")
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]

    def trained(*messages, train_on="assistant"):
        return _trained(tokenizer, _run(tokenizer, *messages, train_on=train_on).rows[0])

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
    tokenizer = _tokenizer("chatml")
    chat = [
        user("a"),
        assistant("b", weight=0.5),
        user("c"),
        assistant("d"),
        user("e"),
        assistant("f", weight=0),
    ]
    (row,) = _run(tokenizer, *chat).rows
    weights = [weight for weight, label in zip(row.weights, row.labels, strict=True) if label != IGNORED]
    assert weights == [0.5, 0.5, 1.0, 1.0]
    assert not any(weight for weight, label in zip(row.weights, row.labels, strict=True) if label == IGNORED)
    assert _run(tokenizer, *chat[:1], assistant("b")).rows[0].weights is None


def test_a_message_without_weight_keeps_the_weight_of_its_file(tmp_path):
    import dataclasses

    row = dataclasses.replace(_row(user("a"), assistant("b", weight=0.5), assistant("c")), weight=2.0)
    weights = tokenize_row(row, _tokenizer("chatml")).weights
    assert [weight for weight in weights if weight] == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_contents_stay_text(family):
    tokenizer = _tokenizer(family)
    controls = [token for token in tokenizer.all_special_tokens if token != "<unk>"]
    controls.append(FAMILIES[family][2].strip())
    quoted = " and ".join(controls)
    chat = [user(f"ignore {quoted} please"), assistant(f"I see {quoted}{controls[0]}.")]
    result = _run(tokenizer, *chat)
    (row,) = result.rows
    harmless = [{**message, "content": "x"} for message in chat]
    control_ids = set(tokenizer.convert_tokens_to_ids(controls))
    expected = [
        token for token in tokenizer.apply_chat_template(harmless)["input_ids"] if token in control_ids
    ]
    assert [token for token in row.input_ids if token in control_ids] == expected
    assert _kinds(result) == {"control_tokens"}
    assert f"I see {quoted}{controls[0]}." in _text(tokenizer, row)
    prompt = encode_chat(chat[:1], tokenizer)
    assert row.input_ids[: len(prompt) - 1] == prompt[:-1]


def test_a_control_token_that_cannot_be_plain_text_is_broken_up():
    tokenizer = _tokenizer("chatml")
    tokenizer.add_tokens(["<turn>"])  # an added token that is not flagged as special is never split
    tokenizer.chat_template = CHATML.replace("'\n' + message", "'<turn>' + message")
    result = _run(tokenizer, user("a <turn> b"), assistant("c"))
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert result.rows[0].input_ids.count(turn) == 2
    assert "a <\u200bturn> b" in _text(tokenizer, result.rows[0])
    assert _kinds(result) == {"control_tokens_broken"}


def test_tools_stay_where_a_control_token_is_broken_up():
    tokenizer = _tokenizer("chatml")
    tokenizer.add_tokens(["<turn>"])
    named = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    tokenizer.chat_template = named + CHATML.replace("'\n' + message", "'<turn>' + message")
    tools = [{"type": "function", "function": {"name": "probe", "parameters": {}}}]
    chat = [user("a <turn> b"), assistant("c")]
    result = tokenize_rows(load_rows([{"messages": chat, "tools": tools}]).rows, tokenizer)
    assert "control_tokens_broken" in _kinds(result)
    expected = [user("a <\u200bturn> b"), assistant("c")]
    assert result.rows[0].input_ids == tokenizer.apply_chat_template(expected, tools=tools)["input_ids"]


def test_swallowed_white_space_is_told():
    result = _run(_tokenizer("phi3"), user("a"), assistant("\n\n    def f()"))
    assert _kinds(result) == {"leading_whitespace"}
    assert [str(origin) for origin in result.notes[0].origins] == ["rows:1"]
    assert _trained(_tokenizer("phi3"), result.rows[0]) == "def f()<|end|><|endoftext|>"
    assert _kinds(_run(_tokenizer("phi3_plain"), user("a"), assistant("\n\n    def f()"))) == set()


@pytest.mark.parametrize("family", TRAINING)
def test_white_space_before_an_answer_does_not_change_what_is_trained_before_it(family):
    make, template = TRAINING[family]
    tokenizer = make(template)
    before = {}
    for content in ("def f()", " \n def f()"):
        chat = [user("a"), assistant(content), user("b"), assistant(content)]
        result = tokenize_rows([_row(*chat)], tokenizer, training_template=template)
        trained = _trained(tokenizer, result.rows[0])
        before[content] = [part.rstrip() for part in trained.split("def f()")]
    plain, spaced = before.values()
    assert spaced == plain


@pytest.mark.parametrize("family", ["phi3", "llama2"])
def test_a_system_prompt_the_template_has_no_place_for_joins_the_first_user_turn(family):
    tokenizer = _tokenizer(family)
    if family == "phi3":
        tokenizer.chat_template = PHI3_WITHOUT_SYSTEM
    chat = [system(LANGUAGES["hi"]), user("Hi"), assistant("Hello")]
    result = _run(tokenizer, *chat)
    assert f"{LANGUAGES['hi']}\n\nHi" in _text(tokenizer, result.rows[0])
    assert _kinds(result) == {"system_folded"}
    prompt = encode_chat(chat[:2], tokenizer)
    assert result.rows[0].input_ids[: len(prompt)] == prompt


def test_an_empty_system_prompt_is_no_loss():
    tokenizer = phi3_tokenizer(PHI3.replace("== 'system'", "== 'system' and message['content']"))
    result = _run(tokenizer, system(""), user("Hi"), assistant("Hello"))
    assert _text(tokenizer, result.rows[0]) == "<|user|>Hi<|end|><|assistant|>Hello<|end|><|endoftext|>"
    assert _kinds(result) == set()


def test_a_system_prompt_of_the_template_itself_is_told():
    head = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nI am Bot<|im_end|>\n' }}{% endif %}"
    result = _run(chatml_tokenizer(head + CHATML), user("Hi"), assistant("Hello"))
    assert _kinds(result) == {"default_system"}
    assert "'I am Bot'" in result.notes[0].message
    assert (
        _kinds(_run(chatml_tokenizer(head + CHATML), system("Be"), user("Hi"), assistant("Hello"))) == set()
    )


def test_a_turn_the_template_leaves_out_is_an_error():
    tokenizer = phi3_tokenizer(PHI3.replace("message['role'] == 'assistant'", "false"))
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    (skip,) = _run(tokenizer, *chat).skipped
    assert (skip.kind, skip.reason) == ("not_rendered", "the chat template leaves out turn 2 (assistant)")
    with pytest.raises(DataError, match="rows:1: The chat template leaves out turn 2"):
        tokenize_rows([_row(*chat)], tokenizer)
    (skip,) = _run(_tokenizer("llama2"), user("a"), system("b"), assistant("c")).skipped
    assert "Only user and assistant roles" in skip.reason


TOOLS = [{"type": "function", "function": {"name": "lamp", "parameters": {}}}]
TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_tool_calls_are_trained_where_the_template_writes_them():
    tokenizer = chatml_tokenizer(TOOL_TEMPLATE)
    call = {"type": "function", "function": {"name": "lamp", "arguments": {"on": True}}}
    chat = [
        user("on"),
        assistant(None, tool_calls=[call]),
        {"role": "tool", "content": "ok"},
        assistant("Done"),
    ]
    result = _run(tokenizer, *chat, tools=TOOLS)
    called = '<call>{"name": "lamp", "arguments": {"on": true}}</call><|im_end|>'
    assert _trained(tokenizer, result.rows[0]) == called + "Done<|im_end|>"
    assert '"parameters"' in _text(tokenizer, result.rows[0])
    assert _kinds(result) == set()
    both = _run(tokenizer, user("on"), assistant("Yes", tool_calls=[call]))
    assert _trained(tokenizer, both.rows[0]) == "Yes" + called


@pytest.mark.parametrize("family", ["phi3", "chatml", "llama2"])
def test_tools_and_calls_that_the_template_has_no_place_for_are_text(family):
    call = {"type": "function", "function": {"name": "lamp", "arguments": {}}}
    tokenizer = _tokenizer(family)
    result = _run(tokenizer, user("on"), assistant("", tool_calls=[call]), tools=TOOLS)
    assert "tools_as_text" in _kinds(result)
    assert '<tool_call>\n{"name": "lamp", "arguments": {}}\n</tool_call>' in _trained(
        tokenizer, result.rows[0]
    )


def test_a_template_without_end_token_is_told():
    template = CHATML.replace("<|im_end|>\n", "\n\n").replace("<|im_start|>", "## ")
    result = _run(chatml_tokenizer(template), user("a"), assistant("b"))
    assert _kinds(result) == {"missing_end_token"}


def test_an_end_marker_that_is_no_token_is_trained_too():
    tokenizer = chatml_tokenizer(CHATML.replace("im_end", "fin").replace("im_start", "go"))
    assert _trained(tokenizer, _run(tokenizer, user("a"), assistant("b")).rows[0]).startswith("b<|fin|>")


# ------------------------------------------------------------------------------------------------ long rows


def _length(tokenizer, *messages):
    return len(tokenizer.apply_chat_template(list(messages))["input_ids"])


@pytest.mark.parametrize("family", ["phi3", "chatml", "llama2"])
def test_history_is_cut_by_whole_exchanges_and_never_the_last(family):
    tokenizer = _tokenizer(family)
    exchanges = [(user(f"question {n}"), assistant(f"answer {n} " * n)) for n in range(1, 6)]
    chat = [message for exchange in exchanges for message in exchange]
    for kept in range(1, 6):
        expected = [message for exchange in exchanges[-kept:] for message in exchange]
        limit = _length(tokenizer, *expected)
        result = _run(tokenizer, *chat, max_length=limit)
        assert result.rows[0].input_ids == tokenizer.apply_chat_template(expected)["input_ids"]
        assert result.rows[0].num_cut_messages == 10 - 2 * kept
        assert len(result.cut) == (kept < 5)
    (skip,) = _run(tokenizer, *chat, max_length=_length(tokenizer, *exchanges[-1]) - 1).skipped
    assert skip.kind == "too_long"


def test_the_system_prompt_survives_and_tool_turns_stay_with_their_question():
    tokenizer = _tokenizer("chatml")
    last = [user("c"), assistant("look"), {"role": "tool", "content": "42"}, assistant("d")]
    chat = [system("Be brief"), user("a" * 40), assistant("b"), *last]
    (row,) = _run(tokenizer, *chat, max_length=_length(tokenizer, chat[0], *last) + 2).rows
    assert row.input_ids == tokenizer.apply_chat_template([chat[0], *last])["input_ids"]


def test_a_cut_row_is_noted_once():
    tokenizer = phi3_tokenizer(PHI3_WITHOUT_SYSTEM)
    chat = [system("s"), *[message for n in range(8) for message in (user(f"{n}"), assistant("b"))]]
    result = _run(tokenizer, *chat, max_length=20)
    assert [(note.kind, note.count) for note in result.notes] == [("system_folded", 1)]


def test_drop_error_and_rows_without_history():
    tokenizer = _tokenizer("phi3")
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    (skip,) = _run(tokenizer, *chat, max_length=9, too_long="drop").skipped
    assert skip.reason == "the row has 13 tokens, more than max_length=9"
    with pytest.raises(DataError, match="rows:1: The row has 13 tokens"):
        _run(tokenizer, *chat, max_length=9, too_long="error")
    plain = load_rows([{"prompt": "long " * 20, "completion": "x"}]).rows[0]
    assert isinstance(tokenize_row(plain, tokenizer, max_length=9), Skipped)


def test_a_cut_that_leaves_nothing_to_train_skips_the_row():
    chat = [user("a" * 30), assistant("b"), user("c"), assistant("d", train=False)]
    (skip,) = _run(_tokenizer("phi3"), *chat, max_length=12).skipped
    assert skip.kind == "no_trained_token"


def test_no_answer_and_no_row_left():
    with pytest.raises(DataError, match="rows:1: The chat has no assistant turn"):
        tokenize_rows([_row(user("a"))], _tokenizer("phi3"))
    with pytest.raises(DataError, match="No row is left to train on.*1 too long"):
        tokenize_rows([_row(user("a" * 50), assistant("b"))], _tokenizer("phi3"), max_length=10)
    assert len(_run(_tokenizer("phi3"), user("a"), train_on="all").rows) == 1


# ------------------------------------------------------------------------------------------------ plain rows


def _plain(tokenizer, **record):
    return tokenize_rows(load_rows([record]).rows, tokenizer)


def test_plain_completion_is_trained_with_the_end_token():
    tokenizer = _tokenizer("phi3")
    (row,) = _plain(tokenizer, prompt="1 + 1 = ", completion="سلام").rows
    assert _trained(tokenizer, row) == "سلام<|endoftext|>"
    prompt = encode_prompt(load_rows([{"prompt": "1 + 1 = ", "completion": "2"}]).rows[0], tokenizer)
    assert (tokenizer.decode(prompt.prompt_ids), prompt.reference) == ("1 + 1 = ", "2")


@pytest.mark.parametrize("text", ["Once upon", "<s>Once upon", "<s>Once upon</s>"])
def test_plain_text_has_one_bos_and_one_end_token(text):
    tokenizer = _tokenizer("llama2")
    (row,) = _plain(tokenizer, text=text).rows
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (row.input_ids.count(bos), row.input_ids.count(eos), row.labels[-1]) == (1, 1, eos)
    assert row.labels.count(IGNORED) <= 1
    assert _kinds(_plain(tokenizer, text=text)) == set()


def test_a_rendered_chat_as_text_is_told_and_not_ended_twice():
    tokenizer = _tokenizer("phi3")
    text = tokenizer.apply_chat_template([user("a"), assistant("b")], tokenize=False)
    result = _plain(tokenizer, text=text)
    assert _kinds(result) == {"pre_rendered"}
    assert result.rows[0].input_ids.count(tokenizer.eos_token_id) == 1


def test_a_hand_made_prompt_with_control_tokens_is_told_and_kept():
    tokenizer = _tokenizer("phi3")
    result = _plain(tokenizer, prompt="<|user|>\na<|end|>\n<|assistant|>\n", completion="b<|end|>")
    assert _kinds(result) == {"pre_rendered"}
    assert _trained(tokenizer, result.rows[0]) == "b<|end|>"
    assert tokenizer.convert_tokens_to_ids("<|user|>") in result.rows[0].input_ids


def test_rows_without_messages_need_no_chat_template():
    tokenizer = _tokenizer("phi3")
    tokenizer.chat_template = None
    assert isinstance(tokenize_row(load_rows([{"text": "a"}]).rows[0], tokenizer), TokenizedRow)
    with pytest.raises(ModelError, match="no chat template"):
        tokenize_row(_row(user("a"), assistant("b")), tokenizer)


def test_prompts_of_rows_without_an_answer():
    tokenizer = _tokenizer("phi3")
    assert encode_prompt(_row(user("a")), tokenizer) is None
    assert encode_prompt(load_rows([{"text": "a"}]).rows[0], tokenizer) is None
    item = encode_prompt(_row(user("a"), assistant("b"), user("c")), tokenizer)
    assert (item.reference, tokenizer.decode(item.prompt_ids)) == ("b", "<|user|>a<|end|><|assistant|>")


def test_the_pad_token_does_not_take_the_end_token_away():
    tokenizer = _tokenizer("phi3")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (row,) = _run(tokenizer, user("a"), assistant("b")).rows
    assert row.labels[-1] == tokenizer.eos_token_id


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
