"""What a chat is opened with: a run, an adapter or a model, and its system prompt and tools."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chats import FakeModel, said

from phlora.data.prompts import encode_chat, read_tools
from phlora.display import Display
from phlora.errors import ConfigError, DataError, ModelError, RunError
from phlora.models.fingerprint import fingerprint
from phlora.serve import chat as module
from phlora.serve.chat import ChatSession, open_chat
from phlora.serve.terminal import converse
from phlora.testing import tiny_phi3


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    model, tokenizer = tiny_phi3()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run_folder(adapted: ChatSession, base_folder: Path, tmp_path: Path) -> Path:
    """A finished run: run.json, and an adapter whose tokenizer has a chat template of its own."""
    run = tmp_path / "runs" / "x"
    best = run / "adapter" / "best"
    adapted.model.peft_config["default"].base_model_name_or_path = str(base_folder)
    adapted.model.save_pretrained(best)
    with adapted.model.disable_adapter():
        facts = {"base_fingerprint": fingerprint(adapted.model)}
    (best / "phlora.json").write_text(json.dumps(facts), encoding="utf-8")
    tokenizer = adapted.tokenizer.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>", "<|assistant|>Well:")
    tokenizer.save_pretrained(best)
    config = {"model": {"name": str(base_folder), "dtype": "float32", "device": "cuda:7"}, "data": "d"}
    facts = {"status": "finished", "config": config}
    (run / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    return run


def opened(source: Path) -> ChatSession:
    return open_chat(str(source), max_new_tokens=8, display=Display(io.StringIO()))


def test_a_run_opens_with_its_base_its_adapter_and_its_template(
    run_folder: Path, adapted: ChatSession
) -> None:
    session = opened(run_folder)
    assert session.has_adapter and session.speakers == ("tuned",)
    assert "Well:" in session.tokenizer.tokenizer.chat_template
    assert said(session, "سلام") == said(adapted, "سلام") != ""


HOME = "You run a smart home.\nAnswer in JSON."


def write_prompts(file: Path, prompts: dict[str, Any]) -> None:
    facts = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**facts, "system_prompts": prompts}), encoding="utf-8")


def shared(text: str | None, num_same: int = 4, num_different: int = 1) -> dict[str, Any]:
    return {"text": text, "num_rows": 4, "num_same": num_same, "num_different": num_different}


@pytest.mark.parametrize("file", ["run.json", "adapter/best/phlora.json"])
@pytest.mark.parametrize("source", [".", "adapter/best"])
def test_a_run_opens_with_the_system_prompt_of_its_rows_and_shows_it(
    run_folder: Path, file: str, source: str
) -> None:
    write_prompts(run_folder / file, shared(HOME))
    err = io.StringIO()
    session = open_chat(str(run_folder / source), display=Display(err))
    assert session.system == session.trained_system == HOME
    assert "You run a smart home. Answer in JSON." in err.getvalue()


def test_an_old_run_is_asked_by_its_held_out_rows(run_folder: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": HOME},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
        }
    ] * 2
    (run_folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert opened(run_folder).system == HOME
    (run_folder / "heldout.jsonl").write_text("broken\n", "utf-8")
    assert opened(run_folder).system is None


@pytest.mark.parametrize(("wanted", "system"), [("", None), ("Be brief.", "Be brief.")])
def test_the_option_comes_before_the_rows(run_folder: Path, wanted: str, system: str | None) -> None:
    write_prompts(run_folder / "run.json", shared(HOME))
    err = io.StringIO()
    session = open_chat(str(run_folder), system=wanted, display=Display(err))
    assert session.system == system and session.trained_system == HOME and "smart home" not in err.getvalue()


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (shared(HOME, 3, 2), "2 different system prompts; the chat begins with the most frequent one (75 %)"),
        (shared(HOME, 3, 1), "a system prompt in 3 of 4; the chat begins with the most frequent one (75 %)"),
        (shared(None, 2, 3), "3 different system prompts, none in more than half of them"),
    ],
)
def test_several_system_prompts_are_said(run_folder: Path, prompts: dict[str, Any], says: str) -> None:
    write_prompts(run_folder / "run.json", prompts)
    err = io.StringIO()
    assert open_chat(str(run_folder), display=Display(err)).system == prompts["text"]
    assert says in err.getvalue()


@pytest.mark.parametrize("prompts", [None, [], {"text": 5, "num_rows": 1}, {"text": "x", "num_rows": "y"}])
def test_a_damaged_record_of_system_prompts_is_no_record(run_folder: Path, prompts: Any) -> None:
    write_prompts(run_folder / "run.json", prompts)
    assert opened(run_folder).system is None


@pytest.mark.parametrize("how", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}])
def test_impossible_sampling_is_refused_before_anything_is_loaded(how: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="was given"):
        open_chat("no/such/model", **how)


@pytest.mark.parametrize("has_run", [True, False])
def test_an_adapter_folder_opens_too(run_folder: Path, has_run: bool) -> None:
    if not has_run:
        (run_folder / "run.json").unlink()
    session = opened(run_folder / "adapter" / "best")
    assert session.has_adapter and said(session, "hi") == said(opened(run_folder / "adapter" / "best"), "hi")


def test_a_model_opens_without_a_tuned_side(base_folder: Path) -> None:
    session = open_chat(str(base_folder), system="Odgovaraj kratko", display=Display(io.StringIO()))
    assert not session.has_adapter and session.system == "Odgovaraj kratko"


def test_an_adapter_without_a_tokenizer_takes_the_base_s(run_folder: Path) -> None:
    for file in (run_folder / "adapter" / "best").glob("*token*"):
        file.unlink()
    assert "Well:" not in opened(run_folder).tokenizer.tokenizer.chat_template


def test_the_last_adapter_serves_where_no_best_one_was_found(run_folder: Path) -> None:
    (run_folder / "adapter" / "best").rename(run_folder / "adapter" / "last")
    assert opened(run_folder).has_adapter


def test_opening_leaves_nothing_behind(run_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    said(opened(run_folder), "hi")
    assert before == {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}


@pytest.mark.parametrize(
    ("file", "text", "problem", "says"),
    [
        ("run.json", "{", RunError, "no valid JSON"),
        ("run.json", "[]", RunError, "no JSON object"),
        ("run.json", "{}", RunError, "does not say what its base model is"),
        ("run.json", '{"config": {"data": "d"}}', ConfigError, "`model` is missing"),
        ("run.json", '{"config": {"data": "d", "model": "./gone"}}', ModelError, "does not exist"),
        ("adapter/best/adapter_config.json", "{", ModelError, "no valid JSON"),
        ("adapter/best/phlora.json", '{"base_fingerprint": "bfloat16:x"}', ModelError, "other weights"),
        ("adapter/best/tokenizer.json", "{", ModelError, "tokenizer cannot be read"),
    ],
)
def test_a_broken_run_is_named(
    run_folder: Path, file: str, text: str, problem: type[Exception], says: str
) -> None:
    (run_folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(problem, match=says):
        opened(run_folder)


def test_an_adapter_of_an_unnamed_base_is_refused(run_folder: Path) -> None:
    (run_folder / "run.json").unlink()
    file = run_folder / "adapter" / "best" / "adapter_config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**facts, "base_model_name_or_path": None}), encoding="utf-8")
    with pytest.raises(ModelError, match="does not say what its base model is"):
        opened(file.parent)


def test_a_run_that_never_finished_says_so(run_folder: Path) -> None:
    (run_folder / "adapter").rename(run_folder / "elsewhere")
    with pytest.raises(RunError, match="no adapter yet"):
        opened(run_folder)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_tools_are_offered_as_training_rows_have_them_and_calls_are_named(
    fake: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[int]] = []

    def stream(model: FakeModel, ids: list[int], tokenizer: Any, **options: Any) -> Iterator[str]:
        asked.append(ids)
        yield from ("Let me see.\n", CALL)

    monkeypatch.setattr(module, "stream", stream)
    fake.tools, fake.system = TOOLS, "Be brief."
    fake.model.config.max_position_embeddings = 2048
    stdout = io.StringIO()
    converse(fake, display=Display(), stdin=io.StringIO("Weather?\nAnd <tool_call>?\n"), stdout=stdout)
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}
    called = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    answer = {"role": "assistant", "content": "Let me see.", "tool_calls": [called]}
    second = {"role": "user", "content": "And <tool_call>?"}
    tokenizer = fake.tokenizer.tokenizer
    assert asked == [
        encode_chat([system, first], tokenizer, tools=TOOLS),
        encode_chat([system, first, answer, second], tokenizer, tools=TOOLS),
    ]
    assert "weather" in tokenizer.decode(asked[0])
    assert 'calls weather with {"city": "Oslo"}' in capsys.readouterr().err


def test_tools_come_from_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(TOOLS))
    assert read_tools(path) == TOOLS
    for text in ("", "[]", "[1]", '"x"', "{", "\udcff"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(DataError, match="tools.json"):
            read_tools(path)
    with pytest.raises(DataError):
        read_tools(tmp_path / "missing.json")
