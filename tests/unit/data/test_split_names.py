"""Which split a file's name, the folders above it and a column speak of."""

from __future__ import annotations

import pytest

from phlora.data.split_names import is_held_out, other_splits, split_of_path


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train/a.jsonl", "train"),
        ("test/a.jsonl", "test"),
        ("data/Test/part-000.jsonl", "test"),
        ("old/train.jsonl", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("gsm8k_val/x.jsonl", "validation"),
        ("testset.csv", "test"),
        ("devData/rows.json", "validation"),
        ("test01/a.jsonl", "test"),
        ("mix/held-out.jsonl", "test"),
        ("hold_out/a.jsonl", "test"),
        ("test/train.jsonl", "test"),
        ("train/test.jsonl", "test"),
        ("train_test/a.jsonl", None),
        ("latest/contest.jsonl", None),
        ("developers/valuable.jsonl", None),
        ("a.jsonl", None),
    ],
)
def test_the_split_of_a_path(path, split):
    assert split_of_path(path) == split


@pytest.mark.parametrize("value", ["test", "TEST", "Test set", "validation_matched", "dev", "held-out"])
def test_values_that_keep_a_row_out(value):
    assert is_held_out(value)


@pytest.mark.parametrize("value", ["train", "training", "train_test", "contest", "", 1, None, ["test"]])
def test_values_that_do_not(value):
    assert not is_held_out(value)


def test_files_of_other_splits():
    names = ["train/a", "test/a", "extra"]
    assert other_splits(names) == {"test/a"}
    assert other_splits(names, "test") == {"train/a", "extra"}
    assert other_splits(["extra", "test/a"]) == {"test/a"}
    assert other_splits(["test/a", "dev/a"]) == set()
