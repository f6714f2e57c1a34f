"""Of every dialect of preference data the chosen side is trained, and never the rejected one."""

from __future__ import annotations

from typing import Any

import pytest

from phlora.data.dataset import load_rows
from phlora.data.preferences import chosen_side, kto_mark, preference_kind
from phlora.data.rows import BadRow
from phlora.errors import DataError

ASKED = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
CHAT = [ASKED, GOOD]

DIALECTS: dict[str, dict[str, Any]] = {
    "TRL": {"prompt": "Hi", "chosen": "good", "rejected": "bad"},
    "TRL, chats": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "TRL, whole chats": {"chosen": CHAT, "rejected": [ASKED, BAD]},
    "UltraFeedback": {"prompt": "Hi", "chosen": CHAT, "rejected": [ASKED, BAD], "score_chosen": 9.0},
    "UltraFeedback, several": {
        "instruction": "Hi",
        "completions": [
            {"response": "bad", "overall_score": 3},
            {"response": "good", "overall_score": 9},
            {"response": "bad", "overall_score": 8.5},
            {"response": "unrated"},
            "no object",
        ],
    },
    "LLaMA-Factory": {"conversations": [ASKED], "chosen": GOOD, "rejected": BAD},
    "swift": {"messages": [ASKED], "response": "good", "rejected_response": "bad"},
    "swift, whole chat": {"messages": CHAT, "rejected_messages": [ASKED, BAD]},
    "OpenAI": {
        "input": {"messages": [ASKED]},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "HH-RLHF": {"chosen": "\n\nHuman: Hi\n\nAssistant: good", "rejected": "\n\nHuman: Hi\n\nAssistant: bad"},
    "StackExchange": {"question": "Hi", "response_j": "good", "response_k": "bad"},
    "SHP, first": {"history": "Hi", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1},
    "SHP, second": {"history": "Hi", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0},
    "SHP, first, of a table": {"history": "Hi", "human_ref_A": "good", "human_ref_B": "bad", "labels": "1"},
    "SHP, second, of a table": {
        "history": "Hi",
        "human_ref_A": "bad",
        "human_ref_B": "good",
        "labels": "0.0",
    },
    "KTO": {"prompt": "Hi", "completion": "good", "label": True},
    "KTO of a table": {"prompt": "Hi", "completion": "good", "label": "True"},
    "KTO, swift": {"messages": CHAT, "label": True},
    "KTO, LLaMA-Factory": {"conversations": CHAT, "kto_tag": "1"},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_chosen_side_is_the_good_answer_to_the_question(dialect: str) -> None:
    record = DIALECTS[dialect]
    assert preference_kind(record) is not None
    assert chosen_side(record) == CHAT


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_empty_column_beside_it_changes_nothing(dialect: str) -> None:
    """A table with rows of several kinds has empty cells in the columns of the others."""
    empty = {
        name: None for name in ("completions", "labels", "kto_tag", "system") if name not in DIALECTS[dialect]
    }
    assert chosen_side({**DIALECTS[dialect], **empty}) == CHAT


def test_a_system_prompt_stands_before_the_question_once() -> None:
    record = {"system": "Be brief.", "prompt": "Hi", "chosen": "good", "rejected": "bad"}
    system = {"role": "system", "content": "Be brief."}
    assert chosen_side(record) == [system, *CHAT]
    assert chosen_side({**record, "prompt": [system, ASKED]}) == [system, *CHAT]
    longer = {"instruction": "Hi", "input": "there", "chosen": "good", "rejected": "bad"}
    assert chosen_side(longer)[0]["content"] == "Hi\n\nthere"


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        ({"prompt": "Hi", "completion": "bad", "label": False}, "rejected_answer", "marked as bad"),
        ({"messages": CHAT, "kto_tag": "0"}, "rejected_answer", "marked as bad"),
        ({"prompt": "Hi", "completion": "good"}, "missing_column", "no preference data"),
        ({"prompt": "Hi", "completions": ["a"], "labels": [True]}, "preference", "step by step"),
        ({"instruction": "Hi", "completions": [{"response": "x"}]}, "wrong_type", "no rated `response`"),
        ({"instruction": "Hi", "completions": [{"overall_score": 5}]}, "wrong_type", "no rated `response`"),
        ({"prompt": "Hi", "chosen": 5, "rejected": "bad"}, "wrong_type", "the chosen answer is"),
        ({"prompt": 5, "chosen": "good", "rejected": "bad"}, "wrong_type", "the prompt is"),
        ({"history": "Hi", "human_ref_A": "a", "human_ref_B": "b"}, "preference", "does not say which"),
        (
            {"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 2},
            "preference",
            "not say which",
        ),
    ],
)
def test_what_has_no_chosen_side_is_refused(record: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(BadRow, match=message) as caught:
        chosen_side(record)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("record", "mark"),
    [
        ({"kto_tag": " Good "}, True),
        ({"kto_tag": False}, False),
        ({"completion": "x", "label": "bad"}, False),
        # A number is a mark under TRL's own names; elsewhere it may be a class.
        ({"prompt": "p", "completion": "x", "label": 1}, True),
        ({"response": "x", "label": 1}, None),
        ({"text": "x", "label": True}, None),
    ],
)
def test_marks_of_single_answers(record: dict[str, Any], mark: bool | None) -> None:
    assert kto_mark(record) is mark


def _ultra(**scores):
    return {
        "instruction": "Hi",
        "completions": [
            {"response": name, **(s if isinstance(s, dict) else {"overall_score": s})}
            for name, s in scores.items()
        ],
    }


def _chosen(record):
    (row,) = load_rows([record], format="preference_chosen").rows
    return row.messages[-1]["content"]


def test_a_score_of_another_scale_does_not_win_over_the_ratings():
    ratings = {"helpfulness": {"Rating": "2"}, "honesty": {"Rating": "1"}, "truthfulness": {"Rating": "N/A"}}
    wild = {"overall_score": 85, "fine-grained_score": 1.5}
    assert _chosen(_ultra(bad=wild, good={"overall_score": 8.0, "fine-grained_score": 4.5})) == "good"
    rated = {"overall_score": 85, "annotations": ratings}
    assert _chosen(_ultra(bad=rated, good={"overall_score": 8.0, "fine-grained_score": 4.0})) == "good"
    assert _chosen(_ultra(good={"overall_score": 85, "fine-grained_score": 4.5}, bad=8.0)) == "good"
    assert _chosen(_ultra(bad=70, good=85)) == "good"
    with pytest.raises(DataError, match="85"):
        load_rows([_ultra(a=85, b=8.0)], format="preference_chosen")


@pytest.mark.parametrize(
    "record",
    [
        {"completion": "B", "label": True},
        {"chosen": "B", "rejected": "C"},
        {
            "chosen": [{"role": "assistant", "content": "B"}],
            "rejected": [{"role": "assistant", "content": "C"}],
        },
    ],
    ids=["KTO", "texts", "messages"],
)
@pytest.mark.parametrize("is_explicit", [True, False])
def test_answers_of_the_prompt_are_not_trained(record, is_explicit):
    asked = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "b"},
    ]
    if is_explicit:
        record = {"prompt": asked, **record}
    elif isinstance(record.get("chosen"), list):
        record = {side: [*asked, *record[side]] for side in ("chosen", "rejected")}
    else:
        record = {"messages": asked, **record}
    (row,) = load_rows([record], format="preference_chosen").rows
    assert [m.get("train", True) for m in row.messages if m["role"] == "assistant"] == [False, True]
