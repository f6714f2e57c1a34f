"""What is given to public functions by mistake is one message, and never done in another sense without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

import phlora
from phlora.display import Display
from phlora.errors import ConfigError, InputError
from phlora.parameters import require_choice, require_count, require_path
from phlora.testing import chat_rows, tiny_phi3

RAW = chat_rows(4)
TOKENIZER = tiny_phi3()[1]


@pytest.mark.parametrize("value", [0, -1, "3", 2.0, True, None, [1]], ids=repr)
def test_what_is_no_count_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match="a whole number from 1 on") as error:
        require_count(value, where="max_rows")
    assert error.value.where == "max_rows"


@pytest.mark.parametrize("value", [1, 7, np.int64(3)], ids=repr)
def test_counts_are_counts_of_any_library(value: Any) -> None:
    require_count(value, where="max_rows")
    require_count(0, where="max_rows", least=0)


def test_choices_and_paths() -> None:
    require_choice("last", ["last", "all"], where="train_on")
    for value in ("lst", 5, None, ["last"]):
        with pytest.raises(ConfigError, match="`last`"):
            require_choice(value, ["last", "all"], where="train_on")
    require_path(Path("a"), where="source", expected="a run")
    require_path("a", where="source", expected="a run")
    with pytest.raises(ConfigError, match="Expected: a run, as a text or a path"):
        require_path(5, where="source", expected="a run")


def evaluated(**settings: Any) -> Any:
    model, tokenizer = tiny_phi3()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv_proj"]))
    known: dict[str, Any] = {"tokenizer": tokenizer, "data": RAW, "display": Display(quiet=True)}
    return phlora.evaluate_model(adapted, **{**known, **settings})


def rows() -> Any:
    return phlora.load_rows([RAW]).rows


# The parameter that is named -> calls in which something is wrong with it.
MISTAKES: dict[str, list[Callable[[], Any]]] = {
    "train_on": [
        lambda: phlora.tokenize_rows(rows(), TOKENIZER, train_on="asistant"),
        lambda: phlora.check(RAW, train_on="asistant"),
        lambda: evaluated(train_on="asistant"),
    ],
    "too_long": [
        lambda: phlora.tokenize_rows(rows(), TOKENIZER, too_long="cut"),
        lambda: phlora.check(RAW, TOKENIZER, too_long="cut"),
        lambda: phlora.preview(rows(), TOKENIZER, 1, too_long="cut"),
    ],
    "on_bad": [
        lambda: phlora.tokenize_rows(rows(), TOKENIZER, on_bad="ignore"),
        lambda: phlora.load_rows([RAW], on_bad="ignore"),
    ],
    "max_length": [
        lambda: phlora.tokenize_rows(rows(), TOKENIZER, max_length=0),
        lambda: phlora.check(RAW, TOKENIZER, max_length=-1),
        lambda: evaluated(max_length="5"),
    ],
    "tokenizer": [
        lambda: phlora.tokenize_rows(rows(), "gpt2"),
        lambda: phlora.preview(rows(), None, 1),
        lambda: phlora.check(RAW, "gpt2"),
        lambda: evaluated(tokenizer="gpt2"),
    ],
    "n": [
        lambda: phlora.preview(rows(), TOKENIZER, -1),
        lambda: phlora.preview(rows(), TOKENIZER, "3"),
    ],
    "max_answers": [lambda: evaluated(max_answers=-1), lambda: evaluated(max_answers="3")],
    "max_new_tokens": [lambda: evaluated(max_new_tokens=0)],
    "batch_size": [lambda: evaluated(batch_size=0), lambda: evaluated(batch_size="2")],
    "speed": [
        lambda: evaluated(speed="fast"),
        lambda: phlora.at_speed(tiny_phi3()[0], "fast").__enter__(),
    ],
    "base": [lambda: evaluated(base="smollm2-135m")],
    "model": [lambda: phlora.load_tokenizer(5), lambda: phlora.load_model(None)],
    "max_rows": [
        lambda: phlora.merge_run("no such run", "out", max_rows=0),
        lambda: phlora.merge_run("no such run", "out", max_rows=-2),
    ],
    "source": [
        lambda: phlora.evaluate_run(5),
        lambda: phlora.convert(5, "out", to="peft"),
        lambda: phlora.merge_run(5, "out"),
    ],
    "output": [lambda: phlora.convert("in", 6, to="peft"), lambda: phlora.merge_run("in", None)],
    "to": [lambda: phlora.convert("in", "out", to="lora")],
    "configuration": [lambda: phlora.load_config(5)],
}


@pytest.mark.parametrize(
    ("where", "call"), [(where, call) for where, calls in MISTAKES.items() for call in calls]
)
def test_the_parameter_is_named(where: str, call: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match="was given") as error:
        call()
    assert error.value.where == where


def test_a_name_that_is_no_text_is_not_known_either() -> None:
    with pytest.raises(ConfigError, match="no embedded model `5`"):
        phlora.embedded_folder(5)  # type: ignore[arg-type]
