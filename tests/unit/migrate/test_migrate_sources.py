"""Scripts and notebooks as files: nothing but the code changes, and the original is kept."""

from __future__ import annotations

import codecs
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from phlora.errors import InputError
from phlora.migrate.report import migrate_file, migrate_files, summary
from phlora.migrate.sources import files_of, read_source, write_changed

OLD, NEW = "from trl import SFTTrainer", "from phlora import SFTTrainer"


def notebook(*cells: str, **more: Any) -> dict[str, Any]:
    code = [
        {
            "cell_type": "code",
            "execution_count": 3,
            "metadata": {"tags": ["x"]},
            "outputs": [{"output_type": "stream", "name": "stdout", "text": ["é 1e-05\n"]}],
            "source": cell.splitlines(keepends=True),
        }
        for cell in cells
    ]
    markdown = {"cell_type": "markdown", "metadata": {}, "source": "from trl import SFTTrainer"}
    return {"cells": [markdown, *code], "metadata": {}, "nbformat": 4, "nbformat_minor": 5, **more}


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old mac"])
@pytest.mark.parametrize(
    ("head", "encoding", "mark"),
    [
        ("", "utf-8", b""),
        ("", "utf-8", codecs.BOM_UTF8),
        ("# -*- coding: latin-1 -*-\n", "latin-1", b""),
    ],
    ids=["utf-8", "with a mark", "latin-1"],
)
def test_encoding_and_line_ends_stay(
    tmp_path: Path, newline: str, head: str, encoding: str, mark: bytes
) -> None:
    text = f"{head}# é\n{OLD}\nSFTTrainer(m, tokenizer=t)\n".replace("\n", newline)
    file = tmp_path / "a.py"
    file.write_bytes(mark + text.encode(encoding))
    migrate_file(file, write=True)
    new = text.replace(OLD, NEW).replace("tokenizer=", "processing_class=")
    assert file.read_bytes() == mark + new.encode(encoding)


def test_lines_that_are_added_end_as_the_others(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_bytes(b"from trl import SFTTrainer, DPOTrainer\r\nx = 1\r\n")
    migrate_file(file, write=True)
    assert file.read_bytes() == b"from trl import DPOTrainer\r\nfrom phlora import SFTTrainer\r\nx = 1\r\n"


@pytest.mark.parametrize("indent", [None, 1, 2, "\t"])
@pytest.mark.parametrize("is_ascii", [True, False])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_notebook_keeps_all_but_its_code(
    tmp_path: Path, indent: int | str | None, is_ascii: bool, end: str
) -> None:
    text = json.dumps(notebook("%matplotlib inline\n" + OLD, "x = 1"), indent=indent, ensure_ascii=is_ascii)
    file = tmp_path / "a.ipynb"
    file.write_bytes((text + end).encode())
    report = migrate_file(file, write=True)
    before, at, behind = text.rpartition(OLD)
    assert file.read_text(encoding="utf-8") == before + NEW + behind + end
    assert [line.where for line in report.changes] == ["cell 2, line 2"]


ODD_NOTEBOOK = """{ "metadata" : {"big": 1e400, "small": 1E-05, "long": 0.10000000000000000001, "minus": -0,
  "escaped": "\\u00e9\\/\\ud83d", "kernelspec": {"language":"python"}, "language_info": {"name": "python"}},
 "nbformat":4,"nbformat_minor":5, "cells":[
  {"source":["x = 1\\/2\\n" , "%s"
  ], "outputs": [{"data": NaN}], "cell_type" : "code"} ,\t
  {"cell_type":"code", "source": "y = '\\u00e9'\\n%s", "source2": []}]} \r\n\n"""


def test_every_other_byte_of_a_notebook_stays(tmp_path: Path) -> None:
    old = (OLD, "SFTTrainer(m, tokenizer=t)")
    new = (NEW, "SFTTrainer(m, processing_class=t)")
    file = tmp_path / "a.ipynb"
    file.write_bytes(codecs.BOM_UTF8 + (ODD_NOTEBOOK % old).encode())
    assert migrate_file(file, write=True).is_changed
    assert file.read_bytes() == codecs.BOM_UTF8 + (ODD_NOTEBOOK % new).encode()


@pytest.mark.parametrize("source", [[OLD], ["x = 1\n", OLD], [f"x = 1\n{OLD}\n", "", "y = 'é'"], OLD])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" , ", " : ")])
def test_lines_that_are_added_to_a_cell_are_laid_out_as_the_others(
    tmp_path: Path, source: list[str] | str, separators: tuple[str, str]
) -> None:
    content = notebook("a")
    content["cells"][1]["source"] = source
    before = json.dumps(content, separators=separators)
    file = tmp_path / "a.ipynb"
    file.write_text(before.replace("SFTTrainer", "SFTTrainer, DPOTrainer"), encoding="utf-8")
    migrate_file(file, write=True)
    after = json.loads(file.read_text(encoding="utf-8"))
    text = "".join(after["cells"][1].pop("source"))
    assert text == "".join(source).replace(OLD, f"from trl import DPOTrainer\n{NEW}")
    del content["cells"][1]["source"]
    assert after["cells"][1] == content["cells"][1]


def test_cells_know_each_other(tmp_path: Path) -> None:
    file = tmp_path / "a.ipynb"
    cells = [OLD, "from trl import SFTConfig\na = SFTConfig('o')", "SFTTrainer(m, a, packing=True)"]
    file.write_text(json.dumps(notebook(*cells)), encoding="utf-8")
    migrate_file(file, write=True)
    new = ["".join(cell["source"]) for cell in json.loads(file.read_text(encoding="utf-8"))["cells"][1:]]
    assert new == [NEW, "from phlora import SFTConfig\na = SFTConfig('o', packing=True)", "SFTTrainer(m, a)"]


def test_cells_that_are_not_read_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.ipynb"
    file.write_text(json.dumps(notebook(f"%%writefile b.py\n{OLD}", OLD)), encoding="utf-8")
    report = migrate_file(file)
    assert report.notes == ("cell 2 (%%writefile) is not read; migrate the file that it writes",)
    assert "%%writefile" in summary([report], is_written=False)


def test_parts_of_a_notebook_that_are_not_read_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.ipynb"
    cells = [
        "!pip install -q trl\nx = 1",
        "%%time\n!python train.py --x\ny = 1\n!ls\n%cd a\n",
        "%%R\nplot(x)",
        "",
        f"%time {OLD}\nprint?",
    ]
    content = notebook(*cells)
    content["cells"].append({"cell_type": "raw", "metadata": {}, "source": [OLD]})
    content["cells"].append({"cell_type": "raw", "metadata": {}, "source": [" "]})
    content["cells"].append({"cell_type": "code", "metadata": {}, "source": None})
    file.write_text(json.dumps(content), encoding="utf-8")
    report = migrate_file(file)
    assert report.notes == (
        "cell 2, line 1 (!pip) is not read",
        "cell 3, lines 2 (!python), 4 (!ls) and 5 (%cd) are not read; migrate train.py, which they name",
        "cell 4 (%%R) is not read",
        "cell 6, line 1 (%time) is not read",
        "cell 7 (raw) is not read",
    )


def test_the_original_is_kept_and_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("one\n")
    file.chmod(0o755)
    assert write_changed(file, b"two\n").name == "a.py.orig"
    assert write_changed(file, b"three\n").name == "a.py.orig.2"
    # The same again needs no other copy.
    file.write_text("two\n")
    assert write_changed(file, b"four\n").name == "a.py.orig.2"
    assert (tmp_path / "a.py.orig").read_text() == "one\n"
    assert (tmp_path / "a.py.orig.2").read_text() == "two\n"
    assert os.access(file, os.X_OK) and file.read_text() == "four\n"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / "a.py"
    real.write_text(f"{OLD}\n")
    link = tmp_path / "link.py"
    link.symlink_to(real)
    migrate_file(link, write=True)
    assert link.is_symlink() and real.read_text() == f"{NEW}\n"


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(f"{OLD}\n")
    report = migrate_file(file)
    assert report.is_changed and report.original is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.py"] and file.read_text() == f"{OLD}\n"
    assert f"-{OLD}\n+{NEW}\n" in "".join(report.diffs)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(f"{OLD}\nopen({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    migrate_file(file, write=True)
    assert not (tmp_path / "ran").exists()


def test_folders(tmp_path: Path) -> None:
    for name in (
        "a.py",
        "sub/b.py",
        ".hidden/c.py",
        "venv/d.py",
        "sub/__pycache__/e.py",
        "e/f.py",
        "readme.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{OLD}\n")
    (tmp_path / "e" / "pyvenv.cfg").touch()
    (tmp_path / "sub" / "broken.py").write_text(f"{OLD}\nx = = 1\n")
    found = [str(path.relative_to(tmp_path)) for path in files_of([tmp_path, tmp_path / "a.py"])]
    assert found == ["a.py", "sub/b.py", "sub/broken.py"]
    reports = {report.path.name: report for report in migrate_files([tmp_path], write=True)}
    assert "Line 2 is no Python 3" in reports["broken.py"].problem
    assert (tmp_path / "sub" / "b.py").read_text() == f"{NEW}\n"
    assert "broken.py: not read" in summary(list(reports.values()), is_written=True)


def test_one_that_cannot_be_written_does_not_keep_others_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(f"{OLD}\n")

    def refuse(path: Path, content: bytes) -> Path:
        if path.name == "a.py":
            raise PermissionError(errno.EACCES, "Permission denied")
        return write_changed(path, content)

    monkeypatch.setattr("phlora.migrate.report.write_changed", refuse)
    first, second = migrate_files([tmp_path], write=True)
    assert "cannot be written (Permission denied)" in first.problem and second.original is not None
    assert (tmp_path / "a.py").read_text() == f"{OLD}\n" and (tmp_path / "b.py").read_text() == f"{NEW}\n"


BROKEN = {
    "no Python": ("a.py", b"import trl\nif x\n", "Line 2 is no Python 3"),
    "Python 2": ("a.py", b'import trl\nprint "x"\n', "Line 2 is no Python 3"),
    "another encoding": ("a.py", "import trl # \xe9".encode("latin-1"), "not encoded"),
    "an unknown encoding": ("a.py", b"# coding: none-such\n", "not encoded"),
    "a zero byte": ("a.py", b"import trl\n\x00", "no Python 3"),
    "a cell": (
        "a.ipynb",
        json.dumps(notebook("import trl", "x = = 1")).encode(),
        "Cell 3, line 1 is no Python 3",
    ),
    "a cell of Python 2": (
        "a.ipynb",
        json.dumps(notebook("import trl", "x = 1\nprint 'x'\nimport os")).encode(),
        "Cell 3, line 2 is no Python 3: `print 'x'`",
    ),
    "an open bracket": ("a.py", b"import trl\nf(1,\nx = 2\n", "Line 2 is no Python 3"),
    "many brackets": ("a.py", b"import trl\nx = " + b"(" * 3000 + b")" * 3000, "nested too deeply"),
    "many signs": ("a.py", b"import trl\nx = " + b"-" * 100000 + b"1", "nested too deeply"),
    "many terms": ("a.py", b"import trl\nx = " + b"1+" * 5000 + b"1", "nested too deeply"),
    "half of a character": ("a.ipynb", json.dumps(notebook("import trl # \ud800")).encode(), "half of a"),
    "no JSON": ("a.ipynb", b"{", "no valid JSON"),
    "a list": ("a.ipynb", b"[]", "no notebook of format 4"),
    "format 3": ("a.ipynb", b'{"worksheets": [], "nbformat": 3}', "no notebook of format 4"),
    "R": ("a.ipynb", json.dumps(notebook("x", metadata={"kernelspec": {"language": "R"}})).encode(), "`r`"),
    "another kind": ("a.txt", b"", "no script and no notebook"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_one_message(tmp_path: Path, name: str) -> None:
    file, content, message = BROKEN[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        migrate_files([tmp_path / file], write=True)
    assert (tmp_path / file).read_bytes() == content


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        migrate_files([tmp_path / "none.py"])


def test_a_notebook_without_code(tmp_path: Path) -> None:
    file = tmp_path / "a.ipynb"
    file.write_text(json.dumps(notebook()), encoding="utf-8")
    assert read_source(file).text == "" and not migrate_file(file).is_changed
