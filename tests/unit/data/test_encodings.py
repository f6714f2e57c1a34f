"""An encoding is guessed right and shown, or asked for with its readings."""

from __future__ import annotations

import json

import pytest

from phlora.config import DataFile
from phlora.data.dataset import load_rows
from phlora.data.readers.encodings import sample_of
from phlora.errors import ConfigError, DataError

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


@pytest.mark.parametrize("encoding", ["cp850", "mac_roman"])
def test_the_right_reading_of_an_old_table_is_among_those_offered(tmp_path, encoding):
    path = tmp_path / "old.csv"
    path.write_bytes("question;answer\nWie heißt du?;Müller, schönen Gruß\n".encode(encoding))
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert f"as {encoding}" in str(caught.value) and "heißt" in str(caught.value)
    assert "--encoding NAME" in caught.value.fix


def test_the_sample_of_an_encoding_begins_with_a_word():
    assert sample_of("question\tanswer\nanswer Xin chào") == "“answer Xin chào”"
    assert sample_of("a very long beginning of ü") == "“beginning of ü”"
    assert sample_of("x" * 30 + "ü") == f"“{'x' * 13}ü”"
