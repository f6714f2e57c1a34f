"""The held-out rows: whole conversations, decided by each one's hash and the seed."""

from __future__ import annotations

import random

import pytest

from phlora.data.checks import SplitSettings, check, inspect_data
from phlora.data.columns import required_value
from phlora.data.dataset import index_rows
from phlora.data.rows import row_key
from phlora.data.split import split_keys, split_rows
from phlora.errors import DataError


def _chat(*turns, system=None, **columns):
    head = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    said = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return {"messages": head + said, **columns}


def _texts(*texts):
    return [{"text": text} for text in texts]


def _split(rows, *, eval_size=0.1, seed=1, group_by=None, stratify_by=None):
    index = index_rows(rows, group_by=group_by, stratify_by=stratify_by)
    return split_rows(index, eval_size=eval_size, seed=seed, stratify_by=stratify_by)


def _sides(rows, **options):
    split = _split(rows, **options)
    return [rows[n] for n in split.train], [rows[n] for n in split.held_out]


def _one_row_per_turn(num_chats, num_turns=4):
    """Short questions, and a greeting that all chats share the answer of."""
    rows = []
    for chat in range(num_chats):
        turns = [text for turn in range(num_turns) for text in (f"q{chat} {turn}", f"a{chat} {turn}")]
        rows += [_chat(*turns[: 2 * turn + 2]) for turn in range(num_turns)]
    return rows


def test_the_rows_of_one_chat_stay_together():
    rows = _one_row_per_turn(200)
    random.Random(0).shuffle(rows)
    train, held_out = _sides(rows)
    first = [{row["messages"][0]["content"] for row in side} for side in (train, held_out)]
    assert not first[0] & first[1] and 40 <= len(held_out) <= 160


@pytest.mark.parametrize(
    "rows",
    [
        [_chat(f"What is {n // 3}?", f"answer {n}") for n in range(300)],
        [_chat(f"what is {n // 3}{' ?!'[n % 3]}", f"answer {n}") for n in range(300)],
        [{"prompt": f"Q{n // 3}: ", "completion": f"a{n}"} for n in range(300)],
    ],
    ids=["chat", "spelling", "plain"],
)
def test_answers_to_one_question_stay_together(rows):
    split = _split(rows)
    assert split.num_conversations == 100
    for side in (split.train, split.held_out):
        assert len(side) == 3 * len({n // 3 for n in side})


def test_a_system_prompt_is_no_conversation():
    rows = [_chat(f"Turn on light {n}", "done", system="You run a home. " * 50) for n in range(100)]
    assert _split(rows).num_conversations == 100


def test_a_greeting_is_no_conversation():
    rows = [_chat("Hi", "Hello, how can I help?", f"question {n // 2}", f"a{n}") for n in range(200)]
    split = _split(rows)
    assert split.num_conversations == 100
    assert not {n // 2 for n in split.train} & {n // 2 for n in split.held_out}
    # Few chats that go on from one opening are one conversation with branches.
    rows = [
        _chat("Tell me of Troy", f"story {n}", f"more {n}", "end") for n in range(10)
    ] + _one_row_per_turn(5)
    assert _split(rows).num_conversations == 6


@pytest.mark.parametrize("num_before", [100, 300, 1000])
def test_added_rows_move_no_row_to_the_other_side(num_before):
    rows = [_chat(f"question {n}", f"answer {n}") for n in range(1500)]
    split = _split(rows)
    random.Random(3).shuffle(rows)
    train, held_out = _sides(rows[:num_before])
    more_train, more_held_out = _sides(rows)
    assert all(row in more_train for row in train) and all(row in more_held_out for row in held_out)
    assert 0.05 * len(rows) < len(split.held_out) < 0.2 * len(rows)


def test_with_a_number_of_rows_no_trained_row_is_ever_held_out():
    rows = [_chat(f"question {n}", f"answer {n}") for n in range(600)]
    seen, held_out = [], []
    for num_rows in (100, 101, 150, 600):
        _, now = _sides(rows[:num_rows], eval_size=20)
        assert len(now) == 20
        assert all(row in held_out or row not in seen for row in now)
        seen, held_out = rows[:num_rows], now


def test_a_group_column_keeps_its_rows_together():
    rows = [_chat(f"question {n}", f"answer {n}", meta={"chat": n // 5}) for n in range(300)]
    split = _split(rows, group_by="meta.chat")
    assert split.num_conversations == 60
    assert not {n // 5 for n in split.train} & {n // 5 for n in split.held_out}
    with pytest.raises(DataError, match=r"no `meta.chta`"):
        index_rows(rows, group_by="meta.chta")
    with pytest.raises(DataError, match="one group"):
        _split([{**row, "meta": {"chat": 1}} for row in rows], group_by="meta.chat")


def test_groups_and_openings_are_joined():
    rows = [_chat("same", "1", id=1), _chat("same", "2", id=2), _chat("other", "3", id=2)]
    rows += [_chat(f"q{n}", "a", id=n + 10) for n in range(20)]
    assert _split(rows, group_by="id").num_conversations == 21


@pytest.mark.parametrize("asked", [True, False])
def test_each_category_has_its_share(asked):
    kinds = ["rare"] * 20 + ["usual"] * 380
    rows = [_chat(f"question {n}", f"answer {n}", category=kind) for n, kind in enumerate(kinds)]
    for seed in range(8):
        for eval_size in (0.1, 40):
            split = _split(rows, eval_size=eval_size, seed=seed, stratify_by="category" if asked else None)
            counts = [sum(kinds[n] == kind for n in split.held_out) for kind in ("rare", "usual")]
            assert 1 <= counts[0] <= 4 and 19 <= counts[1] <= 76
            if eval_size == 40:
                assert counts == [2, 38]
            assert "`category`" in split.notes[0]


def test_split_depends_on_the_seed_only_and_keeps_order():
    rows = [_chat(f"question {n}", f"answer {n}") for n in range(40)]
    train, held_out = _sides(rows, eval_size=0.25)
    assert (train, held_out) == _sides(rows, eval_size=0.25)
    assert held_out != _sides(rows, eval_size=0.25, seed=2)[1]
    assert 5 <= len(held_out) <= 20 and train == [row for row in rows if row in train]
    assert len(_sides(rows, eval_size=7)[1]) == 7
    assert _sides(rows, eval_size=0) == (rows, [])


def test_no_side_is_ever_empty():
    for num_rows in range(2, 30):
        rows = [_chat(f"question {n}", f"answer {n}") for n in range(num_rows)]
        for seed in range(5):
            for eval_size in (0.01, 0.1, 0.5, 1):
                train, held_out = _sides(rows, eval_size=eval_size, seed=seed)
                assert train and held_out
                assert len(held_out) <= max(1, 2 * eval_size * num_rows)


def test_few_large_conversations_are_told():
    rows = [_chat("one", f"{n}") for n in range(60)] + [_chat("two", f"{n}") for n in range(40)]
    split = _split(rows)
    assert len(split.held_out) == 40 and "only 2 conversations" in split.warnings[0]
    rows = [_chat("one", f"{n}") for n in range(60)]
    split = _split(rows)
    assert 3 <= len(split.held_out) <= 12 and "the same prompt" in split.warnings[0]
    found = {
        problem.kind: problem.count for problem in inspect_data(rows, split=SplitSettings(seed=1)).problems
    }
    assert found == {"split": 1, "leaked_prompt": len(split.held_out)}


def test_duplicates_never_stand_on_both_sides():
    rows = _texts(*(f"row  {index // 4}" if index % 2 else f"row {index // 4} " for index in range(40)))
    for seed in range(10):
        index = index_rows(rows)
        split = split_rows(index, eval_size=8, seed=seed)
        assert len(split.held_out) == 8
        assert not {index.keys[n] for n in split.train} & {index.keys[n] for n in split.held_out}


@pytest.mark.parametrize("eval_size", [3, 4, 0.99, -1])
def test_impossible_eval_sizes(eval_size):
    with pytest.raises(DataError):
        _split(_texts("a", "b", "c"), eval_size=eval_size, seed=0)


def test_rows_that_are_all_the_same_cannot_be_split():
    with pytest.raises(DataError, match="1 different"):
        _split(_texts("a", "a ", "a"), eval_size=1, seed=0)


def test_runs_of_earlier_versions_keep_their_split():
    keys = [bytes([n]) for n in range(10)]
    assert split_keys(keys, eval_size=0.3, seed=1) == ([0, 1, 2, 3, 4, 5, 7], [6, 8, 9])
    from phlora.data.dataset import load_rows

    assert row_key(load_rows(_texts("a")).rows[0]) == row_key(load_rows(_texts(" a")).rows[0])


def test_leaks_are_counted_by_kind_and_named():
    train = [
        _chat("What is the capital of France?", "Paris"),
        _chat("2 + 2?", "4"),
        _chat("Name a colour", "Red"),
    ]
    held_out = [
        _chat("What is the capital of France?", "Paris"),
        _chat("what is the capital of France", "Paris."),
        _chat("Name a colour.", "Blue"),
        _chat("2 - 2?", "4"),
    ]
    report = check(train, eval_sources=held_out)
    assert report.leaks == {
        "leaked_eval_row": 1,
        "near_leaked_eval_row": 1,
        "leaked_answer": 0,
        "leaked_prompt": 1,
    }
    (prompt,) = [problem for problem in report.problems if problem.kind == "leaked_prompt"]
    assert [origin.line for origin in prompt.origins] == [3] and "rows:3 as rows:3" in prompt.message
    assert report.exit_code(strict=True) == 1


def test_groups_are_told_apart_by_what_they_say_not_by_type():
    values = [1, "1", 1.0, "1.0", " 1"]
    assert {required_value({"id": value}, "id", "data.group_by") for value in values} == {"1"}
    others = ["01", 1.5, "1.5.0", "a"]
    assert [required_value({"id": value}, "id", "") for value in others] == ["01", "1.5", "1.5.0", "a"]
