"""Every kind of file gives the same records, with the line that each came from."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import socket
import zipfile
from pathlib import Path

import pytest

from phlora.config import DataFile
from phlora.data.dataset import load_rows, read_rows
from phlora.data.readers import files
from phlora.data.readers.encodings import sample_of
from phlora.data.rows import Origin
from phlora.errors import ConfigError, DataError, NetworkError
from phlora.testing import LANGUAGES

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def _write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def _contents(row):
    return [(message["role"], message["content"]) for message in row.messages]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
def test_every_file_type_keeps_all_languages(tmp_path, suffix):
    records = [{"question": f"{code}?", "answer": text} for code, text in LANGUAGES.items()]
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        _write(path, records)
    elif suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        mark = "\t" if suffix == ".tsv" else ","
        lines = [mark.join(f'"{cell}"' for cell in record.values()) for record in records]
        path.write_text("\n".join([mark.join(records[0]), *lines]), encoding="utf-8-sig")
    rows = load_rows(path).rows
    assert [row.messages[1]["content"] for row in rows] == list(LANGUAGES.values())
    assert rows[0].origin == Origin(str(path), 2 if suffix in (".csv", ".tsv") else 1)


def test_jsonl_lines_are_real_lines_past_blanks_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n\n  \n{"text": "b"}\n')
    assert [row.origin.line for row in read_rows(path)] == [1, 4]


def test_csv_lines_count_line_breaks_inside_cells(tmp_path):
    path = tmp_path / "qa.csv"
    path.write_text('question,answer\n"two\nlines",a\nq,b\n', encoding="utf-8")
    assert [row.origin.line for row in read_rows(path)] == [2, 4]


def test_csv_messages_are_parsed(tmp_path):
    path = tmp_path / "chat.csv"
    cell = json.dumps(CHAT).replace('"', '""')
    path.write_text(f'messages\n"{cell}"\n', encoding="utf-8")
    assert _contents(load_rows(path).rows[0])[1] == ("assistant", "Hello")


def test_jsonl_under_the_name_of_json_and_a_list_inside_an_object(tmp_path):
    path = tmp_path / "rows.json"
    _write(path, [{"text": "a"}, {"text": "b"}])
    assert len(load_rows(path).rows) == 2
    path.write_text('{"version": "1", "data": [{"text": "a"}]}', encoding="utf-8")
    assert len(load_rows(path).rows) == 1


def test_missing_file_names_the_nearest_one(tmp_path, monkeypatch):
    _write(tmp_path / "chats.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="does not exist") as caught:
        load_rows(tmp_path / "chat.jsonl")
    assert "did you mean `chats.jsonl`?" in str(caught.value)
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(DataError, match="does not exist"):
        load_rows(f"{tmp_path.name}/chats")
    with pytest.raises(DataError, match="folder of the data file does not exist"):
        load_rows(tmp_path / "nowhere" / "chat.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("empty.jsonl", b"", "The file is empty"),
        ("blank.jsonl", b"\n\n", "The file is empty"),
        ("empty.json", b"", "The file is empty"),
        ("broken.json", b'[{"text": "a"},\n{"text"]', r"broken.json:2.*Broken JSON"),
        ("scalar.json", b"3", "a number"),
        ("odd.xml", b"<x/>", "no known kind of data file"),
        ("odd.parquet", b"PAR0", "no readable Parquet"),
        ("keys.jsonl", b'{"foo": 1, "bar": 2}', "`foo`, `bar`"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-12], "cannot be read"),
        ("more.csv", b"question,answer\na,b,c\n", "more cells"),
    ],
)
def test_unreadable_files(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=match):
        load_rows(path)


def test_an_unreachable_hub_is_a_network_error_at_once(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(NetworkError, match="cannot be reached") as caught:
        load_rows("someone/some-chats")
    assert caught.value.exit_code == 3


# ------------------------------------------------------------------------------------------------ splitting


# ------------------------------------------------------------------------------------------------ folders


def test_folders_patterns_and_archives_are_the_files_in_them(tmp_path):
    folder = tmp_path / "chats"
    (folder / "more").mkdir(parents=True)
    _write(folder / "a.jsonl", [{"text": "a"}])
    _write(folder / "more" / "b.jsonl", [{"text": "b"}])
    (folder / "README.md").write_text("# Chats")
    assert [row.text for row in load_rows(folder).rows] == ["a", "b"]
    assert [row.text for row in load_rows(str(folder / "*.jsonl")).rows] == ["a"]
    assert [row.text for row in load_rows(str(folder / "**" / "*.jsonl")).rows] == ["a", "b"]
    with zipfile.ZipFile(tmp_path / "chats.zip", "w") as archive:
        archive.write(folder / "a.jsonl", "in/a.jsonl")
        archive.writestr("__MACOSX/._a.jsonl", b"\0")
    (row,) = load_rows(tmp_path / "chats.zip").rows
    assert str(row.origin).endswith("chats.zip/in/a.jsonl:1")


def test_a_folder_of_splits_gives_the_training_rows_only_and_says_so(tmp_path):
    for name in ("train-0", "train-1", "test-0"):
        _write(tmp_path / f"{name}.jsonl", [{"text": name}])
    loaded = load_rows(tmp_path)
    assert [row.text for row in loaded.rows] == ["train-0", "train-1"]
    assert "test-0.jsonl" in loaded.problems[0].message
    assert [row.text for row in load_rows(f"{tmp_path}:test").rows] == ["test-0"]
    assert [row.text for row in load_rows(DataFile(path=str(tmp_path), split="test")).rows] == ["test-0"]
    with pytest.raises(DataError, match="No split `tset`"):
        load_rows(f"{tmp_path}:tset")


def test_folders_patterns_and_archives_without_data_say_so(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    for source in (tmp_path, f"{tmp_path}/*.jsonl", f"{tmp_path}/*.md"):
        with pytest.raises(DataError, match="data file"):
            load_rows(source)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("notes.md", "x")
    with pytest.raises(DataError, match="no data file"):
        load_rows(tmp_path / "x.zip")
    (tmp_path / "y.zip").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DataError, match="cannot be read"):
        load_rows(tmp_path / "y.zip")


def test_every_compression(tmp_path):
    import pyarrow

    content = b'{"text": "a"}\n{"text": "b"}\n'
    for suffix, packed in {
        ".gz": gzip.compress(content),
        ".bz2": bz2.compress(content),
        ".xz": lzma.compress(content),
        ".zst": pyarrow.Codec("zstd").compress(content).to_pybytes(),
    }.items():
        path = tmp_path / f"rows.jsonl{suffix}"
        path.write_bytes(packed)
        assert [row.text for row in load_rows(path).rows] == ["a", "b"], suffix
        path.write_bytes(packed[: len(packed) // 2])
        with pytest.raises(DataError):
            load_rows(path)


def test_a_decompression_bomb_is_refused_while_it_unpacks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 1 << 20)
    monkeypatch.setattr(files, "MAX_RATIO", 10)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * (8 << 20) + b'"}\n'))
    with pytest.raises(DataError, match="more than 10 times its size"):
        load_rows(path)


# ------------------------------------------------------------------------------------------------ encodings

SENTENCES = {
    "cp1256": "سلام دنيا، اين يك گفتگوي آزمايشي است",
    "cp1254": "Türkiye'nin başkenti neresidir? Ankara, ığdır şehri çok güzel",
    "cp1250": "Koji je glavni grad? Beograd, želim čašu vode, đak i ćevapi",
    "cp1258": "Thu\u0309 đô cu\u0309a Viê\u0323t Nam la\u0300 gi\u0300? Ha\u0300 Nô\u0323i",
    "cp1251": "Привет, как дела? Столица Сербии Белград",
    "cp1253": "Καλημέρα, πώς είσαι σήμερα;",
    "shift_jis": "こんにちは、元気ですか。東京は日本の首都です",
    "gb18030": "你好,世界。北京是中国的首都",
    "cp1252": "C’est déjà l’été à Orléans, où êtes-vous",
    "utf-16": "नमस्ते दुनिया, सलाम 😀",
}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
@pytest.mark.parametrize("encoding", SENTENCES)
def test_an_encoding_is_guessed_right_and_shown_or_nothing_is_read(tmp_path, encoding, suffix):
    sentence = SENTENCES[encoding]
    path = tmp_path / f"data{suffix}"
    text = f'text\n"{sentence}"\n' if suffix == ".csv" else json.dumps({"text": sentence}, ensure_ascii=False)
    path.write_bytes(text.encode(encoding))
    loaded = load_rows(path)
    assert loaded.rows[0].text == sentence
    (problem,) = loaded.problems
    assert problem.kind == "encoding" and problem.severity == ("note" if "16" in encoding else "warning")
    assert next(c for c in sentence if c > "\x7f") in problem.message
    named = DataFile(path=str(path), encoding=encoding)
    assert load_rows(named).rows == loaded.rows
    assert load_rows(named).problems == ([] if "16" not in encoding else loaded.problems)


def test_what_two_encodings_read_sensibly_is_refused_with_both_readings(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "\xea"}')  # e with circumflex, or with ogonek
    with pytest.raises(DataError, match="not certain") as caught:
        load_rows(path)
    assert "“" in str(caught.value) and "--encoding" in caught.value.fix
    assert load_rows(DataFile(path=str(path), encoding="cp1252")).rows[0].text == "ê"
    with pytest.raises(ConfigError, match="no text encoding"):
        load_rows(DataFile(path=str(path), encoding="cp99999"))


def test_a_damaged_line_among_utf8_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_bytes('{"text": "é"}\n{"text": "ç"}\n'.encode() + b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"mixed.jsonl:3.*0xe9 at offset 43"):
        load_rows(path)


def test_files_under_a_wrong_name_say_what_they_are(tmp_path):
    for name, content, kind in [
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "gzip"),
        ("b.csv", b"PK\x03\x04...", "Excel"),
        ("c.jsonl", b"PAR1....", "Parquet"),
        ("d.jsonl", b"\x01\x00\x02\x00\x00", "no text"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=kind):
            load_rows(tmp_path / name)


# ------------------------------------------------------------------------------------------------ tables


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


def test_data_frames_and_arrow_tables_are_rows():
    import pandas
    import pyarrow

    frame = pandas.DataFrame({"question": ["a", "b"], "answer": ["x", "y"], "note": [None, "z"]})
    for source in (frame, pyarrow.Table.from_pandas(frame.set_index("note"))):
        assert [_contents(row)[1][1] for row in load_rows(source).rows] == ["x", "y"]
    with pytest.raises(DataError, match="No rows"):
        load_rows(frame[:0])


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


# ------------------------------------------------------------------------------------------------ JSON


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


def test_an_archive_of_splits_gives_the_training_rows_only_as_a_folder_does(tmp_path):
    names = ("train", "test", "heldout", "hold-out", "extra")
    with zipfile.ZipFile(tmp_path / "mix.zip", "w") as archive:
        for name in names:
            text = json.dumps({"text": name}) + "\n"
            archive.writestr(f"mix/{name}.jsonl", text)
            (tmp_path / "mix").mkdir(exist_ok=True)
            (tmp_path / "mix" / f"{name}.jsonl").write_text(text)
        archive.writestr("mix/README.txt", "about the data")
    (tmp_path / "mix" / "README.txt").write_text("about the data")
    for source in ("mix.zip", "mix"):
        loaded = load_rows(tmp_path / source)
        assert [row.text for row in loaded.rows] == ["extra", "train"]
        assert any("heldout.jsonl" in problem.message for problem in loaded.problems)


def _splits_as_folders(tmp_path):
    folder = tmp_path / "data"
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in ("train", "test", "validation"):
            (folder / name).mkdir(parents=True)
            _write(folder / name / "a.jsonl", [{"text": name}])
            archive.write(folder / name / "a.jsonl", f"data/{name}/a.jsonl")
    return folder


@pytest.mark.parametrize("source", ["data", "data.zip", "data/*/a.jsonl", "data/**/*.jsonl"])
def test_splits_that_are_folders_give_the_training_rows_only(tmp_path, source):
    _splits_as_folders(tmp_path)
    loaded = load_rows(str(tmp_path / source))
    assert [row.text for row in loaded.rows] == ["train"]
    (note,) = [problem for problem in loaded.problems if problem.kind == "split"]
    assert "test/a.jsonl" in note.message and "validation/a.jsonl" in note.message
    asked = DataFile(path=str(tmp_path / source), split="test")
    assert [row.text for row in load_rows(asked).rows] == ["test"]


def test_what_a_pattern_spells_out_is_read(tmp_path):
    folder = _splits_as_folders(tmp_path)
    assert [row.text for row in load_rows(str(folder / "test" / "*.jsonl")).rows] == ["test"]
    assert [row.text for row in load_rows(folder / "test").rows] == ["test"]


def test_a_held_out_file_beside_others_of_an_archive_is_left_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("chats", "test"):
            archive.writestr(f"{name}.jsonl", json.dumps({"text": name}))
        archive.writestr("README.txt", "about the data")
    loaded = load_rows(tmp_path / "x.zip")
    assert [row.text for row in loaded.rows] == ["chats"]
    assert {problem.kind for problem in loaded.problems} == {"split", "left_out_files"}
    assert any("README.txt" in problem.message for problem in loaded.problems)


def test_what_an_archive_holds_besides_is_named(tmp_path):
    inner = tmp_path / "in.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("b.jsonl", json.dumps({"text": "b"}))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jsonl", json.dumps({"text": "a"}))
        archive.writestr("../../up.jsonl", json.dumps({"text": "up"}))
        archive.write(inner, "in.zip")
    loaded = load_rows(tmp_path / "x.zip")
    assert [row.text for row in loaded.rows] == ["up", "a"]
    (note,) = [problem for problem in loaded.problems if problem.kind == "left_out_files"]
    assert "in.zip" in note.message


@pytest.mark.parametrize("encoding", ["cp850", "mac_roman"])
def test_the_right_reading_of_an_old_table_is_among_those_offered(tmp_path, encoding):
    path = tmp_path / "old.csv"
    path.write_bytes("question;answer\nWie heißt du?;Müller, schönen Gruß\n".encode(encoding))
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert f"as {encoding}" in str(caught.value) and "heißt" in str(caught.value)
    assert "--encoding NAME" in caught.value.fix


def test_old_excel_workbooks_are_read():
    pytest.importorskip("python_calamine")
    loaded = load_rows(Path(__file__).with_name("pairs.xls"))
    assert [row.messages[0]["content"] for row in loaded.rows] == ["سلام", "c"]


def test_what_holds_no_rows_is_refused():
    with pytest.raises(DataError, match="cannot be taken from a int"):
        load_rows(3)


def test_polars_frames_are_read_and_lazy_ones_refused():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"question": ["a", "c"], "answer": ["b", "d"], "weight": [0.5, 1.0]})
    assert [row.weight for row in load_rows(frame).rows] == [0.5, 1.0]
    with pytest.raises(DataError, match="LazyFrame") as caught:
        load_rows(frame.lazy())
    assert "collect()" in str(caught.value)


def test_the_sample_of_an_encoding_begins_with_a_word():
    assert sample_of("question\tanswer\nanswer Xin chào") == "“answer Xin chào”"
    assert sample_of("a very long beginning of ü") == "“beginning of ü”"
    assert sample_of("x" * 30 + "ü") == f"“{'x' * 13}ü”"
