"""Message logs in the forms that they are met in, and the exports' other files."""

from __future__ import annotations

import json
import os
import zipfile

import pytest

from phlora.data.checks import check
from phlora.data.convert import convert
from phlora.errors import DataError

DATES = {
    "Persian": ("۱۴۰۲/۱۲/۲۲،\u200f ۲۱:0{}", "۱۴۰۲/۱۲/۲۳،\u200f ۲۱:0{}"),
    "Arabic": ("\u200f12\u200f/12\u200f/2023، 9:0{} م", "\u200f13\u200f/12\u200f/2023، 9:0{} م"),
    "Chinese": ("2024/3/12 下午9:0{}", "2024/3/13 下午9:0{}"),
    "Korean": ("2024. 3. 12. 오후 9:0{}", "2024. 3. 13. 오후 9:0{}"),
    "Thai": ("12/3/2567 21:0{}", "13/3/2567 21:0{}"),
}


def written(path):
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def turns(*texts):
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * len(texts), texts, strict=False)
    ]


@pytest.mark.parametrize("language", DATES)
def test_whatsapp_dates_of_many_languages(tmp_path, language):
    first, second = DATES[language]
    lines = [
        f"{first.format(1)} - بن: hi",
        f"{first.format(2)} - Ana: hello",
        "and more",
        f"{second.format(1)} - بن: a day later",
        f"{second.format(2)} - Ana: yes",
    ]
    source, out = tmp_path / "chat.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    convert([str(source)], out, assistant="Ana")
    assert written(out) == [turns("hi", "hello\nand more"), turns("a day later", "yes")]


def test_halves_of_the_day_count_in_every_script(tmp_path):
    lines = ["2024/3/12 上午9:01 - Ben: hi", "2024/3/12 上午9:02 - Ana: hello"]
    lines += ["2024/3/12 下午9:01 - Ben: later", "2024/3/12 下午9:02 - Ana: yes"]
    source, out = tmp_path / "chat.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    convert([str(source)], out, assistant="Ana")
    assert len(written(out)) == 2


def test_a_turn_of_the_iranian_year_is_a_day(tmp_path):
    lines = [
        "۱۴۰۲/۱۲/۲۹، ۲۳:۵۸ - Ben: hi",
        "۱۴۰۲/۱۲/۲۹، ۲۳:۵۹ - Ana: hello",
        "۱۴۰۳/۱/۱، ۰:۰۱ - Ben: happy new year",
    ]
    lines += [
        "۱۴۰۳/۱/۱، ۰:۰۲ - Ana: to you too",
        "۱۴۰۳/۲/۳۱، ۰:۰۱ - Ben: still there?",
        "۱۴۰۳/۲/۳۱، ۰:۰۲ - Ana: yes",
    ]
    source, out = tmp_path / "chat.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    convert([str(source)], out, assistant="Ana")
    assert [len(chat) for chat in written(out)] == [4, 2]


def test_what_the_assistant_forwarded_is_nobodys_answer(tmp_path):
    def message(number, speaker, text, **beside):
        return {
            "id": number,
            "type": "message",
            "date": "2024-01-01T09:00:00",
            "date_unixtime": str(number),
            "from": speaker,
            "from_id": speaker,
            "text": text,
            **beside,
        }

    messages = [
        message(1, "Ben", "Any news?", forwarded_from=None),
        message(2, "Ana", "Look"),
        message(3, "Ana", "Breaking: …", forwarded_from="News"),
        message(4, "Ben", "Read this", forwarded_from="Zed"),
        message(5, "Ana", "I did"),
    ]
    source, out = tmp_path / "result.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"name": "Ben", "type": "personal_chat", "id": 1, "messages": messages}))
    convert([str(source)], out, assistant="Ana")
    assert written(out) == [turns("Any news?", "Look", "Read this", "I did")]


def slack_folder(tmp_path):
    folder = tmp_path / "slack"
    (folder / "general").mkdir(parents=True)
    people = [
        {"id": f"U{number}", "name": name.lower(), "profile": {"real_name": name}}
        for number, name in enumerate(("Ana", "Ben"))
    ]
    (folder / "users.json").write_text(json.dumps(people))
    (folder / "channels.json").write_text(
        json.dumps([{"id": "C1", "name": "general", "created": 1, "members": ["U0", "U1"]}])
    )
    for day, said in ((1, ("U1", "U0")), (2, ("U1",)), (3, ("U1", "U0"))):
        rows = [
            {"type": "message", "user": user, "ts": f"{day * 86400 + at}.0", "text": f"{user} on day {day}"}
            for at, user in enumerate(said)
        ]
        (folder / "general" / f"2024-01-0{day}.json").write_text(json.dumps(rows))
    return folder


def test_a_slack_folder_knows_names(tmp_path):
    out = tmp_path / "out.jsonl"
    convert([str(slack_folder(tmp_path))], out, assistant="Ana")
    assert written(out) == [turns("U1 on day 1", "U0 on day 1"), turns("U1 on day 3", "U0 on day 3")]


def test_a_name_that_is_nowhere_in_a_slack_folder(tmp_path):
    with pytest.raises(DataError, match="Nobody here is called `Anna`") as caught:
        convert([str(slack_folder(tmp_path))], tmp_path / "out.jsonl", assistant="Anna")
    assert "Ana" in str(caught.value)


@pytest.mark.parametrize("option", [{"assistant": "Ana"}, {"gap_hours": 2.0}])
def test_options_of_logs_are_refused_elsewhere(tmp_path, option):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"messages": turns("a", "b")}))
    name = "--" + next(iter(option)).replace("_", "-")
    with pytest.raises(DataError, match=f"`{name}` means nothing in it"):
        convert([str(source)], tmp_path / "out.jsonl", **option)


def test_the_archive_that_openai_sends(tmp_path):
    def node(role, text, parent, child):
        message = {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}}
        return {"message": message, "parent": parent, "children": [child] if child else []}

    chat = {
        "title": "x",
        "mapping": {"a": node("user", "hi", None, "b"), "b": node("assistant", "hello", "a", None)},
    }
    beside = {
        "user": {"id": "u", "email": "e"},
        "shared_conversations": [{"id": "s", "conversation_id": "c"}],
    }
    beside |= {"message_feedback": [{"id": "m", "rating": "thumbs_up"}], "model_comparisons": []}
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("conversations.json", json.dumps([{**chat, "current_node": "b"}]))
        archive.writestr("chat.html", "<html>")
        for name, value in beside.items():
            archive.writestr(f"{name}.json", json.dumps(value))
    out = tmp_path / "out.jsonl"
    convert([str(tmp_path / "export.zip")], out)
    assert written(out) == [turns("hi", "hello")]


def test_columns_that_groups_go_by_are_carried(tmp_path):
    source, out = tmp_path / "rows.csv", tmp_path / "out.jsonl"
    source.write_text("chat_id,question,answer,mood\n1,a,b,good\n1,c,d,bad\n2,e,f,\n")
    convert([str(source)], out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["chat_id"] for row in rows] == ["1", "1", "2"]
    assert "mood" not in rows[0]


def test_files_of_different_schemata_and_files_about_data_are_told(tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}))
    (tmp_path / "notes.txt").write_text("a line\nanother line\n")
    (tmp_path / "README.txt").write_text("About these data\n")
    report = check(str(tmp_path))
    (warning,) = [problem for problem in report.problems if problem.kind == "mixed_files"]
    assert "`text`" in warning.message and "notes.txt" in warning.message
    (note,) = [problem for problem in report.problems if problem.kind == "left_out_files"]
    assert "README.txt" in note.message


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    for source in (str(tmp_path / "rows.jsonl"), "-", "/dev/null"):
        with pytest.raises(DataError, match=r"no regular file|Standard input is not read"):
            check(source)
