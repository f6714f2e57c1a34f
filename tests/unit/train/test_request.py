"""What `finetune` was asked for becomes one configuration, and objects that JSON or YAML cannot hold stay beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from phlora.config import RunConfig, build_config
from phlora.errors import ConfigError, EnvironmentProblem, RunError
from phlora.testing import chat_rows
from phlora.train.request import (
    Objects,
    collect_request,
    data_of,
    require_one_process,
    require_rows_outside,
    write_records,
)

ROWS = chat_rows(4)


def config_of(**values: Any) -> RunConfig:
    return build_config({"model": "m", "data": "rows.jsonl", **values})


@pytest.mark.parametrize(("processes", "refused"), [(None, False), ("1", False), ("x", False), ("2", True)])
def test_one_process_writes_a_run(
    monkeypatch: pytest.MonkeyPatch, processes: str | None, refused: bool
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    if not refused:
        return require_one_process()
    with pytest.raises(EnvironmentProblem, match="started 2 processes"):
        require_one_process()


def test_a_configuration_and_arguments_that_say_the_same_are_not_mixed() -> None:
    with pytest.raises(ConfigError, match="Both `config` and `model`, `output` were given"):
        collect_request(config_of(), model="m", output="runs/x")
    with pytest.raises(ConfigError, match="`data` is missing"):
        collect_request(None, model="m")


def test_files_are_named_in_the_configuration_and_each_value_says_where_it_came_from() -> None:
    request = collect_request(
        None, model=Path("base"), data=[Path("a.jsonl"), "b.jsonl"], training_config={"max_steps": 3}
    )
    config = request.config
    assert config.model.name == "base"
    assert [file.path for file in config.data.files] == ["a.jsonl", "b.jsonl"]
    assert config.origins["model.name"] == config.origins["data.files"] == "argument"
    assert config.origins["training_config.max_steps"] == "argument"
    assert (request.objects.train, request.objects.held_out, request.objects.model) == (None, None, None)


def test_rows_in_memory_are_named_after_the_files_that_they_are_written_to() -> None:
    request = collect_request(None, model="m", data=ROWS, eval_data=ROWS[:1], output="runs/x")
    assert request.objects.train is ROWS and request.objects.held_out == ROWS[:1]
    assert [Path(file.path).parent for file in request.config.data.files] == [Path("runs/x")]
    assert [Path(file.path).parent for file in request.config.data.eval] == [Path("runs/x")]
    assert request.config.data.files != request.config.data.eval


def test_the_splits_of_a_dictionary_of_data_sets_are_told_by_their_names() -> None:
    train, test = Dataset.from_list(ROWS[1:]), Dataset.from_list(ROWS[:1])
    both = collect_request(None, model="m", data=DatasetDict(train=train, test=test), output="x").objects
    assert both.train is train and both.held_out is test
    own = collect_request(
        None, model="m", data=DatasetDict(train=train, test=test), eval_data=ROWS, output="x"
    )
    assert own.objects.held_out is ROWS
    assert collect_request(None, model="m", data={"only": train}, output="x").objects.train is train
    with pytest.raises(ConfigError, match="the splits a, b, and none of them is `train`"):
        collect_request(None, model="m", data={"a": train, "b": test})
    with pytest.raises(ConfigError, match="`eval_data` is a dictionary of data sets"):
        collect_request(None, model="m", data=train, eval_data={"a": test, "b": test})


@pytest.mark.parametrize("name", ["test", "validation", "eval", "dev", "val", "valid", "testing", "held_out"])
def test_held_out_rows_are_known_by_every_name_that_files_of_them_have(name: str) -> None:
    train, other = Dataset.from_list(ROWS[1:]), Dataset.from_list(ROWS[:1])
    sets = {"train": train, "unsupervised": train, name: other}
    assert collect_request(None, model="m", data=sets, output="x").objects.held_out is other
    both = {**sets, "validation": other, "test": train}
    assert collect_request(None, model="m", data=both, output="x").objects.held_out is train


def test_rows_that_can_be_read_once_are_kept_and_what_is_no_row_is_told() -> None:
    once = IterableDataset.from_generator(lambda: iter(ROWS))
    assert data_of(once, []) == ROWS and data_of(iter(ROWS), []) == ROWS
    assert data_of(ROWS, []) is ROWS
    for wrong in (5, [5], [b"row"]):
        with pytest.raises(ConfigError, match="Rows of the type `(int|bytes)` were given"):
            data_of(wrong, [])


def test_the_folder_that_scripts_name_is_the_output_unless_one_is_named() -> None:
    named = collect_request(config_of(training_config={"output_dir": "here"}))
    assert named.config.output == "here" and "output_dir" not in named.config.training_config
    both = collect_request(config_of(training_config={"output_dir": "here"}, output="there"))
    assert both.config.output == "there"
    assert both.notes == ("training_config.output_dir (here) gives way to output (there)",)


@pytest.mark.parametrize(
    ("data", "settings", "trained"),
    [
        ({}, {"assistant_only_loss": True}, "assistant"),
        ({"train_on": "last"}, {"assistant_only_loss": True}, "last"),
        ({}, {"assistant_only_loss": False, "completion_only_loss": False}, "all"),
    ],
)
def test_what_trains_may_be_said_as_in_trl(data: dict[str, str], settings: Any, trained: str) -> None:
    config = build_config({"model": "m", "data": {"files": "a.jsonl", **data}, "training_config": settings})
    assert collect_request(config).config.data.train_on == trained


def test_two_answers_to_what_trains_are_refused() -> None:
    config = build_config(
        {
            "model": "m",
            "data": {"files": "a.jsonl", "train_on": "all"},
            "training_config": {"assistant_only_loss": True},
        },
        {"data.train_on": "argument"},
    )
    with pytest.raises(ConfigError, match="data.train_on: all contradict each other"):
        collect_request(config)


def test_functions_of_one_name_are_refused_as_one_would_be_left_out() -> None:
    metrics = [lambda a, b: 1.0, lambda a, b: 0.0]
    with pytest.raises(ConfigError, match="Two metrics are called `<lambda>`"):
        collect_request(None, model="m", data="a.jsonl", evaluation={"metrics": metrics})


def test_metrics_that_are_functions_stay_objects() -> None:
    def length(*_: Any) -> float:
        return 1.0

    request = collect_request(
        None, model="m", data="a.jsonl", evaluation={"metrics": ["exact_match", length]}
    )
    assert request.objects.metrics == {"length": length}
    assert list(request.config.evaluation.metrics) == ["exact_match"]


def test_rows_are_never_in_the_folder_that_is_emptied(tmp_path: Path) -> None:
    inside, outside = (str(tmp_path / name / "rows.jsonl") for name in ("run", "data"))
    config = build_config({"model": "m", "data": inside, "output": str(tmp_path / "run")})
    with pytest.raises(RunError, match="lie in the run folder that would be replaced"):
        require_rows_outside(config, Objects(), overwrite=True)
    require_rows_outside(config, Objects(), overwrite=False)
    require_rows_outside(config, Objects(train=ROWS), overwrite=True)
    held_out = build_config(
        {"model": "m", "data": {"files": outside, "eval": inside}, "output": str(tmp_path / "run")}
    )
    with pytest.raises(RunError, match="run.rows.jsonl"):
        require_rows_outside(held_out, Objects(), overwrite=True)


@pytest.mark.parametrize("nested", [False, True])
def test_written_rows_are_read_back_to_the_same(tmp_path: Path, nested: bool) -> None:
    rows = [*ROWS, {"text": "سلام\u2028\n", "n": np.int64(3), "v": np.array([1.5, 2.0])}]
    write_records([rows[:2], rows[2:]] if nested else rows, tmp_path / "rows.jsonl")
    # JSON lines end with a line feed and with nothing else.
    lines = (tmp_path / "rows.jsonl").read_text("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        *ROWS,
        {"text": "سلام\u2028\n", "n": 3, "v": [1.5, 2.0]},
    ]
    assert lines[-1] == ""


def test_a_data_frame_is_written_row_by_row(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    write_records(pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]}), tmp_path / "rows.jsonl")
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()] == [
        {"a": 1, "b": "x"},
        {"a": 2, "b": "y"},
    ]
