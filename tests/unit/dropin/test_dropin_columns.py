"""Which columns of a script are trained, and as what: leftover ones, roles, formatting functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from datasets import Dataset
from script_rows import chats, sharegpt, trained_text

from phlora.errors import ConfigError, DataError
from phlora.testing import chat_rows


def test_a_leftover_chat_does_not_hide_the_texts_of_the_script(make: Any, told: Any) -> None:
    rows = Dataset.from_list([{**row, "text": f"the text of {i}"} for i, row in enumerate(sharegpt())])
    trainer = make(rows, dataset_text_field="text")
    assert trained_text(trainer, 1) == "the text of 1<|endoftext|>"
    assert "conversations is left out" in told()


def test_a_text_beside_a_chat_is_told_once_and_a_mask_asks_for_the_chat(make: Any, told: Any) -> None:
    rows = Dataset.from_list([{**row, "text": "x"} for row in chats()])
    assert "say 0" in trained_text(make(rows))
    assert told().count("text is not used") == 1
    trainer = make(rows, settings={"assistant_only_loss": True, "dataset_text_field": "text"})
    assert trained_text(trainer) == "salam دنیا 0<|end|><|endoftext|>"
    with pytest.raises(ConfigError, match="one of refuse, warn"):
        make(rows, row_problems="ignore")


def kinds_of_rows() -> dict[str, Dataset]:
    turns = [row["messages"] for row in chat_rows(4)]
    return {
        "messages": Dataset.from_list([{"messages": messages} for messages in turns]),
        "prompt": Dataset.from_list([{"prompt": f"{i} and", "completion": " one"} for i in range(4)]),
        "text": Dataset.from_list([{"text": f"{i} and one"} for i in range(4)]),
    }


@pytest.mark.parametrize("column", ["labels", "input_ids", "completion_mask", "assistant_masks"])
@pytest.mark.parametrize("kind", ["messages", "prompt", "text"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_leftover_numbers_named_as_tokens_or_labels_are_left_out(
    make: Any, told: Any, kind: str, column: str, is_stream: bool
) -> None:
    rows = kinds_of_rows()[kind]
    plain = make(rows).train_dataset[:]
    # A list in input_ids says that rows are tokenised.
    for values in [[1] * 4] + [[[1, 2, 3]] * 4] * (column != "input_ids"):
        more = rows.add_column(column, values)
        trainer = make(more.to_iterable_dataset() if is_stream else more)
        assert f"train: {column} is left out" in told()
        made = list(trainer.train_dataset)
        assert [row["labels"] for row in made] == plain["labels"]
        assert [row["input_ids"] for row in made] == plain["input_ids"]


@pytest.mark.parametrize("column", ["labels", "completion_mask", "assistant_masks"])
def test_single_values_beside_tokens_are_refused_by_their_column(make: Any, column: str) -> None:
    tokens = Dataset.from_list([{"input_ids": [5, 6, 7]}] * 4)
    with pytest.raises(DataError, match=f"`{column}` holds int"):
        make(tokens.add_column(column, [1] * 4))
    with pytest.raises(DataError, match="`input_ids` holds int"):
        make(Dataset.from_list([{"input_ids": 5}] * 4))


@pytest.mark.parametrize("is_stream", [False, True])
def test_labels_of_another_length_than_their_tokens_are_refused(make: Any, is_stream: bool) -> None:
    rows = Dataset.from_list(
        [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [5], "labels": [5, 6]}]
    )
    with pytest.raises(DataError, match="train:2: `labels` has 2 values for 1 tokens"):
        make(rows.to_iterable_dataset() if is_stream else rows)


def test_a_formatting_function_wins_over_leftover_columns(make: Any) -> None:
    rows = Dataset.from_list(sharegpt())
    trainer = make(
        rows,
        formatting_func=lambda row: f"Q: {row['conversations'][0]['value']}",
        dataset_text_field="text",
        max_seq_length=128,
    )
    assert trained_text(trainer).startswith("Q: how many are 0 and one")
    trainer.evaluate(Dataset.from_list(sharegpt(2)))


def test_roles_that_the_template_does_not_know_are_called_as_it_knows_them(make: Any, told: Any) -> None:
    trainer = make(Dataset.from_list(sharegpt()))
    assert "how many are 0 and one" in trained_text(trainer) and "they are 1" in trained_text(trainer)
    assert "gpt is assistant, human is user" in told()


def test_turns_that_the_template_leaves_out_are_refused(make: Any, told: Any) -> None:
    rows = Dataset.from_list(sharegpt(roles=("critic", "gpt")))
    with pytest.raises(DataError, match=r"leaves out turn 1 \(critic\) \(6 rows\)") as error:
        make(rows)
    assert "train:1" in str(error.value) and 'row_problems="warn"' in str(error.value)
    make(rows, row_problems="warn")
    assert "leaves out turn 1" in told()


def test_a_leftover_prompt_is_no_key_error(make: Any, told: Any) -> None:
    rows = Dataset.from_list([{**row, "prompt": "x"} for row in chats()])
    assert make(rows).train().global_step == 2
    assert "prompt is left out" in told()


def test_columns_of_which_nothing_can_be_trained(make: Any) -> None:
    with pytest.raises(DataError, match="rename_column"):
        make(Dataset.from_list([{"prompt": "a", "response": "b"}]))
    with pytest.raises(DataError, match="dataset_text_field"):
        make(Dataset.from_list([{"quote": "a"}]))


def test_chats_that_are_no_lists(make: Any) -> None:
    with pytest.raises(DataError, match="json.loads"):
        make(Dataset.from_list([{"messages": '[{"role": "user", "content": "a"}]'}]))
    with pytest.raises(DataError, match="is empty"):
        make(Dataset.from_list([{"messages": []}, *chats()]))


def test_a_template_that_drops_parts_is_refused(make: Any, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content if m.content is string else '' }}{{ eos_token }}{% endfor %}"
    )
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}]
    with pytest.raises(DataError, match="leaves out turn 1"):
        make(Dataset.from_list(rows), processing_class=tokenizer, row_problems="refuse")


def test_contents_that_the_template_does_not_write_as_text(make: Any) -> None:
    rows = [
        {
            "messages": [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                for message in row["messages"]
            ]
        }
        for row in chat_rows(3)
    ]
    with pytest.raises(DataError, match="cannot be prepared") as error:
        make(Dataset.from_list(rows))
    assert "a text as content" in str(error.value)


def batched(rows: dict[str, list[str]]) -> list[str]:
    return [f"Q: {q} A: {a}" for q, a in zip(rows["q"], rows["a"], strict=True)]


def test_a_formatting_function_of_batches_as_trl_once_had_it(make: Any, told: Any) -> None:
    rows = Dataset.from_list([{"q": f"what is {i}", "a": str(i)} for i in range(5)])
    trainer = make(rows, formatting_func=batched)
    assert len(trainer.train_dataset) == 5
    assert trained_text(trainer, 3) == "Q: what is 3 A: 3<|endoftext|>"
    assert "called with batches" in told()
    with pytest.raises(DataError, match="returned int"):
        make(rows, formatting_func=lambda row: 3)


def test_what_a_formatting_function_raises_is_for_its_author(make: Any) -> None:
    rows = Dataset.from_list([{"q": "what", "a": "that"}] * 3)

    def broken(row: Any) -> str:
        raise RuntimeError("the script's own trouble")

    with pytest.raises(RuntimeError, match="own trouble"):
        make(rows, formatting_func=broken)
    with pytest.raises(KeyError, match="question") as error:
        make(rows, formatting_func=lambda row: row["question"])
    assert "given a batch" in error.value.__notes__[0].lower() and "KeyError" in error.value.__notes__[0]
    with pytest.raises(DataError, match="returned NoneType, and given a batch it returned NoneType"):
        make(rows, formatting_func=lambda row: None)
