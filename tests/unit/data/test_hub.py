"""A data set of the hub: its splits, and one message for each way in which it cannot be had."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import errors

from phlora.data.dataset import load_rows
from phlora.data.readers.hub import pick_split, read_hub
from phlora.errors import DataError, NetworkError, PhloraError

NAME = "someone/some-chats"
RESPONSE: Any = SimpleNamespace(headers={}, status_code=401, request=None, url="https://hub")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As on a machine with a hub, which answers what the test says."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    return monkeypatch


def raising(error: Exception) -> Any:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.GatedRepoError("gated", response=RESPONSE), DataError, "gated(?s:.*)hf auth login"),
        (errors.RepositoryNotFoundError("none", response=RESPONSE), DataError, "neither such a file nor"),
        (errors.HFValidationError("bad name"), DataError, "neither such a file nor"),
        (errors.HfHubHTTPError("503", response=RESPONSE), NetworkError, "cannot be reached .HfHubHTTPError"),
        (TimeoutError("slow"), NetworkError, "cannot be reached .TimeoutError"),
    ],
)
def test_what_the_hub_answers_is_one_message_before_anything_is_loaded(
    online: pytest.MonkeyPatch, error: Exception, kind: type[PhloraError], message: str
) -> None:
    online.setattr(huggingface_hub.HfApi, "dataset_info", raising(error))
    online.setattr(datasets, "load_dataset", raising(AssertionError("was asked")))
    with pytest.raises(kind, match=message):
        read_hub(NAME, None)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (DatasetNotFoundError("none"), DataError, "neither such a file nor"),
        (ConnectionError("down"), NetworkError, "cannot be reached .ConnectionError"),
        (ValueError("odd columns"), DataError, "cannot be loaded: odd columns"),
    ],
)
def test_what_goes_wrong_in_loading_is_one_message(
    online: pytest.MonkeyPatch, error: Exception, kind: type[PhloraError], message: str
) -> None:
    online.setattr(datasets, "load_dataset", raising(error))
    with pytest.raises(kind, match=message):
        read_hub(NAME, None)


def test_an_unreachable_hub_is_a_network_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", raising(OSError("no network here")))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(NetworkError, match="cannot be reached") as caught:
        load_rows(NAME)
    assert caught.value.exit_code == 3


def test_offline_nothing_is_asked_and_what_to_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", raising(AssertionError("was asked")))
    monkeypatch.setattr(datasets, "load_dataset", raising(ConnectionError("offline")))
    with pytest.raises(NetworkError, match="offline mode forbids asking"):
        read_hub(NAME, None)


def test_rows_are_counted_from_one_in_the_split_that_was_asked_for(online: pytest.MonkeyPatch) -> None:
    sets = DatasetDict(
        train=Dataset.from_list([{"text": "a"}, {"text": "b"}]), test=Dataset.from_list([{"text": "c"}])
    )
    online.setattr(datasets, "load_dataset", lambda _: sets)
    assert list(read_hub(NAME, None)) == [(1, {"text": "a"}), (2, {"text": "b"})]
    assert list(read_hub(NAME, "test")) == [(1, {"text": "c"})]


def test_no_split_is_guessed() -> None:
    assert pick_split(["train", "test"], None, where=NAME) == "train"
    assert pick_split(["only"], None, where=NAME) == "only"
    with pytest.raises(DataError, match=f"No split `train`(?s:.*){NAME}:a, {NAME}:b"):
        pick_split(["a", "b"], None, where=NAME)
    with pytest.raises(DataError, match="No split `tst`(?s:.*)did you mean `test`"):
        pick_split(["train", "test"], "tst", where=str(Path("x")))
