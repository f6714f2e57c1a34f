"""Files that appear whole or not at all, and JSON files that are no object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phlora import files
from phlora.errors import InputError, ModelError, NoRoomError, RunError

WORDS = "سلام नमस्ते Здраво ığüş Xin chào"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_reads_back_and_stays_readable_to_people(tmp_path: Path) -> None:
    files.write_json(tmp_path / "facts.json", {"words": WORDS, "folder": tmp_path})
    assert files.read_json(tmp_path / "facts.json", RunError) == {"words": WORDS, "folder": str(tmp_path)}
    assert WORDS in (tmp_path / "facts.json").read_text(encoding="utf-8")
    assert names(tmp_path) == ["facts.json"]


def test_a_failed_replacement_leaves_the_old_file_alone(tmp_path: Path) -> None:
    files.write_text(tmp_path / "card.md", "old")
    with pytest.raises(RuntimeError), files.replaced_file(tmp_path / "card.md") as part:
        part.write_text("ne")
        raise RuntimeError
    assert (tmp_path / "card.md").read_text() == "old"
    files.write_text(tmp_path / "card.md", "new")
    assert (tmp_path / "card.md").read_text() == "new"
    assert names(tmp_path) == ["card.md"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with files.replaced_file(path) as first, files.replaced_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert names(tmp_path) == ["report.json"]


def test_a_file_does_not_bring_back_a_folder_that_was_removed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_json(tmp_path / "checkpoint-5" / "complete.json", {"step": 5})
    assert names(tmp_path) == []


def test_a_failed_replacement_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    best = tmp_path / "adapter" / "best"
    with files.replaced_folder(best) as part:
        (part / "weights").write_text("old")
    with pytest.raises(RuntimeError), files.replaced_folder(best) as part:
        (part / "weights").write_text("new")
        raise RuntimeError
    assert (best / "weights").read_text() == "old"
    # At the last moment: the old folder has moved already, and what should take its place is gone.
    with pytest.raises(OSError), files.replaced_folder(best) as part:
        part.rmdir()
    assert (best / "weights").read_text() == "old"
    with files.replaced_folder(best) as part:
        (part / "weights").write_text("new")
    assert (best / "weights").read_text() == "new"
    assert names(best.parent) == ["best"]


@pytest.mark.parametrize("problem", [ModelError, RunError])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "no valid JSON"),
        (b'{"name": "\xff"}', "no valid JSON"),
        (json.dumps(["a"]).encode(), "no JSON object"),
        (None, "cannot be read"),
    ],
    ids=["cut", "not utf-8", "a list", "absent"],
)
def test_a_file_that_holds_no_object_is_named(
    tmp_path: Path, content: bytes | None, says: str, problem: type[InputError]
) -> None:
    file = tmp_path / "run.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(problem, match=says) as refusal:
        files.read_json(file, problem)
    assert refusal.value.where == str(file)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    options = {"what": "The run", "fix": "make room"}
    files.require_room(tmp_path / "not" / "yet" / "there", 1000, **options)
    with pytest.raises(NoRoomError, match="The run takes about 1,000,000,000,000 MB"):
        files.require_room(tmp_path / "not" / "yet" / "there", 10**18, **options)
