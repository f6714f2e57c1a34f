"""Keys of other tools: none that says what may be trained is dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trl.chat_template_utils import phi3_training_chat_template

from phlora.data.checks import check, preview
from phlora.data.dataset import load_rows
from phlora.data.inspection import SplitSettings, inspect_data
from phlora.data.known_keys import COLUMNS, MESSAGE_KEYS, table
from phlora.data.tokenize import IGNORED, tokenize_row
from phlora.errors import DataError
from phlora.testing import phi3_tokenizer


def _chat(**keys):
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **keys}]


def _two_answers(**keys):
    return {
        "messages": [
            *_chat(**keys),
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Ciao"},
        ]
    }


def _trained(record):
    tokenizer = phi3_tokenizer()
    row = tokenize_row(load_rows([record]).rows[0], tokenizer)
    return tokenizer.decode(
        [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED]
    )


def _weights(record):
    row = tokenize_row(load_rows([record]).rows[0], phi3_tokenizer())
    return {weight for weight in row.weights or [1.0] if weight}


def _found(records):
    return {(p.kind, p.severity) for p in load_rows(records, on_bad="collect").problems}


@pytest.mark.parametrize(
    "keys",
    [
        {"loss": False},
        {"loss": 0},
        {"loss_weight": 0},
        {"loss_scale": 0.0},
        {"weight": 0},
        {"train": False},
        {"train": 0},
        {"trainable": False},
        {"training": "false"},
        {"train_on_turn": False},
        {"masked": True},
        {"loss_mask": 0},
        {"train_detail": [{"begin_offset": 0, "end_offset": 4, "train": False}]},
    ],
    ids=lambda keys: json.dumps(keys)[:30],
)
def test_turns_that_may_not_be_trained_are_not(keys):
    assert _trained(_two_answers(**keys)).startswith("Ciao")
    as_sharegpt = [
        {
            "from": {"user": "human", "assistant": "gpt"}[m["role"]],
            "value": m["content"],
            **{k: m[k] for k in keys if k in m},
        }
        for m in _two_answers(**keys)["messages"]
    ]
    assert _trained({"conversations": as_sharegpt}).startswith("Ciao")


@pytest.mark.parametrize(
    ("keys", "weight"), [({"loss_weight": 0.5}, 0.5), ({"loss_scale": 2}, 2.0), ({"loss": 0.25}, 0.25)]
)
def test_weights_of_turns(keys, weight):
    assert _weights(_two_answers(**keys)) == {1.0, weight}
    assert _weights(_two_answers(**keys, weight=0.5)) == {1.0, weight / 2}


@pytest.mark.parametrize("name", ["weight", "sample_weight", "loss_weight", "loss_scale"])
@pytest.mark.parametrize(
    "row", [{"messages": _chat()}, {"question": "Hi", "answer": "Hello"}, {"prompt": "a", "completion": "b"}]
)
def test_weights_of_rows(name, row):
    assert _weights({**row, name: 0.5}) == {0.5}
    report = check([row, {**row, name: 0}], phi3_tokenizer())
    assert report.num_usable_rows == 1 and report.exit_code() == 0
    assert ("wrong_type", "error") in _found([{**row, name: "heavy"}, row])
    assert not load_rows([{**row, name: None}]).problems


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"train": False}, "`train`"),
        ({"loss": 0}, "`loss`"),
        ({"Masked": True}, "`masked`"),
        ({"weight": 0}, "`weight`"),
        ({"weight": 2, "sample_weight": 0, "train": True}, "`sample_weight`"),
        ({"exclude": True}, "`exclude`"),
        ({"Do Not Train": "true"}, "`do_not_train`"),
    ],
    ids=str,
)
def test_rows_that_say_so_are_left_out_and_the_column_is_named(keys, named):
    rows = [{"messages": _chat()}, {"messages": _chat(), **keys}]
    for tokenizer in (None, phi3_tokenizer()):
        report = check(rows, tokenizer)
        assert report.num_usable_rows == 1
        (note,) = [problem for problem in report.problems if problem.kind == "weight_zero"]
        assert f"({named})" in note.message
    (shown,) = preview(load_rows(rows[1:]).rows, phi3_tokenizer(), 1)
    assert f"({named})" in shown.skipped


@pytest.mark.parametrize(
    "keys",
    [{"weight": 0}, {"train": False}, {"trainable": False}, {"Ignore": True}, {"loss_mask": 0}],
    ids=str,
)
@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_rows_whose_messages_say_so_are_left_out_and_counted(keys, train_on):
    def silent(n):
        return [{"role": "user", "content": f"Hi {n}"}, _chat(**keys)[1]]

    rows = [{"messages": [silent(n)[0], _chat()[1]] if n % 2 else silent(n)} for n in range(40)]
    for tokenizer in (None, phi3_tokenizer()):
        report = check(rows, tokenizer, train_on=train_on)
        assert report.num_usable_rows == 20
        (note,) = [problem for problem in report.problems if problem.kind == "weight_zero"]
        assert (note.severity, note.count) == ("note", 20)
    found = inspect_data(rows, train_on=train_on, split=SplitSettings(eval_size=0.5))
    assert all(number % 2 for number in found.held_out.numbers)
    # What is asked of the model trains then.
    assert check(rows, phi3_tokenizer(), train_on="all").num_usable_rows == 40


@pytest.mark.parametrize("column", ["exclude", "skip", "ignored"])
@pytest.mark.parametrize("value", [False, "no reason", 3, None, []])
def test_a_column_that_says_nothing_of_training_leaves_no_row_out(column, value):
    assert check([{"messages": _chat(), column: value}]).num_usable_rows == 1


@pytest.mark.parametrize(
    "columns",
    [
        {"status": "Rejected"},
        {"Subset": "test"},
        {"dataset_split": "validation"},
        {"approved": False},
        {"is valid": "false"},
        {"isTest": 1},
    ],
    ids=str,
)
def test_rows_that_others_keep_out_are_warned_of(columns):
    assert _found([{"messages": _chat(), **columns}]) == {("held_out_split", "warning")}
    usual = {"status": "submitted", "subset": "default", "approved": True, "dataset_split": "train"}
    assert _found([{"messages": _chat(), **usual}]) == set()


@pytest.mark.parametrize(
    "keys",
    [
        {"mask": 1},
        {"train_detail": [{"train": True}, {"train": False}]},
        {"loss": "some"},
        {"rejected": True},
    ],
)
def test_flags_that_cannot_be_followed_are_errors(keys):
    with pytest.raises(DataError, match="turn 2|Turn 2"):
        load_rows([_two_answers(**keys)])


PREFERENCES = {
    "OpenAI": {
        "input": {"messages": [{"role": "user", "content": "Hi"}]},
        "preferred_output": [{"role": "assistant", "content": "Hello"}],
        "non_preferred_output": [{"role": "assistant", "content": "Go"}],
    },
    "TRL": {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
    "TRL's": {"chosen": _chat(), "rejected": [_chat()[0], {"role": "assistant", "content": "Go"}]},
    "HH-RLHF": {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"},
    "UltraFeedback": {
        "prompt": "Hi",
        "prompt_id": "1",
        "chosen": _chat(),
        "rejected": _chat(),
        "messages": _chat(),
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    },
    "form of UltraFeedback": {
        "instruction": "Hi",
        "completions": [
            {"response": "Go", "overall_score": 2.0},
            {"response": "Hello", "overall_score": 9.0},
        ],
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello"},
        "rejected": {"from": "gpt", "value": "Go"},
    },
    "swift": {"messages": _chat(), "rejected_response": "Go"},
    "ranked": {"question": "Hi", "response_j": "Hello", "response_k": "Go"},
    "KTO": {"prompt": "Hi", "completion": "Hello", "label": True},
    "marked": {"messages": _chat(), "kto_tag": True},
    "swift's": {"messages": _chat(), "label": True},
    "alpaca": {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "Go"},
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_are_called_by_their_name_and_offer_the_chosen_side(name):
    record = PREFERENCES[name]
    with pytest.raises(DataError, match="preference_chosen") as refused:
        load_rows([record] * 3)
    assert any(word in str(refused.value) for word in ("preference pairs", "ranked", "rated", "KTO"))
    (row,) = load_rows([record], format="preference_chosen").rows
    assert [(m["role"], m["content"]) for m in row.messages] == [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    "record", [{"prompt": "Hi", "completion": "Go", "label": False}, {"messages": _chat(), "kto_tag": False}]
)
def test_bad_answers_are_left_out_of_the_chosen_side(record):
    good = {**record, **{key: True for key in ("label", "kto_tag") if key in record}}
    found = load_rows([record, good], format="preference_chosen", on_bad="collect")
    assert [row.origin.line for row in found.rows] == [2]
    assert [(p.kind, p.severity) for p in found.problems] == [("rejected_answer", "note")]


def test_a_rejected_answer_among_chats_is_an_error():
    rows = [{"messages": _chat()} for _ in range(70)] + [{"messages": _chat(), "rejected_response": "Go"}]
    assert _found(rows) == {("preference", "error")}


@pytest.mark.parametrize(
    "record",
    [{"text": "great", "label": 1}, {"text": "great", "label": "pos"}, {"text": "great", "sentiment": "pos"}],
)
def test_labels_are_not_dropped(record):
    with pytest.raises(DataError, match="classification"):
        load_rows([record])
    (row,) = load_rows([record], format="classification").rows
    label = str(record.get("label", record.get("sentiment")))
    assert [m["content"] for m in row.messages] == ["great", label]
    (row,) = load_rows([{**record, "label_text": "positive"}], format="classification").rows
    assert row.messages[1]["content"] == "positive"


@pytest.mark.parametrize(
    "record",
    [
        {"type": "message", "user": "U1", "text": "lunch?", "ts": "1.2"},
        {"message_id": "a", "parent_id": "b", "text": "Hi", "role": "prompter"},
    ],
)
def test_single_messages_are_not_trained_as_texts(record):
    with pytest.raises(DataError):
        load_rows([record])


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"images": ["a.png"]}, {("media", "error")}),
        ({"images": []}, set()),
        ({"split": "test"}, {("held_out_split", "warning")}),
        ({"split": "train"}, set()),
        ({"choices": ["a", "b"]}, {("unused_column", "warning")}),
        ({"score": 3}, {("unused_column", "warning")}),
        ({"label": "x"}, {("unused_column", "warning")}),
        ({"source": "web"}, {("ignored_columns", "note")}),
    ],
    ids=str,
)
def test_columns_beside_a_chat(columns, found):
    assert _found([{"messages": _chat(), **columns}]) == found
    report = check([{"messages": _chat(), **columns}])
    assert report.exit_code(strict=True) == (
        0 if found <= {("ignored_columns", "note")} else 2 if "error" in str(found) else 1
    )


def test_a_passage_stands_before_its_question():
    (row,) = load_rows([{"context": "Paris is in France.", "question": "Where?", "answer": "France"}]).rows
    assert row.messages[0]["content"] == "Paris is in France.\n\nWhere?"


@pytest.mark.parametrize("name", ["system_prompt", "system_message"])
def test_the_system_prompt_under_other_names(name):
    (row,) = load_rows([{name: "Be kind.", "question": "Hi", "response": "x", "answer": "Hello"}]).rows
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant"]


def test_flags_of_parts_hold_for_the_turn_or_are_refused():
    parts = [{"type": "text", "text": "Hel", "loss": False}, {"type": "text", "text": "lo", "masked": True}]
    record = _two_answers()
    record["messages"][1]["content"] = parts
    assert _trained(record).startswith("Ciao")
    parts[1]["masked"] = False
    with pytest.raises(DataError, match="some of its parts"):
        load_rows([record])


def test_a_trained_question_is_trained_beside_generation_markers_too():
    template = phi3_training_chat_template
    row = {"messages": [{**_chat()[0], "train": True}, _chat()[1]]}
    tokenizer = phi3_tokenizer()
    texts = []
    for options in ({}, {"training_template": template}):
        found = tokenize_row(load_rows([row]).rows[0], tokenizer, **options)
        pairs = zip(found.input_ids, found.labels, strict=True)
        texts.append(tokenizer.decode([token for token, label in pairs if label != IGNORED]))
    assert texts[0].startswith("Hi<|end|>") and texts[1].startswith("Hi<|end|>")


def test_unknown_message_keys_are_noted_once():
    loaded = load_rows([{"messages": _chat(mood="good")}] * 3)
    (note,) = loaded.problems
    assert note.severity == "note" and "`mood`" in note.message


def test_rows_without_known_keys_pay_nothing():
    from phlora.data.heeding import Findings, heed
    from phlora.data.rows import Origin

    record = {"messages": _chat()}
    assert heed(record, "messages", Findings(), Origin("a", 1)).record is record


def test_the_page_lists_the_table():
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert table(COLUMNS) in page and table(MESSAGE_KEYS) in page


@pytest.mark.parametrize(
    "good, bad", [("True", "False"), ("1", "0"), ("1.0", "0.0"), ("good", "bad"), (1, 0)]
)
def test_answers_that_a_table_marks_as_bad_are_never_trained(tmp_path, good, bad):
    path = tmp_path / "kto.csv"
    lines = [f"q{n},a{n},{good if n % 2 else bad}" for n in range(6)]
    path.write_text("\n".join(["prompt,completion,label", *lines]))
    with pytest.raises(DataError, match="KTO"):
        load_rows(path)
    rows = load_rows(path, format="preference_chosen", on_bad="collect").rows
    assert [row.messages[-1]["content"] for row in rows] == ["a1", "a3", "a5"]


def test_a_tag_of_a_table_is_a_mark_and_a_class_beside_a_pair_is_none():
    with pytest.raises(DataError, match="KTO"):
        load_rows([{"question": "q", "answer": "a", "kto_tag": "false"}])
    assert len(load_rows([{"question": "q", "answer": "a", "label": 1}]).rows) == 1


@pytest.mark.parametrize(
    "columns",
    [
        {"is_correct": False},
        {"thumbs": "down"},
        {"stars": 1},
        {"set": "test"},
        {"A": "x", "B": "y", "C": "z", "D": "w"},
        {"option1": "x", "option2": "y"},
        {"opa": "x", "opb": "y"},
        {"choice_a": "x", "choice_b": "y"},
    ],
    ids=lambda columns: ",".join(columns),
)
def test_what_a_pair_is_not_trained_with_is_warned_of(columns):
    found = load_rows([{"question": "q", "answer": "a", **columns}], on_bad="collect").problems
    warned = [problem.message for problem in found if problem.severity == "warning"]
    assert len(warned) == 1
    assert all(f"`{name}" in warned[0] for name in columns)
    assert not [problem for problem in found if problem.severity == "note"]


@pytest.mark.parametrize("name", ["summary", "translation", "intent", "emotion"])
def test_an_answer_beside_a_text_is_warned_of(name):
    (found,) = load_rows([{"text": "t", name: "x"}], on_bad="collect").problems
    assert found.severity == "warning"
    assert f"question=text,answer={name}" in found.message


def test_a_text_with_a_role_is_a_message_of_a_chat():
    with pytest.raises(DataError, match="single messages of a chat"):
        load_rows([{"role": "user", "text": "Hi"}])


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"images": ["x.png"]}, {("media", "error")}),
        ({"Audio": "x.wav"}, {("media", "error")}),
        ({"images": []}, set()),
        ({"rating": 1}, {("unused_key", "warning")}),
        ({"feedback": None}, set()),
    ],
    ids=str,
)
def test_pictures_and_ratings_of_messages(keys, found):
    for number in (0, 1):
        turns = _chat()
        turns[number] |= keys
        assert _found([{"messages": turns}]) == found


def test_a_row_with_several_rated_turns_counts_once():
    rows = [{"messages": [*_chat(rating=1), *_chat(rating=2)]}] * 3
    (problem,) = load_rows(rows).problems
    assert problem.kind == "unused_key" and problem.count == 3
    assert [origin.line for origin in problem.origins] == [1, 2, 3]


def test_turns_spelled_out_in_a_prompt_are_refused():
    for text in (json.dumps(_chat()[:1]), str(_chat()[:1])):
        for record in ({"prompt": text, "response": "x"}, {"prompt": text, "completion": "x"}):
            assert _found([record]) == {("wrong_type", "error")}
    assert not _found([{"prompt": "[1] and a role: x", "completion": "b"}])


def test_a_list_of_flags_beside_a_chat_is_refused():
    for name in ("loss_mask", "mask"):
        kinds = {severity for _, severity in _found([{"messages": _chat(), name: [0, 1]}])}
        assert kinds == {"error"}
    assert _found([{"messages": _chat(), "weight": "1_0"}]) == {("wrong_type", "error")}
