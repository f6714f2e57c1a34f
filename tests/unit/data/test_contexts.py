"""The passage before a question, in every shape that data sets hold it in."""

from __future__ import annotations

import pytest

from phlora.data.dataset import load_rows
from phlora.errors import DataError

QUESTION = {"question": "Where?", "answer": "There"}


@pytest.mark.parametrize(
    ("context", "text"),
    [
        ("One.", "One."),
        (["One.", "Two."], "One.\n\nTwo."),
        ({"contexts": ["One.", "Two."], "labels": ["A", "B"]}, "One.\n\nTwo."),
        ({"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]}, "A\nOne. Two.\n\nB\nThree."),
        ([["A", ["One.", " Two."]], ["B", ["Three."]]], "A\nOne. Two.\n\nB\nThree."),
        ([{"title": "A", "text": "One."}, {"text": "Two."}], "A\nOne.\n\nTwo."),
    ],
    ids=["text", "paragraphs", "PubMedQA", "HotpotQA", "HotpotQA's file", "passages"],
)
@pytest.mark.parametrize("column", ["context", "passage", "Context"])
def test_a_passage_stands_before_its_question(context, text, column):
    loaded = load_rows([{**QUESTION, column: context}])
    assert loaded.rows[0].messages[0]["content"] == f"{text}\n\nWhere?"
    instruction = {"instruction": "Where?", "output": "There", column: context}
    assert load_rows([instruction]).rows[0].messages[0]["content"] == f"Where?\n\n{text}"
    assert not loaded.problems


@pytest.mark.parametrize("context", [[1, 2], {"id": 1}, [{"id": "a"}]], ids=str)
def test_what_holds_no_passage_is_an_error(context):
    with pytest.raises(DataError, match="`context"):
        load_rows([{**QUESTION, "context": context}])


@pytest.mark.parametrize("context", [None, "", [], {}])
def test_an_empty_passage_says_nothing(context):
    assert load_rows([{**QUESTION, "context": context}]).rows[0].messages[0]["content"] == "Where?"
