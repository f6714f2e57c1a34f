"""Weights of rows and of turns, with which TRL does not train: told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from phlora.errors import DataError
from phlora.testing import chat_rows


def rows(**columns: Any) -> Dataset:
    return Dataset.from_list([{"messages": row["messages"], **columns} for row in chat_rows(4)])


def turns(**keys: Any) -> Dataset:
    return Dataset.from_list(
        [{"messages": [{**turn, **keys} for turn in row["messages"]]} for row in chat_rows(4)]
    )


@pytest.mark.parametrize("column", ["weight", "sample_weight", "loss_weight", "loss_scale"])
def test_a_weight_of_rows_is_told(make: Any, told: Any, column: str) -> None:
    make(rows(**{column: 0.5}))
    assert f"train: {column} is not used, as in TRL: all trained tokens count alike" in told()


def test_weights_of_tokens_are_told(make: Any, told: Any) -> None:
    tokens = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "loss_weights": [1.0, 0.5, 1.0]}
    make(Dataset.from_list([tokens] * 4))
    assert "train: loss_weights is not used" in told()
    with_two = [{**tokens, "weight": 2.0}] * 4
    make(Dataset.from_list(with_two).to_iterable_dataset())
    assert "weight and loss_weights are not used" in told()


@pytest.mark.parametrize(
    ("key", "value"), [("train", False), ("loss_mask", 0), ("weight", 0.0), ("weight", 0.5)]
)
def test_what_turns_say_of_their_loss_is_told(make: Any, told: Any, key: str, value: Any) -> None:
    make(turns(**{key: value}))
    assert f"train: {key} is not used in turns, as in TRL" in told()
    # Nor is anything said to be left out.
    assert "left out" not in told() and "189 of them trained" in told()


def test_where_answers_are_marked_turns_may_be_left_out(make: Any, told: Any) -> None:
    marked = turns(train=None)
    first = {"messages": [{**turn, "train": False} for turn in marked[0]["messages"]]}
    several = Dataset.from_list([*marked, first])
    with pytest.raises(DataError, match="None of the row's tokens is trained"):
        make(several, settings={"assistant_only_loss": True})
    make(turns(weight=0.5), settings={"assistant_only_loss": True})
    assert told().count("not used in turns") == 1 and "weight is not used in turns" in told()


def test_weights_that_change_nothing_are_not_told(make: Any, told: Any) -> None:
    make(rows(weight=1.0, loss_weight=None))
    make(turns(train=True, weight=1.0))
    make(rows(weight="heavy"))
    assert "not used" not in told()


def test_a_collator_of_the_scripts_that_gets_them_is_its_own_matter(
    make: Any, told: Any, tokenizer: Any
) -> None:
    seen: list[Any] = []

    def collate(batch: Any) -> Any:
        seen.extend(row["weight"] for row in batch)
        ids = [torch.tensor(row["input_ids"]) for row in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        weights = torch.tensor([[row["weight"]] for row in batch]).expand(padded.shape)
        return {"input_ids": padded, "labels": padded, "loss_weights": weights}

    settings = {"remove_unused_columns": False, "max_steps": 1}
    assert make(rows(weight=0.5), data_collator=collate, settings=settings).train().global_step == 1
    assert "not used" not in told() and set(seen) == {0.5}


@pytest.mark.parametrize("said", [{"train": True}, {"loss": True}, {"masked": False}])
@pytest.mark.parametrize("as_stream", [False, True])
def test_answers_alone_are_trained_whatever_other_turns_say(
    make: Any, told: Any, said: dict[str, bool], as_stream: bool
) -> None:
    plain, answers = turns()[0]["messages"], []
    for flags in ({}, said):
        chat = [{**turn, **(flags if turn["role"] != "assistant" else {})} for turn in plain]
        chat = [{"role": "system", "content": "Say it briefly.", **flags}, *chat]
        several = Dataset.from_list([{"messages": chat}] * 4)
        trainer = make(
            several.to_iterable_dataset() if as_stream else several,
            settings={"assistant_only_loss": True},
            eval_dataset=several,
        )
        answers.append([next(iter(rows))["labels"] for rows in (trainer.train_dataset, trainer.eval_dataset)])
    assert answers[0] == answers[1]
    assert ("not used in turns that are no answers" in told()) is ("masked" not in said)
