"""What to do about rows of no known schema: which columns to name, where that is likely right, and only there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from phlora.data.known_keys import CONTEXTS, LABELS
from phlora.data.rows import names_of

_SPEAKERS = ("role", "from", "speaker", "author", "sender", "user_type")
_SAID = ("content", "text", "utterance", "message", "value", "body")
_QUESTIONS = frozenset(
    "question questions query prompt instruction input request q user human frage pregunta pergunta domanda soru "
    "вопрос سوال سؤال پرسش 问题 問題 質問 質问 질문".split()
)
_ANSWERS = frozenset(
    "answer answers response reply output completion a assistant antwort respuesta resposta risposta réponse reponse "
    "cevap yanıt ответ جواب پاسخ إجابة الإجابة 答案 回答 답변".split()
)
_NO_TEXT = re.compile(
    r"(^|[_ -])(id|ids|index|idx|key|uuid|date|time|timestamp|url|link|source|lang|language|split|type|score|rating|"
    r"label|class|category|topic|role|speaker|author|name|title|model|turn|hash)s?($|[_ -])",
    re.IGNORECASE,
)
_TABLES = (".csv", ".tsv", ".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
_GENERAL = "name the columns that hold the question and the answer: `--columns question=…,answer=…`"


def how_to_map(
    record: Any, *, name: str = "", format: str = "auto", columns: Mapping[str, str] | None = None
) -> str:
    """How rows of no known schema can be used.

    Args:
        record: one of them, its columns renamed.
        name: of the file.
        columns: the names that were given already.
    """
    if not isinstance(record, Mapping):
        return 'give each row as an object with named columns, such as {"question": "…", "answer": "…"}'
    shape = _shape_of_a_file(record)
    if shape:
        return shape
    names = {str(key).lower(): str(key) for key in record}
    speaker = next((names[key] for key in _SPEAKERS if key in names), None)
    said = next((names[key] for key in _SAID if key in names and names[key] != speaker), None)
    if speaker and said:
        return (
            f"these are single messages (`{speaker}`, `{said}`): put those of each chat into one row, "
            '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
        )
    if name.lower().endswith(_TABLES) and any(map(_is_sentence, record)):
        return (
            "the file seems to have no header, so that its first row was taken for the names of the columns: add a "
            "line of names above it, such as question,answer"
        )
    label = next((names[key] for key in LABELS if key in names), None)
    if format == "classification":
        text = next((key for key in names.values() if isinstance(record[key], str) and key != label), "…")
        return f"name the columns of the text and of its label, for example `--columns text={text},label=…`"
    if label:
        return (
            f"`--format classification` answers a text with its label (`{label}`), with `--columns text=…`; texts in "
            "several columns are to be joined into one first"
        )
    pair = _likely_pair(record, columns or {})
    if pair is None:
        return f"{_GENERAL}; the row has {names_of(record)}"
    question, answer = pair
    section = f"columns: {{question: {question}, answer: {answer}}}"
    return (
        f"name the columns, for example `--columns question={question},answer={answer}`, or `{section}` beside the "
        "file's `path:`"
    )


def _shape_of_a_file(record: Mapping[str, Any]) -> str:
    """What to do where the one object is a whole file in another layout."""
    values = list(record.values())
    if len(values) > 1 and all(_is_rows(value) for value in values):
        return f"each of {names_of(record)} is a list of rows: write each into a file of its own"
    return turned_by_hand(record)


def turned_by_hand(record: Mapping[str, Any]) -> str:
    """What to do where an object holds whole columns rather than a row, as pandas' `to_json` writes them."""
    values = list(record.values())
    if len(values) < 2:
        return ""
    first = values[0]
    as_lists = isinstance(first, list) and all(
        isinstance(value, list)
        and len(value) == len(first)
        and not any(isinstance(v, dict | list) for v in value)
        for value in values
    )
    as_objects = isinstance(first, dict) and all(
        isinstance(value, dict) and value.keys() == first.keys() and all(map(str.isdigit, value))
        for value in values
    )
    if first and (as_lists or as_objects):
        return 'the object holds whole columns: write rows, with pandas `to_json(path, orient="records", lines=True)`'
    return ""


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_sentence(name: Any) -> bool:
    """Whether the name of a column reads like what stands in one."""
    text = str(name).strip()
    return len(text.split()) > 3 or text.endswith(("?", ".", "!", "؟", "。", "？")) or text[:1].isdigit()


def _likely_pair(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str] | None:
    """The columns of a question and its answer where their names, or their being the only two texts, say so."""
    given = {new: columns[new] for new in ("question", "answer") if new in columns}
    texts = [
        key
        for key, value in record.items()
        if isinstance(value, str) and key not in {*columns, *CONTEXTS} and not _NO_TEXT.search(key)
    ]
    question = given.get("question") or _only(texts, _QUESTIONS)
    answer = given.get("answer") or _only(texts, _ANSWERS)
    rest = [key for key in texts if key not in (question, answer)]
    if question and answer:
        return question, answer
    is_flat = not any(isinstance(value, dict | list) for value in record.values())
    if (question or answer) and len(rest) == 1 and is_flat:
        return question or rest[0], answer or rest[0]
    if not question and not answer and len(texts) == 2 and len(record) == 2:
        return texts[0], texts[1]
    return None


def _only(texts: Sequence[str], wanted: frozenset[str]) -> str | None:
    found = [key for key in texts if key.strip().lower() in wanted]
    return found[0] if len(found) == 1 else None
