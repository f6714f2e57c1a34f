"""Whatever is read becomes plain JSONL; logs and trees become chats once it is said whose."""

from __future__ import annotations

import json

import pytest

from phlora.config import DataFile
from phlora.data.convert import convert
from phlora.data.dataset import load_rows
from phlora.errors import DataError, InputError

CHAT = [{"role": "user", "content": "سلام"}, {"role": "assistant", "content": "नमस्ते"}]


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_become_plain_jsonl_that_reads_as_the_same_rows(tmp_path):
    source = tmp_path / "table.csv"
    source.write_text('Frage,Antwort\nسلام,"नमस्ते\n"\n', encoding="utf-8")
    columns = {"question": "Frage", "answer": "Antwort"}
    done = convert([DataFile(path=str(source), columns=columns)], tmp_path / "out.jsonl")
    assert done.num_rows == 1 and done.problems == ()
    assert (
        load_rows(tmp_path / "out.jsonl").rows[0].messages
        == load_rows(DataFile(path=str(source), columns=columns)).rows[0].messages
    )
    assert "سلام" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")


def test_rows_that_cannot_be_used_are_left_out_and_named(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"messages": CHAT}) + '\n{"messages": 3}\nbroken\n', encoding="utf-8")
    done = convert([str(source)], tmp_path / "out.jsonl")
    assert written(tmp_path / "out.jsonl") == [{"messages": CHAT}]
    assert done.num_left_out == 2
    assert "in.jsonl:2" in done.render() and done.to_json()["problems"][1]["origins"] == [f"{source}:3"]


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"messages": CHAT}), encoding="utf-8")
    out.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        convert([str(source)], out)
    with pytest.raises(InputError, match="one of the inputs"):
        convert([str(source)], source, overwrite=True)
    for name in (tmp_path, tmp_path / "out.csv", tmp_path / "nowhere" / "out.jsonl"):
        with pytest.raises(InputError):
            convert([str(source)], name)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": 3}\n')
    with pytest.raises(DataError, match="No row can be used"):
        convert([str(bad)], out, overwrite=True)
    assert out.read_text() == "mine" and not list(tmp_path.glob("*part*"))
    convert([str(source)], out, overwrite=True)
    assert written(out) == [{"messages": CHAT}]


WHATSAPP = {
    "android": """1/9/24, 09:00 - Messages and calls are end-to-end encrypted.
1/9/24, 09:01 - Ana: When do you open?
1/9/24, 09:02 - Shop: At ten
and on Sundays at noon
1/9/24, 09:03 - Shop: <Media omitted>
1/9/24, 09:04 - Ana: Thanks
1/9/24, 09:05 - Shop: :)
2/9/24, 21:00 - Ana: Hello?
""",
    "ios": """[01.09.2024, 09:00:11] Shop: \u200eMessages and calls are end-to-end encrypted.
[01.09.2024, 09:01:00] Ana: When do you open?
[01.09.2024, 09:02:00] Shop: At ten
and on Sundays at noon
\u200e[01.09.2024, 09:03:00] Shop: \u200e<attached: 1.jpg>
[01.09.2024, 09:04:00] Ana: Thanks
[01.09.2024, 09:05:00] Shop: :)
""",
}


@pytest.mark.parametrize("kind", WHATSAPP)
def test_a_whatsapp_chat(tmp_path, kind):
    source, out = tmp_path / "chat.txt", tmp_path / "out.jsonl"
    source.write_text(WHATSAPP[kind], encoding="utf-8")
    with pytest.raises(DataError, match="WhatsApp") as caught:
        load_rows(source)
    assert "phlora data convert" in caught.value.fix
    with pytest.raises(DataError, match="one of those who wrote: Ana, Shop"):
        convert([str(source)], out, assistant=None)
    convert([str(source)], out, assistant="Shop")
    (row,) = written(out)
    assert [message["content"] for message in row["messages"]] == [
        "When do you open?",
        "At ten\nand on Sundays at noon",
        "Thanks",
        ":)",
    ]
    convert([str(source)], out, assistant="Shop", gap_hours=0.025, overwrite=True)
    assert len(written(out)) == 2


def test_telegram_and_slack(tmp_path):
    said = [("Ana", "Hi", 0), ("Shop", ["Hello ", {"type": "bold", "text": "you"}], 5), ("Ana", "Bye", 10)]
    messages = [
        {
            "id": n,
            "type": "message",
            "from": who,
            "from_id": who,
            "text": text,
            "date": "x",
            "date_unixtime": str(when),
        }
        for n, (who, text, when) in enumerate(said)
    ]
    single = {"name": "Ana", "type": "personal_chat", "id": 1, "messages": messages}
    slack = [
        {"type": "message", "user": who, "text": "Hi", "ts": f"17000{n}.1"} for n, who in enumerate("US")
    ]
    for name, content, who in [
        ("single.json", single, "Shop"),
        ("all.json", {"about": "x", "chats": {"about": "y", "list": [single]}}, "Shop"),
        ("slack.json", slack, "S"),
    ]:
        source = tmp_path / name
        source.write_text(json.dumps(content, indent=1), encoding="utf-8")
        with pytest.raises(DataError, match="--assistant NAME"):
            load_rows(source)
        convert([str(source)], tmp_path / "out.jsonl", assistant=who, overwrite=True)
        (row,) = written(tmp_path / "out.jsonl")
        assert row["messages"][1]["content"] in ("Hello you", "Hi")


def test_trees_of_openassistant(tmp_path):
    def node(name, role, text, replies=(), rank=None):
        return {"message_id": name, "role": role, "text": text, "rank": rank, "replies": list(replies)}

    better = node(
        "c", "assistant", "good", [node("d", "prompter", "more?", [node("e", "assistant", "yes")])], 0
    )
    tree = {
        "message_tree_id": "a",
        "prompt": node("a", "prompter", "Hi", [node("b", "assistant", "bad", rank=1), better]),
    }
    rows = []

    def flatten(item, parent):
        rows.append({**{k: v for k, v in item.items() if k != "replies"}, "parent_id": parent})
        for reply in item["replies"]:
            flatten(reply, item["message_id"])

    flatten(tree["prompt"], None)
    for name, records in (("trees.jsonl", [tree]), ("rows.jsonl", rows)):
        source = tmp_path / name
        source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        with pytest.raises(DataError, match="OpenAssistant"):
            load_rows(source)
        convert([str(source)], tmp_path / "out.jsonl", overwrite=True)
        texts = [
            [message["content"] for message in row["messages"]] for row in written(tmp_path / "out.jsonl")
        ]
        assert texts == [["Hi", "good", "more?", "yes"]]


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": "a", "answer": "b", "weight": 0.5}, {"question": "c", "answer": "d", "train": False}],
        [{"messages": CHAT, "sample_weight": 0}, {"messages": CHAT, "topic": "travel"}],
        [{"prompt": "a", "completion": "b", "weight": 2}, {"prompt": "c", "completion": "d", "lang": "fa"}],
        [{"text": "a", "weight": 0.25}, {"text": "b", "category": "x", "train": False}],
    ],
)
def test_what_a_row_says_of_its_training_and_of_the_split_is_kept(tmp_path, rows):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = DataFile(path=str(source), weight=3.0)
    convert([file], out)
    before, after = (
        [(row.messages, row.prompt, row.text, row.weight, row.category) for row in load_rows(kind).rows]
        for kind in (file, out)
    )
    assert before == after


@pytest.mark.parametrize("name", ["chats.jsonl.gz", "chats.csv", "chats.json.zst"])
def test_the_name_that_is_advised_is_a_plain_one(tmp_path, name):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(InputError) as caught:
        convert([str(source)], tmp_path / name)
    assert caught.value.fix == "name it chats.jsonl"


def test_what_is_odd_about_a_row_is_said_while_it_is_written(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"question": "a", "answer": " "}\n{"question": "", "answer": "b"}\n')
    done = convert([str(source)], tmp_path / "out.jsonl")
    assert done.num_rows == 2 and done.num_left_out == 0
    assert "The content of an assistant turn is empty" in done.render()
    assert "The content of a user turn is empty" in done.render()


def said(*texts, begin=0):
    return [
        {"type": "message", "from": who, "text": text, "date_unixtime": str(begin + n), "from_id": who}
        for n, (who, text) in enumerate(texts)
    ]


def test_several_chats_of_telegram_stay_apart_and_pictures_glue_no_answers(tmp_path):
    source, out = tmp_path / "all.json", tmp_path / "out.jsonl"
    ben = said(("Ben", "Hi"), ("Ana", "Hello"), ("Ben", ""), ("Ana", "nice picture"))
    zed = said(("Zed", "Hey"), ("Ana", "Yo"), begin=-40_000_000)
    source.write_text(json.dumps({"chats": {"list": [{"messages": ben}, {"messages": zed}]}}))
    convert([str(source)], out, assistant="Ana")
    assert [[m["content"] for m in row["messages"]] for row in written(out)] == [
        ["Hi", "Hello"],
        ["Hey", "Yo"],
    ]


def test_threads_of_slack_stay_apart_and_its_markup_is_read(tmp_path):
    source, out = tmp_path / "day.json", tmp_path / "out.jsonl"
    texts = [("U", "thread?", "1", "1"), ("U", "other &amp; <http://x|x>", "2", ""), ("S", "t", "3", "1")]
    texts += [("S", "o", "4", "")]
    rows = [
        {"type": "message", "user": user, "text": text, "ts": ts} | ({"thread_ts": thread} if thread else {})
        for user, text, ts, thread in texts
    ]
    source.write_text(json.dumps(rows))
    convert([str(source)], out, assistant="S")
    chats = [[m["content"] for m in row["messages"]] for row in written(out)]
    assert chats == [["thread?", "t"], ["other & x", "o"]]


def test_whatsapps_own_words_are_nobodys(tmp_path):
    source, out = tmp_path / "chat.txt", tmp_path / "out.jsonl"
    lines = ["Ben: Hi", "Ana: hello <This message was edited>", "Ana: null", "Ana: Bild weggelassen"]
    lines += [
        'Ben changed the subject from "a" to "b: c"',
        "Ben: You there?",
        "Ana: \u200eimage omitted",
        "Ana: yes",
    ]
    source.write_text("".join(f"31/12/24, 21:0{n} - {line}\n" for n, line in enumerate(lines)))
    convert([str(source)], out, assistant="Ana")
    (row,) = written(out)
    assert [m["content"] for m in row["messages"]] == ["Hi", "hello", "You there?", "yes"]


def test_whose_messages_are_learned_is_never_ignored(tmp_path):
    for name, text in (("chat.txt", "no log\n"), ("chats.jsonl", json.dumps({"messages": CHAT}))):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="not recognised as a log"):
            convert([str(tmp_path / name)], tmp_path / "out.jsonl", assistant="Ana")


def test_a_prompt_is_not_carried_and_a_split_is(tmp_path):
    rows = [{"prompt": "p", "response": "a", "prompt_id": "7", "split": "test"}]
    rows += [{"prompt": "p2", "response": "b", "prompt_id": "8", "split": "train"}]
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    convert([str(source)], out)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [sorted(row) for row in written] == [["messages", "prompt_id", "split"]] * 2
    assert any(problem.kind == "held_out_split" for problem in load_rows(out).problems)
