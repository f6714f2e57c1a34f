"""Preference data of every dialect: recognised by name, and its chosen side as a chat.

Supervised training learns every answer that it is shown, so rejected answers may not reach it. Asked for by
`format: preference_chosen`, the chosen side is trained and the rest is left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from phlora.data.rows import BadRow, kind_of

FIX = "`--format preference_chosen` (or `format: preference_chosen`) trains on the chosen side"
LEFT_OUT = "rejected_answer"
_HH = re.compile(r"\n\n(Human|Assistant):")
_FULL_MARKS = 10.0
# Further apart than this, an overall score and twice the mean rating do not speak of the same answer.
_FAR = 4.0
_SIDES = ("chosen", "rejected", "preferred_output", "non_preferred_output")
_ANSWERS = ("completion", "response", "output", "answer")
_MARKS = {"true": True, "good": True, "false": False, "bad": False}
# What only a table or TRL's own names make a mark: elsewhere they may be a class.
_ALL_MARKS = {**_MARKS, "1": True, "1.0": True, "0": False, "0.0": False}


def kto_mark(record: Mapping[str, Any]) -> bool | None:
    """Whether a KTO row's answer is marked as good; None for a row that is none.

    A table holds its values as text: "True" is true.
    """
    tag = _mark_in(record.get("kto_tag"))
    if tag is not None:
        return tag
    said = {name for name, value in record.items() if value is not None and value != "" and value != []}
    if not said & {"messages", "conversations", *_ANSWERS}:
        return None
    return _mark_in(record.get("label"), _ALL_MARKS if {"prompt", "completion"} <= said else _MARKS)


def _mark_in(value: Any, marks: Mapping[str, bool] = _ALL_MARKS) -> bool | None:
    """True or false, which a table holds as text; None for anything else."""
    return marks.get(str(value).strip().lower())


def preference_kind(record: Mapping[str, Any]) -> str | None:
    """What kind of preference data a record is; None for none."""
    said = {name for name, value in record.items() if value is not None and value != "" and value != []}
    if {"preferred_output", "non_preferred_output"} <= said:
        return "preference pairs in OpenAI's form"
    if {"chosen", "rejected"} <= said:
        if isinstance(record["chosen"], str) and _HH.match(record["chosen"]):
            return "preference pairs in the form of HH-RLHF"
        if said & {"conversations", "messages"} and isinstance(record["chosen"], Mapping):
            return "preference pairs in the form of LLaMA-Factory and Axolotl"
        if "score_chosen" in said:
            return "preference pairs in the form of UltraFeedback"
        return "preference pairs in TRL's form"
    if said & {"rejected_response", "rejected_messages"} and said & {"messages", "response"}:
        return "preference pairs in swift's form"
    if {"response_j", "response_k"} <= said or {"human_ref_A", "human_ref_B"} <= said:
        return "pairs of ranked answers"
    completions = record.get("completions")
    if isinstance(completions, list) and completions:
        if isinstance(record.get("labels"), list):
            return "answers judged step by step"
        return "several rated answers in the form of UltraFeedback"
    if kto_mark(record) is not None:
        return "answers marked good or bad (KTO)"
    return None


def chosen_side(record: Mapping[str, Any]) -> list[Any]:
    """The messages of the chosen side, in the dialect of the record.

    Raises:
        BadRow: there is none; of kind `rejected_answer` where the row is a rejected answer alone.
    """
    kind = preference_kind(record)
    if kind is None:
        for name in _SIDES:
            if name in record and record[name] in (None, "", []):
                raise BadRow("empty_answer", f"`{name}` is empty, and the row has no two sides", "an answer")
        for name in ("label", "kto_tag"):
            if name in record and _first(record, _ANSWERS):
                raise BadRow(
                    "wrong_type",
                    f"`{name}` is {kind_of(record[name])}, which marks the answer neither as good nor as bad",
                    "true or false",
                )
        raise BadRow(
            "missing_column",
            "the row is no preference data",
            "`chosen` and `rejected`, or as other tools have it",
        )
    if "(KTO)" in kind:
        if not kto_mark(record):
            raise BadRow(LEFT_OUT, "the answer is marked as bad, and left out")
        return _after(record, _first(record, _ANSWERS))
    if "swift" in kind:
        return _after(record, record.get("response"))
    if "OpenAI" in kind:
        asked = record.get("input")
        return _joined(
            _messages(asked.get("messages") if isinstance(asked, Mapping) else asked),
            record["preferred_output"],
        )
    if "HH-RLHF" in kind:
        return _dialogue(record["chosen"])
    if "step by step" in kind:
        raise BadRow("preference", "answers judged step by step have no chosen side", "rows with one answer")
    if "UltraFeedback" in kind and "completions" in record and "chosen" not in record:
        return _after(record, _best(record["completions"]))
    if "ranked" in kind:
        return _ranked(record)
    chosen = record["chosen"]
    shared = _common_turns(chosen, record.get("rejected"))
    if shared:
        chosen = [*map(_not_trained, chosen[:shared]), *chosen[shared:]]
    return _after(record, chosen)


def _after(record: Mapping[str, Any], answer: Any) -> list[Any]:
    """What was asked, and the answer to it; the answer alone where it is the whole chat."""
    if isinstance(answer, list) and answer and _role(answer[0]) != "assistant":
        return answer
    asked: list[Any] = []
    for name in ("messages", "conversations", "prompt", "question", "query", "instruction", "input"):
        value = record.get(name)
        if value is None or value == "" or value == []:
            continue
        if name == "input" and asked:
            asked[-1] = {"role": "user", "content": f"{asked[-1]['content']}\n\n{value}"}
        elif not asked:
            asked = _messages(value)
    system = record.get("system")
    if isinstance(system, str) and system and asked and _role(asked[0]) != "system":
        asked = [{"role": "system", "content": system}, *asked]
    return asked if answer is None else _joined(asked, answer)


def _joined(asked: list[Any], answer: Any) -> list[Any]:
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    elif isinstance(answer, Mapping):
        answer = [answer]
    if not isinstance(answer, list) or not answer:
        raise BadRow(
            "wrong_type", f"the chosen answer is {kind_of(answer)}", "a text, a message or a list of messages"
        )
    return [*map(_not_trained, asked), *answer]


def _not_trained(turn: Any) -> Any:
    """A turn of what was asked: an answer in it is context, as in a prompt of messages."""
    if isinstance(turn, Mapping) and _role(turn) == "assistant":
        return {**turn, "train": False}
    return turn


def _common_turns(chosen: Any, rejected: Any) -> int:
    """With how many equal turns two sides begin: their prompt."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return 0
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected, strict=False))
    return sum(1 for _ in equal)


def _messages(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, list):
        return list(value)
    raise BadRow("wrong_type", f"the prompt is {kind_of(value)}", "a text or a list of messages")


def _role(turn: Any) -> Any:
    name = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    return "assistant" if name in ("gpt", "assistant", "model", "bot") else name


def _dialogue(text: str) -> list[Any]:
    """`\\n\\nHuman: …\\n\\nAssistant: …` as messages."""
    parts = _HH.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": said.strip()}
        for name, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _best(completions: Sequence[Any]) -> str:
    """The best rated of several answers."""
    rated = [
        item for item in completions if isinstance(item, Mapping) and isinstance(item.get("response"), str)
    ]
    scores = list(map(_score, rated))
    if not rated or max(scores) < 0:
        raise BadRow(
            "wrong_type", "`completions` holds no rated `response`", "responses with `overall_score`"
        )
    # Of ten, unless all are of more: UltraFeedback has some 8.5 as 85.
    of_ten = any("overall_score" in item for item in rated)
    lowest = min(score for score in scores if score >= 0)
    if of_ten and max(scores) > _FULL_MARKS >= lowest:
        raise BadRow(
            "preference",
            f"an `overall_score` of {max(scores):g} stands beside one of {lowest:g}, and no ratings say which is meant",
            "scores of one scale",
        )
    return str(rated[scores.index(max(scores))]["response"])


def _score(item: Mapping[str, Any]) -> float:
    """The overall score, or the mean of the fine-grained ratings (of 1 to 5) where that tells otherwise."""
    scores = {
        name: _number(item.get(name)) for name in ("overall_score", "fine-grained_score", "score", "rating")
    }
    overall, fine = scores["overall_score"], scores["fine-grained_score"]
    fine = _mean_rating(item.get("annotations")) if fine is None else fine
    if (
        overall is not None
        and fine is not None
        and 0 <= fine <= _FULL_MARKS / 2
        and abs(overall - 2 * fine) > _FAR
    ):
        return 2 * fine
    known = [overall, fine, scores["score"], scores["rating"]]
    return next((score for score in known if score is not None), -1.0)


def _mean_rating(annotations: Any) -> float | None:
    """The mean of UltraFeedback's ratings; None where there are none."""
    found = annotations.values() if isinstance(annotations, Mapping) else []
    ratings = [_number(item.get("Rating")) for item in found if isinstance(item, Mapping)]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


def _number(value: Any) -> float | None:
    try:
        return float(value)  # a text in what came from a table
    except (TypeError, ValueError):
        return None


def _ranked(record: Mapping[str, Any]) -> list[Any]:
    if "response_j" in record:
        return _after(record, record["response_j"])
    is_first = _mark_in(record.get("labels"))
    if is_first is None:
        raise BadRow(
            "preference",
            "`labels` does not say which of the two answers is the better one",
            "1 for `human_ref_A`, 0 for `human_ref_B`",
        )
    return _joined(_messages(record.get("history")), record["human_ref_A" if is_first else "human_ref_B"])


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)
