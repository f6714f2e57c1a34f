"""The run configuration: what is accepted, where each value comes from, and every way to get it wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phlora.config import (
    DataFile,
    RunConfig,
    build_config,
    default_output,
    load_config,
    parse_columns,
    resolved,
)
from phlora.config_values import apply_overrides
from phlora.errors import ConfigError

SMALLEST = {"model": "smollm2-135m", "data": "chats.jsonl"}


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_model_and_a_file_are_enough() -> None:
    config = build_config(SMALLEST)
    assert config.model.name == "smollm2-135m"
    assert config.data.files == (DataFile(path="chats.jsonl"),)
    assert config.data.eval == ()


def test_files_take_every_form() -> None:
    files = ["a.jsonl", {"path": "b.jsonl", "weight": 2}]
    config = build_config({"model": "m", "data": {"files": files, "eval": "c.jsonl"}})
    assert config.data.files == (DataFile(path="a.jsonl"), DataFile(path="b.jsonl", weight=2.0))
    assert config.data.eval == (DataFile(path="c.jsonl"),)


def test_the_sections_of_other_libraries_pass_verbatim() -> None:
    config = build_config({**SMALLEST, "training_config": {"learning_rate": "2e-4", "anything": [1]}})
    assert config.training_config == {"learning_rate": "2e-4", "anything": [1]}


def test_nothing_means_the_default() -> None:
    config = build_config(
        {"model": {"name": "m", "dtype": None}, "data": "d", "evaluation": {"metrics": None}}
    )
    assert config.model.dtype == "auto"
    assert config.evaluation.metrics == ("auto",)


def test_numbers_in_quotes_are_numbers() -> None:
    config = build_config({**SMALLEST, "evaluation": {"max_answers": "20"}})
    assert config.evaluation.max_answers == 20


def test_resolved_values_make_the_same_configuration_again() -> None:
    config = build_config({**SMALLEST, "peft_config": {"r": 16}, "output": "runs/پشتیبانی"})
    assert build_config(resolved(config)) == config


def test_json_is_read_like_yaml(tmp_path: Path) -> None:
    path = written(tmp_path, '{"model": "m", "data": ["a.jsonl"]}', "run.json")
    assert load_config(path).data.files[0].path == "a.jsonl"


def test_every_value_knows_where_it_comes_from(tmp_path: Path) -> None:
    path = written(tmp_path, "model: m\ndata: [a.jsonl]\npeft_config: {r: 8}\n")
    config = load_config(path, ["peft_config.r=16", "model.dtype=float32", "data=b.jsonl"])
    assert config.origins == {
        "model.name": str(path),
        "model.dtype": "--set",
        "data.files": "--set",
        "peft_config.r": "--set",
    }
    assert config.peft_config == {"r": 16}
    assert config.data.files[0].path == "b.jsonl"


def test_a_shorthand_can_be_extended() -> None:
    values, _ = apply_overrides({}, ["model=m", "model.dtype=float32"])
    assert values["model"] == {"name": "m", "dtype": "float32"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"data": "d"}, "`model` is missing"),
        ({"model": "m"}, "`data` is missing"),
        ({**SMALLEST, "modle": "m"}, "did you mean `model`?"),
        ({**SMALLEST, "origins": {}}, "Unknown key `origins`"),
        ({**SMALLEST, "evaluation": {"metric": "x"}}, "evaluation: Unknown key `metric`"),
        ({**SMALLEST, "evaluation": {"max_answers": 1.5}}, "a whole number"),
        ({**SMALLEST, "evaluation": {"max_answers": float("inf")}}, "a whole number"),
        ({**SMALLEST, "evaluation": {"max_answers": float("nan")}}, "a whole number"),
        ({**SMALLEST, "evaluation": {"max_answers": True}}, "a whole number"),
        ({**SMALLEST, "evaluation": {"max_answers": -1}}, "0 or more"),
        ({**SMALLEST, "evaluation": {"max_new_tokens": 0}}, "1 or more"),
        ({**SMALLEST, "evaluation": {"enabled": "yes"}}, "true or false"),
        ({**SMALLEST, "evaluation": []}, "a mapping"),
        ({**SMALLEST, "training_config": "fast"}, "a mapping"),
        ({**SMALLEST, "output": 5}, "text"),
        ({**SMALLEST, "output": " "}, "the name of a folder"),
        ({**SMALLEST, "model": 5}, "a mapping"),
        ({**SMALLEST, "model": ""}, "the name of a model"),
        ({**SMALLEST, "model": {"dtype": "auto"}}, "`name` is missing"),
        ({**SMALLEST, "data": []}, "at least one file"),
        ({**SMALLEST, "data": {"files": "d", "train_on": "asistant"}}, "did you mean `assistant`?"),
        ({**SMALLEST, "data": {"files": "d", "eval_size": -0.1}}, "0 or more"),
        ({**SMALLEST, "data": {"files": "d", "eval_size": float("nan")}}, "0 or more"),
        ({**SMALLEST, "data": {"files": {"path": "d", "weight": 0}}}, "a number above 0"),
        ({**SMALLEST, "data": {"files": {"path": "d", "weight": "heavy"}}}, "a number"),
        ({**SMALLEST, "data": {"files": [5]}}, "a mapping"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(values)
    assert says in str(caught.value)


def test_the_configuration_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        build_config(SMALLEST).output = "elsewhere"  # type: ignore[misc]
    assert isinstance(build_config(SMALLEST), RunConfig)


@pytest.mark.parametrize("word", ["none", "no", False])
def test_no_quantization_may_be_said(word: Any) -> None:
    config = build_config({"model": {"name": "m", "quantization": word}, "data": "x.jsonl"})
    assert config.model.quantization is None


def test_the_run_folder_is_named_after_the_data_by_one_rule():
    names = {
        "a/chats.jsonl": "chats",
        "chats.jsonl.gz": "chats",
        "chats.csv.ZST": "chats",
        "chats.train.jsonl": "chats.train",
        "owner/chats": "chats",
        "owner/chats:train": "chats-train",
        "*.jsonl": "run",
    }
    assert {data: default_output(data) for data in names} == {
        data: f"runs/{name}" for data, name in names.items()
    }


def test_columns_are_pairs_of_names():
    assert parse_columns(["question=Frage,answer=a.b[0]", "system=S"]) == {
        "question": "Frage",
        "answer": "a.b[0]",
        "system": "S",
    }
    for wrong in ("question", "question=", "=Frage", "a=b,a=c"):
        with pytest.raises(ConfigError, match="--columns"):
            parse_columns([wrong])
