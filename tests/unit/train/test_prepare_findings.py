"""`train` says of the data what `check` says, and with `strict` stops there."""

from __future__ import annotations

import io
import json

import pytest

from phlora.data.checks import check
from phlora.data.dataset import RowSubset, index_rows
from phlora.data.similarity import row_keys
from phlora.data.tokenize import tokenize_rows
from phlora.display import Display
from phlora.errors import DataError, Finding
from phlora.testing.tokenizers import phi3_tokenizer
from phlora.train.finetune import finetune
from phlora.train.prepare import _trained_keys


def _rows():
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}]}
        for n in range(20)
    ]
    rows[3]["messages"][1]["content"] = ""
    return [*rows, rows[5], {**rows[6], "split": "test"}]


def _train(model_folder, path, output, **data):
    stream = io.StringIO()
    display = Display(stream=stream)
    finetune(
        model=str(model_folder),
        data={"files": [str(path)], **data},
        output=output,
        dry_run=True,
        display=display,
    )
    return stream.getvalue()


def test_train_says_what_check_says(model_folder, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, _rows())), encoding="utf-8")
    said = " ".join(_train(model_folder, path, tmp_path / "run").split())
    warnings = [problem for problem in check([path]).problems if problem.severity == "warning"]
    assert {p.kind for p in warnings} == {"empty_answer", "duplicate", "held_out_split"}
    for problem in warnings:
        assert problem.message in said
    with pytest.raises(Finding, match="repeats an earlier one"):
        _train(model_folder, path, tmp_path / "run", strict=True)
    assert not (tmp_path / "run").exists()
    path.write_text("\n".join(map(json.dumps, _rows()[7:20])), encoding="utf-8")
    _train(model_folder, path, tmp_path / "run", strict=True)


def test_strict_heeds_what_only_tokens_show(model_folder, tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = _rows()[7:20]
    rows[0]["messages"][0]["content"] = "long " * 3000
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(Finding, match="max_length"):
        _train(model_folder, path, tmp_path / "run", strict=True)


def test_rows_of_weight_0_are_left_out_by_choice(model_folder, tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [{**row, "weight": int(n >= 12)} for n, row in enumerate(_rows()[:20]) if n != 3]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    said = " ".join(_train(model_folder, path, tmp_path / "run", eval_size=0).split())
    assert "11 training rows were left out" in said
    assert "the row says that it is not trained (`weight`)" in said
    assert "none of the row's tokens" not in said


def test_rows_in_which_nothing_trains_are_told_what_decides_that(model_folder, tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = _rows()[:20]
    for row in rows[:14]:
        for message in row["messages"]:
            message["weight"] = 0
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match="(?s)none of the row's tokens is trained.*weight above 0") as error:
        _train(model_folder, path, tmp_path / "run", eval_size=0)
    assert "max_length" not in str(error.value)


def test_rows_that_were_left_out_do_not_count_as_trained(tmp_path):
    index = index_rows([{"question": f"q{n}", "answer": "a", "weight": n % 2} for n in range(6)])
    rows = RowSubset(index, range(6))
    keys = _trained_keys(rows, tokenize_rows(rows, phi3_tokenizer()).rows)
    trained = [row_keys(row) for number, row in enumerate(rows) if number % 2]
    assert keys.near == {row.near for row in trained} and keys.prompts == {row.prompt for row in trained}
