"""What kind of answers is expected, and which metrics fit it."""

from __future__ import annotations

import pytest

from phlora.evaluate.task import task_of

ESSAY = "First open the settings. Then choose your account, and follow the link that we sent you by mail."


@pytest.mark.parametrize(
    ("references", "kind"),
    [
        (['{"a": 1}', "[1, 2]", "Which room?"], "json"),
        (["yes", "no", "no"], "short"),
        (["روشن شد", "चालू है"], "short"),
        ([ESSAY, ESSAY, "yes"], "open"),
        (["a\nb\nc", "x\ny"], "open"),
        (["x" * 100_000, ESSAY], "open"),
        # Twenty wide characters take forty columns.
        (["東" * 20, "京" * 20], "short"),
        (["東" * 21, "京" * 30], "open"),
        (["", ""], "short"),
        ([], "short"),
    ],
    ids=range(10),
)
def test_the_kind_follows_what_most_answers_look_like(references: list[str], kind: str) -> None:
    assert task_of(references).kind == kind


def test_metrics_fit_the_kind() -> None:
    assert task_of(["{}"]).metrics[0] == "exact_match"
    assert task_of([ESSAY]).metrics == ("rouge_l",)


def test_word_overlap_never_calls_an_answer_right() -> None:
    assert not any(task_of(["yes"]).judges(name) for name in ("rouge_l", "rougeL", "rougeLsum", "rouge1"))
    assert task_of(["yes"]).judges("exact_match")
    assert not task_of([ESSAY]).judges("exact_match") and task_of([ESSAY]).judges("contains:x")
