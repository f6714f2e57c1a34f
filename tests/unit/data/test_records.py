"""JSON in every layout, with the line of each row, and texts a line each."""

from __future__ import annotations

import pytest

from phlora.data.dataset import load_rows
from phlora.errors import DataError
from phlora.testing import write_rows


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('[{"text": "a"}, {"text": "b"}]', [1, 1]),
        ('[\n  {"text": "a"},\n\n  {\n  "text": "b"}\n]\n', [2, 4]),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}\n', [1, 4]),
        ('{"text": "a"}\n\n\n{"text": "b"}\n', [1, 4]),
        ('\n{"version": 1,\n "data": [\n{"text": "a"},\n{"text": "b"}]}', [4, 5]),
        ('\x1e{"text": "a"}\n\x1e{"text": "b"}\n', [1, 2]),
    ],
)
def test_every_layout_of_json_with_the_line_of_each_row(tmp_path, name, content, lines):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    rows = load_rows(path).rows
    assert [(row.text, row.origin.line) for row in rows] == list(zip("ab", lines, strict=True))


def test_jsonl_under_the_name_of_json_and_a_list_inside_an_object(tmp_path):
    path = tmp_path / "rows.json"
    write_rows(path, [{"text": "a"}, {"text": "b"}])
    assert len(load_rows(path).rows) == 2
    path.write_text('{"version": "1", "data": [{"text": "a"}]}', encoding="utf-8")
    assert len(load_rows(path).rows) == 1


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"text": "a"}\n{"text": \'b\'}\n', r"x.jsonl:2: Broken JSON at column 10.*double quotes"),
        ("{'text': 'a'}\n{'text': 'b'}\n", r"x.jsonl:1: Broken JSON.*(\n.*)?json.dumps"),
        ('{"text": "a"}\n{"text": 1' + "0" * 5000 + "}\n", r"x.jsonl:2: A number has more than 4300 digits"),
        ('{"text": "a"}\n{"text": NaN}\n', r"x.jsonl:2: `NaN` is no JSON value"),
        ('{"text": "a"}\n{"text": "b", "text": "c"}\n', r"x.jsonl:2: The key `text` stands twice"),
        ('{"text": "a"}\n{"text": ' + "[" * 100_000 + "}\n", r"x.jsonl:2: The JSON is nested too deeply"),
        ('{"text": "a"}\n{"text": "b", "x": 1e400}\n', r"x.jsonl:2: `x` holds inf"),
        ('[{"text": "a"},\n{"text": "b", "text": "c"}]', r"x.jsonl:2: The key `text` stands twice"),
        ('[{"text": "a"},\n{"text": "b"', r"x.jsonl:2: Broken JSON"),
        ('[{"text": "a"}\n{"text": "b"}]', r"x.jsonl:2: Broken JSON.*comma"),
    ],
)
def test_broken_json_names_line_and_remedy(tmp_path, content, match):
    path = tmp_path / "x.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=match):
        load_rows(path)


def test_text_files_are_a_text_a_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert [(row.text, row.origin.line) for row in load_rows(path).rows] == [("one", 1), ("two", 3)]
