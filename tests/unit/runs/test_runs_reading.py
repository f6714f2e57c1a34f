"""Files that are named later are read with the run's own settings, unless others are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phlora.config import RunConfig, build_config
from phlora.errors import ConfigError, DataError
from phlora.runs.reading import read_like_run
from phlora.testing import chat_rows, write_rows

COLUMNS = {"question": "Frage", "answer": "Antwort"}


def config_of(*columns: dict[str, str], format: str = "auto") -> RunConfig:
    files = [{"path": f"{number}.csv", "columns": names} for number, names in enumerate(columns or ({},))]
    return build_config({"model": {"name": "m"}, "data": {"files": files, "format": format}}, {})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "more.csv"
    path.write_text("Antwort,Frage\nja,wirklich?\n", encoding="utf-8")
    return path


def texts(rows: Any) -> list[str]:
    return [message["content"] for row in rows for message in row.messages]


def test_the_run_s_columns_and_format_are_taken(table: Path) -> None:
    assert texts(read_like_run([str(table)], config_of(COLUMNS, format="qa"))) == ["wirklich?", "ja"]


def test_what_is_named_comes_first(table: Path) -> None:
    other = config_of({"question": "Text", "answer": "Label"}, format="alpaca")
    assert texts(read_like_run(table, other, format="qa", columns=COLUMNS)) == ["wirklich?", "ja"]


def test_columns_that_the_run_s_files_do_not_share_are_not_taken(table: Path, tmp_path: Path) -> None:
    chats = write_rows(tmp_path / "chats.jsonl", chat_rows(2))
    assert len(read_like_run(chats, config_of(COLUMNS, {"question": "Q", "answer": "A"}))) == 2
    assert len(read_like_run(chats, None)) == 2 and len(read_like_run(chat_rows(3), config_of(COLUMNS))) == 3


def test_a_file_of_another_kind_says_how_to_read_it_without_the_run_s_settings(tmp_path: Path) -> None:
    chats = write_rows(tmp_path / "chats.jsonl", chat_rows(2))
    with pytest.raises((DataError, ConfigError), match="--columns") as refusal:
        read_like_run([str(chats)], config_of(COLUMNS, format="qa"))
    assert "--format auto" in str(refusal.value)
    assert len(read_like_run([str(chats)], config_of(COLUMNS, format="qa"), format="auto", columns={})) == 2
