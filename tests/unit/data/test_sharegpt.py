"""ShareGPT's turns in the words of chat templates."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetDict

from phlora import standardize_sharegpt
from phlora.errors import DataError

TURNS = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
]
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]


def test_roles_and_keys() -> None:
    rows = standardize_sharegpt(Dataset.from_list([{"id": 1, "conversations": TURNS}]))
    assert rows[0] == {"id": 1, "conversations": CHAT}
    # What is standard already stays.
    assert standardize_sharegpt(rows)[0] == rows[0]


def test_splits() -> None:
    rows = DatasetDict(train=Dataset.from_list([{"messages": TURNS}]))
    assert standardize_sharegpt(rows)["train"][0] == {"messages": CHAT}


def test_mistakes() -> None:
    with pytest.raises(DataError, match="no chats"):
        standardize_sharegpt(Dataset.from_list([{"text": "a"}]))
    with pytest.raises(DataError, match="`robot` is not known"):
        standardize_sharegpt(Dataset.from_list([{"conversations": [{"from": "robot", "value": "a"}]}]))


@pytest.mark.parametrize(
    "given", [[{"conversations": TURNS}], "chats.jsonl", None], ids=["rows", "path", "nothing"]
)
def test_what_is_no_data_set_is_named(given: object) -> None:
    with pytest.raises(DataError, match=r"was given\.\nExpected: a `datasets` object"):
        standardize_sharegpt(given)


@pytest.mark.parametrize("turns", [None, "Hi", ["Hi"], 5], ids=repr)
def test_what_is_no_chat_is_named(turns: object) -> None:
    rows = Dataset.from_list([{"conversations": turns}])
    with pytest.raises(DataError, match="that is no chat"):
        standardize_sharegpt(rows)
