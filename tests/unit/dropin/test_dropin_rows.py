"""The rows of a script as they will be trained: masked, counted, cut, refused, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from script_rows import chats, sharegpt, trained_text
from torch import nn

import phlora
from phlora.errors import DataError
from phlora.testing import chat_rows


def test_rows_of_one_length_and_of_another_format(make: Any, told: Any) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [[5, 6, 7]] * 4})
    fixed = rows.cast(Features(dict.fromkeys(rows.column_names, Sequence(Value("int32"), length=3))))
    make(fixed.with_format("torch"))
    assert "train: 4 rows, 12 tokens, 12 of them trained" in told()


def test_masked_training_that_masks_nothing_is_refused(make: Any) -> None:
    with pytest.raises(DataError, match="assistant_only_loss"):
        make(settings={"completion_only_loss": True})


def test_answers_alone_train_where_trl_has_no_markers_for_the_template(
    make: Any, tokenizer: Any, model: nn.Module, tmp_path: Path
) -> None:
    args = phlora.SFTConfig(str(tmp_path), assistant_only_loss=True, max_steps=1, report_to="none")
    with pytest.raises(ValueError, match="training-compatible"):
        trl.SFTTrainer(model, args, train_dataset=chats(), processing_class=tokenizer)
    trainer = make(args=args)
    assert trained_text(trainer) == "salam دنیا 0<|end|><|endoftext|>" and trainer.args.assistant_only_loss
    whole = tokenizer.apply_chat_template(chats()[0]["messages"])["input_ids"]
    assert trainer.train_dataset[0]["input_ids"] == whole
    assert trainer.train().global_step == 1
    assert trainer.evaluate(chats(2))["eval_loss"] > 0
    pairs = [{"prompt": [row["messages"][0]], "completion": row["messages"][1:]} for row in chats()]
    assert trained_text(make(Dataset.from_list(pairs), args=args)) == "salam دنیا 0<|end|><|endoftext|>"
    with pytest.raises(DataError, match="no chats|are none"):
        make(Dataset.from_list([{"text": "x"}]), args=args)


def test_answers_alone_train_with_a_model_by_its_name(make: Any, model_folder: Path) -> None:
    trainer = make(model=str(model_folder), processing_class=None, settings={"assistant_only_loss": True})
    assert "say 0" not in trained_text(trainer)


def test_rows_are_counted_and_shown(make: Any, told: Any) -> None:
    rows = [{"text": "<s><s>x"}, {"text": ""}, {"text": "a" * 200}, {"text": "plain"}]
    trainer = make(Dataset.from_list(rows))
    assert len(trainer.train_dataset) == 4
    said = told()
    assert "train: 4 rows" in said and "(100.0%)" in said
    assert "begins with the first token twice" in said and "train:1" in said
    assert "Nothing of the row is left but control tokens" in said and "train:2" in said
    assert "longer than max_length (96)" in said and "train:3" in said
    assert "⟦<s>│<s>│x│<|endoftext|>⟧" in said


def test_an_empty_system_message_is_counted(make: Any, told: Any) -> None:
    rows = [{"messages": [{"role": "system", "content": ""}, *row["messages"]]} for row in chat_rows(4)]
    make(Dataset.from_list(rows))
    assert "The content of a system turn is empty (4 rows)" in told()


def test_rows_that_train_nothing_are_refused_when_all_do(make: Any, told: Any) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    make(Dataset.from_list(rows))
    assert "None of the row's tokens is trained" in told()
    with pytest.raises(DataError, match="None of the row's tokens"):
        make(Dataset.from_list(rows[:1]))


LATE = [{"input_ids": [5] * 10 + [6, 7], "labels": [-100] * 10 + [6, 7]}] * 4


@pytest.mark.parametrize("row_problems", ["refuse", "warn"])
@pytest.mark.parametrize("layout", [{}, {"packing": True}])
@pytest.mark.parametrize("side", ["train", "eval"])
def test_rows_that_lose_all_trained_tokens_to_max_length_are_refused(
    make: Any, layout: dict[str, Any], side: str, row_problems: str
) -> None:
    sets = {"train": chats(4), "eval": chats(4), side: Dataset.from_list(LATE)}
    with pytest.raises(
        DataError, match="max_length .8. cuts off every trained token: none of 4 rows"
    ) as refused:
        make(
            sets["train"],
            eval_dataset=sets["eval"],
            settings={"max_length": 8, "eval_packing": layout.get("packing"), **layout},
            row_problems=row_problems,
        )
    assert side in str(refused.value) and "the longest row has 12 tokens" in str(refused.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_cut_leaves_of_rows_is_said_as_it_is(make: Any, told: Any) -> None:
    some = Dataset.from_list([*LATE, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    packed = {"max_length": 8, "packing": True}
    make(some, settings=packed)
    assert "within max_length: the row trains nothing (4 rows)" in told() and "left out" not in told()
    assert len(make(some, settings={"max_length": 8}).train_dataset) == 1
    assert "within max_length: the row is left out (4 rows)" in told()
    # What splits rows, or keeps their ends, loses nothing here.
    assert make(Dataset.from_list(LATE), settings={**packed, "packing_strategy": "bfd_split"}).train()
    kept = make(Dataset.from_list(LATE), settings={"max_length": 8, "truncation_mode": "keep_end"})
    assert len(kept.train_dataset) == 4 and "its beginning is cut off" in told()


def test_rows_without_a_trained_token_are_refused_whatever_is_said(make: Any) -> None:
    with pytest.raises(DataError, match="None of the row's tokens") as refused:
        make(Dataset.from_list([{"input_ids": [5, 6], "labels": [-100] * 2}]), row_problems="warn")
    assert "row_problems" not in str(refused.value)


def test_a_collator_that_never_trains_the_end_is_told(make: Any, tokenizer: Any, told: Any) -> None:
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = make(data_collator=collator)
    assert "makes labels of its own" in told() and trainer.train().global_step == 2
    assert "leaves <|endoftext|> untrained, which ends an answer: pad_token is the same token" in told()


def test_streams_are_looked_at_as_far_as_can_be(make: Any, told: Any) -> None:
    def produce() -> Iterator[dict[str, Any]]:
        yield from sharegpt(150)

    trainer = make(IterableDataset.from_generator(produce))
    assert "train: the first 100 rows" in told()
    assert trainer.train().global_step == 2


def test_each_of_several_held_out_sets_is_looked_at(make: Any, told: Any) -> None:
    trainer = make(eval_dataset={"one": chats(2), "two": Dataset.from_list(sharegpt(2))})
    assert "one: 2 rows" in told() and "two: 2 rows" in told()
    metrics = trainer.evaluate()
    assert {"eval_one_loss", "eval_two_loss"} <= metrics.keys()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_are_prepared_as_trl_prepares_them(
    make: Any, model: nn.Module, tokenizer: Any, packing: bool, shuffled: bool
) -> None:
    rows = chats(9).train_test_split(test_size=3, seed=0)
    ours = make(
        rows["train"], eval_dataset=rows["test"], settings={"packing": packing, "shuffle_dataset": shuffled}
    )
    theirs = trl.SFTTrainer(
        model, ours.args, train_dataset=rows["train"], eval_dataset=rows["test"], processing_class=tokenizer
    )
    for name in ("train_dataset", "eval_dataset"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one["input_ids"][:] == other["input_ids"][:] and one["labels"][:] == other["labels"][:]


class Broken:
    """A collator with a mistake in it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, rows: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [ImportError("its own trouble"), KeyError("its own trouble")])
def test_what_a_collator_raises_is_for_its_author(make: Any, error: Exception, told: Any) -> None:
    with pytest.raises(type(error), match="its own trouble"):
        make(data_collator=Broken(error))
    assert "makes labels of its own" not in told()


def test_a_collator_sees_the_rows_as_they_are_trained_and_may_leave_labels_out(make: Any, told: Any) -> None:
    seen: list[set[str]] = []

    def collate(rows: Any) -> Any:
        seen.append(set(rows[0]))
        return {"input_ids": torch.tensor([rows[0]["input_ids"]])}

    trainer = make(data_collator=collate)
    assert seen == [{"input_ids", "labels"}] and trainer.data_collator is collate
    make(data_collator=collate, settings={"remove_unused_columns": False})
    assert "messages" in seen[-1]
