"""The digests of trained rows: what is counted, and what a damaged or older file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from phlora.data.dataset import load_rows
from phlora.data.rows import row_key
from phlora.data.similarity import row_keys
from phlora.runs.folder import TRAINED_KEYS_FILE, RunFolder
from phlora.runs.trained_rows import TrainedCount, TrainedKeys, count_trained, write_trained_keys
from phlora.testing import chat_rows

ROWS = load_rows(chat_rows(8)).rows


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that trained on the first six rows."""
    keys = [row_keys(row) for row in ROWS[:6]]
    trained = TrainedKeys(near=[key.near for key in keys], prompts=[key.prompt for key in keys])
    write_trained_keys(trained, tmp_path / TRAINED_KEYS_FILE)
    return RunFolder(tmp_path)


def test_rows_are_counted(run: RunFolder) -> None:
    assert count_trained(run, ROWS) == TrainedCount(same=6, same_prompt=0)
    assert count_trained(run, ROWS[6:]) == TrainedCount(same=0, same_prompt=0)
    other = chat_rows(1)[0]["messages"]
    other[1]["content"] = "another answer"
    assert count_trained(run, load_rows([{"messages": other}]).rows) == TrainedCount(same=0, same_prompt=1)


def test_a_file_of_an_earlier_version_tells_equal_rows(run: RunFolder) -> None:
    keys = sorted(bytes.fromhex(row_key(row))[:8] for row in ROWS[:6])
    (run.path / TRAINED_KEYS_FILE).write_bytes(b"".join(keys))
    assert count_trained(run, ROWS) == TrainedCount(same=6, same_prompt=None)


@pytest.mark.parametrize("length", [0, 7, 8, 12, 16, 24, 40, -8, -3])
def test_a_cut_file_says_nothing(run: RunFolder, length: int) -> None:
    file = run.path / TRAINED_KEYS_FILE
    content = file.read_bytes()
    file.write_bytes(content[:length])
    said = count_trained(run, ROWS)
    # Of the prompts alone a whole one may be missing at the end: the rows are still known.
    assert said is None or (length == -8 and said.same == 6)
