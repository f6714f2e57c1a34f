"""CSV, workbooks, Arrow files and data frames as records, with the line of each."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from phlora.data.dataset import load_rows, read_rows
from phlora.errors import DataError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def _contents(row):
    return [(message["role"], message["content"]) for message in row.messages]


# ------------------------------------------------------------------------------------------------ CSV


def test_csv_lines_count_line_breaks_inside_cells(tmp_path):
    path = tmp_path / "qa.csv"
    path.write_text('question,answer\n"two\nlines",a\nq,b\n', encoding="utf-8")
    assert [row.origin.line for row in read_rows(path)] == [2, 4]


def test_csv_messages_are_parsed(tmp_path):
    path = tmp_path / "chat.csv"
    cell = json.dumps(CHAT).replace('"', '""')
    path.write_text(f'messages\n"{cell}"\n', encoding="utf-8")
    assert _contents(load_rows(path).rows[0])[1] == ("assistant", "Hello")


def test_literal_quotes_in_a_tsv_stay_in_its_six_rows(tmp_path):
    lines = [
        "question\tanswer",
        *(f'"Say {n}\tHe said "{n}' for n in range(3)),
        *(f"q{n}\ta" for n in range(3)),
    ]
    path = tmp_path / "quotes.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = load_rows(path).rows
    assert len(rows) == 6
    assert rows[0].messages[0]["content"] == '"Say 0'


def test_a_tsv_that_excel_quoted_is_unquoted(tmp_path):
    path = tmp_path / "excel.tsv"
    path.write_bytes(b'question\tanswer\r\n"say ""hi"""\tb\r\n"two\r\nlines"\tb\r\n')
    assert [row.messages[0]["content"] for row in load_rows(path).rows] == ['say "hi"', "two\r\nlines"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_delimiters_line_ends_and_index_columns(tmp_path, delimiter, end):
    rows = [["", "question", "answer"], ["0", '"a, b; c"', "x"], ["1", "d", "y"]]
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(delimiter.join(row) + end for row in rows).encode())
    loaded = load_rows(path)
    assert [_contents(row)[1][1] for row in loaded.rows] == ["x", "y"]
    assert loaded.problems == [] and loaded.rows[1].origin.line == 3


def test_excels_hint_and_empty_cells_at_the_end(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("sep=;\nquestion;answer;;\na;b;;\n;;;\nc;d;;\n", encoding="utf-8")
    assert [row.origin.line for row in load_rows(path).rows] == [3, 5]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("question,answer,question\na,b,c\n", "`question` twice"),
        ('question,answer\na,b\n"c,d\ne,f\n', r"t.csv:3: A quote opened in this row"),
        ('question,answer\n"x\ny",b\n"a" b,c\n', r"t.csv:4: Broken CSV"),
        ("question,answer\n\n\na,b,c\n", r"t.csv:4: The line has more cells"),
        ("Frage;Antwort\na;b\n", "--columns question=Frage,answer=Antwort"),
    ],
)
def test_broken_tables_name_the_line(tmp_path, content, match):
    path = tmp_path / "t.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=match):
        load_rows(path)


def test_a_named_format_says_how_to_name_the_columns(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("Frage;Antwort\na;b\n", encoding="utf-8")
    with pytest.raises(DataError, match="--columns question=Frage,answer=Antwort"):
        load_rows(path, format="qa")


def test_a_quote_that_swallows_rows_is_a_warning(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('question,answer\n"a,b\nc",d\n', encoding="utf-8")
    (problem,) = load_rows(path).problems
    assert problem.kind == "swallowed_rows" and problem.origins[0].line == 2


# ------------------------------------------------------------------------------------------------ workbooks


def test_workbooks(tmp_path):
    path = tmp_path / "table.xlsx"
    _workbook(path, {"Empty": [], "Chats": [["question", "answer"], ["שלום", 42], [], ["नमस्ते", 1.5]]})
    rows = load_rows(path).rows
    assert [_contents(row)[1][1] for row in rows] == ["42", "1.5"]
    assert [row.origin.line for row in rows] == [2, 4]
    _workbook(path, {"A": [["text"], ["a"]], "B": [["text"], ["b"]]})
    with pytest.raises(DataError, match="2 sheets"):
        load_rows(path)
    assert load_rows(f"{path}:B").rows[0].text == "b"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read"):
        load_rows(path)


def _workbook(path, sheets):
    """A workbook as small as the format allows, with texts in the cells themselves."""
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"

    def cell(value):
        return (
            f"<c><v>{value}</v></c>"
            if isinstance(value, int | float)
            else (f'<c t="inlineStr"><is><t>{value}</t></is></c>')
        )

    with zipfile.ZipFile(path, "w") as archive:
        kinds = "".join(
            f'<Override PartName="/xl/worksheets/s{n}.xml" ContentType="application/vnd.openxmlformats-'
            'officedocument.spreadsheetml.worksheet+xml"/>'
            for n in range(len(sheets))
        )
        archive.writestr(
            "[Content_Types].xml",
            f'<Types xmlns="{package}/content-types"><Default Extension="rels" ContentType="application/vnd.'
            'openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" ContentType='
            f'"application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>{kinds}</Types>',
        )
        archive.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{package}/relationships"><Relationship Id="r" Type="{office}/officeDocument" '
            'Target="xl/workbook.xml"/></Relationships>',
        )
        names = "".join(f'<sheet name="{s}" sheetId="{n + 1}" r:id="r{n}"/>' for n, s in enumerate(sheets))
        archive.writestr(
            "xl/workbook.xml",
            f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets>{names}</sheets></workbook>',
        )
        links = "".join(
            f'<Relationship Id="r{n}" Type="{office}/worksheet" Target="worksheets/s{n}.xml"/>'
            for n in range(len(sheets))
        )
        archive.writestr(
            "xl/_rels/workbook.xml.rels",
            f'<Relationships xmlns="{package}/relationships">{links}</Relationships>',
        )
        for number, rows in enumerate(sheets.values()):
            body = "".join(f'<row r="{n}">{"".join(map(cell, row))}</row>' for n, row in enumerate(rows, 1))
            archive.writestr(
                f"xl/worksheets/s{number}.xml",
                f'<worksheet xmlns="{main}"><sheetData>{body}</sheetData></worksheet>',
            )


def test_old_excel_workbooks_are_read():
    pytest.importorskip("python_calamine")
    loaded = load_rows(Path(__file__).with_name("pairs.xls"))
    assert [row.messages[0]["content"] for row in loaded.rows] == ["سلام", "c"]


# ------------------------------------------------------------------------------------------------ columns


def test_data_frames_and_arrow_tables_are_rows():
    import pandas
    import pyarrow

    frame = pandas.DataFrame({"question": ["a", "b"], "answer": ["x", "y"], "note": [None, "z"]})
    for source in (frame, pyarrow.Table.from_pandas(frame.set_index("note"))):
        assert [_contents(row)[1][1] for row in load_rows(source).rows] == ["x", "y"]
    with pytest.raises(DataError, match="No rows"):
        load_rows(frame[:0])


def test_polars_frames_are_read_and_lazy_ones_refused():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"question": ["a", "c"], "answer": ["b", "d"], "weight": [0.5, 1.0]})
    assert [row.weight for row in load_rows(frame).rows] == [0.5, 1.0]
    with pytest.raises(DataError, match="LazyFrame") as caught:
        load_rows(frame.lazy())
    assert "collect()" in str(caught.value)


def test_torn_parquet_and_arrow_files(tmp_path):
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a" * 50] * 500})
    for suffix, write in (
        (".parquet", pyarrow.parquet.write_table),
        (".feather", pyarrow.feather.write_feather),
    ):
        path = tmp_path / f"rows{suffix}"
        write(table, path)
        assert len(load_rows(path).rows) == 500
        whole = path.read_bytes()
        for cut in (0, 3, 10, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(DataError):
                load_rows(path)
