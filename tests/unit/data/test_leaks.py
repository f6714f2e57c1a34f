"""What training sees of held-out rows, and rows that count on neither side."""

from __future__ import annotations

import pytest

from phlora.data.checks import check
from phlora.data.dataset import index_rows
from phlora.data.inspection import SplitSettings, inspect_data


def chat(*texts, **beside):
    roles = ("user", "assistant") * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": turns, **beside}


LONG = ("What is up?", "Nothing much", "And then?", "Then I went home", "Why?", "It was late")


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        (LONG, LONG[:2]),  # the beginning
        (LONG[:2], LONG[:4]),  # the other way
        (LONG, LONG[2:4]),  # the middle
        (LONG, ("WHAT is up", "nothing much.")),
        (LONG, LONG[4:]),
    ],
)
def test_a_chat_within_another_is_a_leak(trained, held_out):
    others = [chat(f"question {n}", f"answer {n}") for n in range(5)]
    report = check([*others, chat(*trained)], eval_sources=[chat("else", "nothing"), chat(*held_out)])
    assert {kind: n for kind, n in report.leaks.items() if n} == {"leaked_answer": 1}
    (problem,) = [item for item in report.problems if item.kind == "leaked_answer"]
    assert "rows:2 as rows:6" in problem.message
    assert report.exit_code(strict=True) == 1


def test_thanks_alone_are_no_leak():
    thanks = ("Thanks", "You are welcome")
    held_out = chat("one", "1", "two", "2", *thanks)
    assert not any(check([chat("three", "3", *thanks)], eval_sources=[held_out]).leaks.values())
    # Where many chats say so, it is no leak of a short one either.
    many = [chat(f"question {n}", f"answer {n}", *thanks) for n in range(20)]
    assert not any(check(many, eval_sources=[chat("one", "1", *thanks)]).leaks.values())


def test_windows_of_one_chat_stay_on_one_side():
    def said(chat_number, turn):
        return f"chat {chat_number} question {turn}", f"chat {chat_number} answer {turn}"

    rows = [
        chat(*(said(number, turn - 1) if turn else ()), *said(number, turn))
        for number in range(30)
        for turn in range(5)
    ]
    for seed in range(5):
        found = inspect_data(rows, split=SplitSettings(seed=seed))
        assert found.num_conversations == 30
        assert not [problem for problem in found.problems if problem.severity == "warning"]
        assert len(found.held_out) % 5 == 0


@pytest.mark.parametrize(("width", "step"), [(3, 1), (4, 1), (5, 1), (5, 2)])
def test_windows_that_begin_with_an_answer_stay_on_one_side(width, step):
    rows = []
    for n in range(40):
        turns = chat(*[f"{'question' if k % 2 == 0 else 'answer'} {n} of {k}" for k in range(12)])["messages"]
        windows = [turns[max(0, end - width) : end] for end in range(2, 13, 2 * step)]
        rows += [{"messages": window} for window in windows]
    found = inspect_data(rows)
    assert found.num_conversations == 40
    assert not [problem for problem in found.problems if problem.kind.startswith("leaked")]


@pytest.mark.parametrize("width", [2, 3, 4, 12])
def test_windows_written_out_in_the_question_stay_on_one_side(width):
    rows = []
    for n in range(40):
        said = [f"{'question' if k % 2 == 0 else 'answer'} {n} of {k}" for k in range(12)]
        lines = [f"{'user' if k % 2 == 0 else 'assistant'}: {text}" for k, text in enumerate(said)]
        for end in range(1, 12, 2):
            rows.append({"question": "\n".join(lines[max(0, end - width) : end]), "answer": said[end]})
    found = inspect_data(rows)
    assert found.num_conversations == 40


def test_a_question_that_names_a_speaker_is_a_question():
    rows = [chat(f"Question: what is {n}?", f"answer {n}") for n in range(100)]
    assert inspect_data(rows).num_conversations == 100


def test_an_answer_that_a_training_row_begins_with_is_a_leak():
    window = {
        "messages": [{"role": "assistant", "content": "answer 3"}, *chat("and then?", "that")["messages"]]
    }
    report = check([window, chat("a", "b")], eval_sources=[chat("question 3", "answer 3"), chat("c", "d")])
    assert report.leaks["leaked_answer"] == 1


def test_a_greeting_by_the_assistant_ties_no_chats_together():
    hello = {"role": "assistant", "content": "Hello, how can I help?"}
    rows = [{"messages": [hello, *chat(f"question {n}", f"answer {n}")["messages"]]} for n in range(100)]
    assert inspect_data(rows).num_conversations == 100


def test_small_talk_ties_no_chats_together():
    thanks = ("Thanks", "You are welcome")
    chats = [chat(f"question {n}", f"answer {n}", *thanks) for n in range(100)]
    assert inspect_data([*chats, chat(*thanks)]).num_conversations == 101
    openers = [chat(*thanks, f"and {n}?", f"yes {n}") for n in range(15)]
    # They open with the same words, as one conversation does; the others are not drawn in.
    assert inspect_data([*chats, *openers]).num_conversations == 101


def test_rows_of_weight_0_are_on_no_side():
    rows = [chat(f"question {n}", f"answer {n}", weight=float(n % 3 > 0)) for n in range(60)]
    for seed in range(5):
        found = inspect_data(rows, split=SplitSettings(seed=seed, eval_size=0.2))
        assert all(found.index.is_trained[number] for number in found.held_out.numbers)
        assert len(found.train) + len(found.held_out) == 60
    report = check(rows, eval_sources=[rows[0], rows[1]])
    assert report.leaks["leaked_eval_row"] == 1
    assert report.num_usable_rows == 40
    (note,) = [problem for problem in report.problems if problem.kind == "weight_zero"]
    assert (note.severity, note.count) == ("note", 21)


def test_exchanges_are_kept_by_row():
    index = index_rows([chat(*LONG), chat("a", "b"), {"messages": [{"role": "user", "content": "x"}]}])
    assert [len(index.exchanges_of(number)) for number in range(3)] == [3, 1, 0]
