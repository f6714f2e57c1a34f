"""The error tree: exit codes, what a message says, and its survival of process boundaries."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest

from phlora import errors
from phlora.display import Display
from phlora.errors import ConfigError, masked, shown


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [
        (errors.ConfigError, 2),
        (errors.DataError, 2),
        (errors.ModelError, 2),
        (errors.RunError, 2),
        (errors.MissingExtraError, 3),
        (errors.NoRoomError, 3),
        (errors.NetworkError, 3),
        (errors.NonFiniteError, 1),
    ],
)
def test_every_error_has_its_exit_code(kind: type[errors.PhloraError], exit_code: int) -> None:
    assert kind("something").exit_code == exit_code


def test_a_message_says_where_what_expected_and_what_to_do() -> None:
    error = errors.DataError("The role is unknown", where="chats.jsonl:3", expected="user", fix="rename it")
    assert str(error).splitlines() == [
        "chats.jsonl:3: The role is unknown.",
        "Expected: user",
        "What to do: rename it",
    ]


@pytest.mark.parametrize("found", ["Is it there?", "It is gone.", "Stop!"])
def test_a_message_that_ends_by_itself_gets_no_second_full_stop(found: str) -> None:
    assert str(errors.ConfigError(found)) == found


def test_an_error_survives_pickling_with_all_its_parts() -> None:
    error = errors.NetworkError("خطا", where="hub", expected="a network", fix="thử lại")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.NetworkError
    assert (copy.found, copy.where, copy.expected, copy.fix) == ("خطا", "hub", "a network", "thử lại")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("learning_rat", "did you mean `learning_rate`?"),
        ("zzz", "one of `learning_rate`, `lora_alpha`, `r`"),
    ],
)
def test_the_nearest_name_or_all_of_them(name: str, expected: str) -> None:
    assert errors.did_you_mean(name, ["r", "lora_alpha", "learning_rate"]) == expected


def test_a_long_list_of_names_is_cut() -> None:
    found = errors.did_you_mean("zzz", [f"name{i:02}" for i in range(40)])
    assert found.endswith("…") and found.count("name") == 24


SECRETS = [
    {"token": "s3cret"},
    {"outer": [{"api_key": "s3cret"}]},
    "https://me:s3cret@hub.example/model",
    "https://s3cret@hub.example/model",
    "https:/me:s3cret@hub.example/model",
    "unexpected keyword {'token': 's3cret'}",
    '{"hub_token": "s3cret"}',
    "--set training_config.hub_token=s3cret",
    "{token: s3cret",
    "password=s3cret",
    "hf_" + "s3cret" * 5,
]


@pytest.mark.parametrize("value", SECRETS, ids=str)
def test_no_message_shows_a_secret(value: Any) -> None:
    assert "s3cret" not in shown(value) and "s3cret" not in str(masked(value))
    for part in (
        {"found": shown(value)},
        {"found": "x", "where": str(value)},
        {"found": "x", "fix": str(value)},
    ):
        error = ConfigError(**part)
        assert "s3cret" not in str(error) and "s3cret" not in repr(error)
    stream = io.StringIO()
    display = Display(stream)
    for say in (display.stage, display.note, display.warn):
        say(str(value))
    assert "s3cret" not in stream.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "eos_token='<|end|>'",
        "max_new_tokens=128",
        "the token: 5",
        "hf://datasets/owner/chats@main",
        "git@host.example:owner/name",
        "C:/me@work/rows.jsonl",
        "a pad token that ends no reply",
        "token=None",
        "mail me@host.example",
        "use hub_token",
    ],
)
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert masked(text) == text
    assert masked({"eos_token": text, "num": 5, "pair": (1, 2), "none": None}) == {
        "eos_token": text,
        "num": 5,
        "pair": (1, 2),
        "none": None,
    }


def test_what_was_given_for_a_secret_is_not_shown() -> None:
    error = ConfigError(
        f"{shown(['s3cret', '`'])} was given", where="training_config.hub_token", expected="text"
    )
    assert "s3cret" not in str(error) and "(not shown)" in str(error)
