"""The chat: who answers, what the history holds, the commands, and what opens it."""

from __future__ import annotations

import builtins
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from phlora.data.prompts import encode_chat, read_tools
from phlora.display import Display
from phlora.errors import ConfigError, DataError, InputError, ModelError, RunError
from phlora.models.fingerprint import fingerprint
from phlora.models.tokenizer import prepare_tokenizer
from phlora.serve import chat as module
from phlora.serve.chat import ChatSession, open_chat
from phlora.serve.terminal import converse
from phlora.testing import tiny_phi3


class FakeModel:
    """Says who it is, and what it was asked."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(max_position_embeddings=512, rope_parameters=None)
        self.speaker = "tuned"
        self.asked: list[str] = []

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.speaker = "base"
        try:
            yield
        finally:
            self.speaker = "tuned"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> ChatSession:
    """A chat whose model answers at once and in three pieces."""

    def stream(model: FakeModel, ids: list[int], tokenizer: Any, **options: Any) -> Iterator[str]:
        model.asked.append(tokenizer.decode(ids))
        yield from (f"{model.speaker} says", " سلام", f" {len(model.asked)}")

    monkeypatch.setattr(module, "stream", stream)
    model, tokenizer = tiny
    return ChatSession(
        model=FakeModel(), tokenizer=prepare_tokenizer(tokenizer, config=model.config), has_adapter=True
    )


@pytest.fixture
def adapted(tiny: Any) -> ChatSession:
    """A chat with a random model and a random adapter on it, loud enough to change what it says."""
    model, tokenizer = tiny
    loaded = prepare_tokenizer(tokenizer, config=model.config, generation_config=model.generation_config)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False)
    return ChatSession(
        model=get_peft_model(model, config), tokenizer=loaded, has_adapter=True, max_new_tokens=8
    )


def said(session: ChatSession, text: str) -> str:
    return "".join(piece for _, piece in session.ask(text))


def piped(session: ChatSession, text: str) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    converse(session, display=Display(err), stdin=io.StringIO(text), stdout=out)
    return out.getvalue(), err.getvalue()


# ------------------------------------------------------------------------------------------------- history


def test_each_turn_sees_all_turns_before_it(fake: ChatSession) -> None:
    fake.system = "Trả lời ngắn gọn"
    assert said(fake, "one") == "tuned says سلام 1"
    said(fake, "two")
    prompt = fake.model.asked[-1]
    parts = ["Trả lời ngắn gọn", "one", "tuned says سلام 1", "two", "<|assistant|>"]
    places = [prompt.index(part) for part in parts[:-1]]
    assert places == sorted(places) and prompt.rstrip().endswith("<|assistant|>")


def test_without_a_system_prompt_none_is_sent(fake: ChatSession) -> None:
    said(fake, "one")
    assert "<|system|>" not in fake.model.asked[0]


def test_undo_and_reset(fake: ChatSession) -> None:
    said(fake, "one")
    said(fake, "two")
    assert fake.undo() and [exchange.question for exchange in fake.exchanges] == ["one"]
    assert fake.undo() and not fake.undo()
    said(fake, "three")
    fake.reset()
    assert fake.exchanges == []


def test_a_stopped_reply_is_kept_as_far_as_it_got(fake: ChatSession) -> None:
    reply = fake.ask("one")
    next(reply)
    next(reply)
    reply.close()
    assert [turn["content"] for turn in fake.messages("tuned")] == ["one", "tuned says سلام"]


def test_a_reply_stopped_before_its_first_word_forgets_the_question(
    fake: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(*_: Any, **__: Any) -> Iterator[str]:
        raise KeyboardInterrupt
        yield ""

    monkeypatch.setattr(module, "stream", stream)
    with pytest.raises(KeyboardInterrupt):
        said(fake, "one")
    assert fake.exchanges == []


def test_each_model_sees_its_own_replies(fake: ChatSession) -> None:
    fake.let_answer("base", "tuned")
    pieces = list(fake.ask("one"))
    assert [speaker for speaker, _ in pieces] == ["base"] * 3 + ["tuned"] * 3
    assert fake.model.asked[0] == fake.model.asked[1]
    said(fake, "two")
    base, tuned = fake.model.asked[2:]
    assert "base says سلام 1" in base and "tuned says" not in base
    assert "tuned says سلام 2" in tuned and "base says" not in tuned
    assert "one" in base and "one" in tuned


def test_a_model_that_was_not_asked_does_not_know_the_question(fake: ChatSession) -> None:
    said(fake, "one")
    fake.let_answer("base", "tuned")
    assert fake.num_unseen("base") == 1 and fake.num_unseen("tuned") == 0
    said(fake, "two")
    base, tuned = fake.model.asked[1:]
    assert "one" not in base and "tuned says" not in base
    assert "one" in tuned and "tuned says سلام 1" in tuned
    fake.let_answer("base")
    said(fake, "three")
    assert "two" in fake.model.asked[3] and "base says سلام 2" in fake.model.asked[3]
    assert [turn["content"] for turn in fake.messages("tuned")][::2] == ["one", "two"]


def test_undo_forgets_the_last_question_whoever_was_asked(fake: ChatSession) -> None:
    said(fake, "one")
    fake.let_answer("base", "tuned")
    said(fake, "two")
    fake.let_answer("base")
    assert fake.undo()
    assert fake.messages("base") == []
    assert [turn["content"] for turn in fake.messages("tuned")][::2] == ["one"]


def test_a_comparison_stopped_in_the_last_reply_keeps_both_as_far_as_they_got(fake: ChatSession) -> None:
    fake.let_answer("base", "tuned")
    reply = fake.ask("one")
    for _ in range(4):
        next(reply)
    reply.close()
    assert fake.messages("base")[-1]["content"] == "base says سلام 1"
    assert fake.messages("tuned")[-1]["content"] == "tuned says"


def test_a_model_that_says_nothing_keeps_no_empty_turn(
    fake: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(model: FakeModel, *_: Any, **__: Any) -> Iterator[str]:
        if model.speaker == "tuned":
            yield "yes"

    monkeypatch.setattr(module, "stream", stream)
    out, err = piped(fake, "/compare\none\n")
    assert out == "[tuned] yes\n" and "The base model ended its reply without a word" in err
    assert fake.messages("base") == [] and len(fake.messages("tuned")) == 2


def test_a_comparison_stopped_in_the_base_model_s_reply_is_forgotten(fake: ChatSession) -> None:
    fake.let_answer("base", "tuned")
    reply = fake.ask("one")
    next(reply)
    reply.close()
    assert fake.exchanges == [] and fake.model.speaker == "tuned"


def test_a_chat_that_outgrows_the_model_is_refused_and_unchanged(fake: ChatSession) -> None:
    with pytest.raises(InputError, match="the model holds 512"):
        said(fake, "x" * 600)
    assert fake.exchanges == []


def test_a_reply_never_passes_the_model_s_context(fake: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(model: Any, ids: list[int], *_: Any, max_new_tokens: int, **__: Any) -> Iterator[str]:
        yield f"{len(ids) + max_new_tokens}"

    monkeypatch.setattr(module, "stream", stream)
    assert said(fake, "x" * 100) == "512"
    fake.max_new_tokens = 10
    assert int(said(fake, "x")) < 512


def test_a_model_without_a_chat_template_cannot_chat(tiny: Any) -> None:
    model, tokenizer = tiny
    loaded = prepare_tokenizer(tokenizer, config=model.config)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        ChatSession(model=model, tokenizer=loaded, has_adapter=False)


# ---------------------------------------------------------------------------------- the base and the tuned


def test_base_and_tuned_are_the_model_without_and_with_its_adapter(adapted: ChatSession) -> None:
    tuned = said(adapted, "سلام")
    adapted.reset()
    adapted.let_answer("base")
    base = said(adapted, "سلام")
    adapted.reset()
    adapted.let_answer("base", "tuned")
    both: dict[str, str] = {"base": "", "tuned": ""}
    for speaker, piece in adapted.ask("سلام"):
        both[speaker] += piece

    bare, _ = tiny_phi3()
    alone = ChatSession(model=bare, tokenizer=adapted.tokenizer, has_adapter=False, max_new_tokens=8)
    assert base == said(alone, "سلام")
    assert base != tuned and both == {"base": base, "tuned": tuned}


def test_a_stopped_base_reply_gives_the_adapter_back(adapted: ChatSession) -> None:
    tuned = said(adapted, "hi")
    adapted.reset()
    adapted.let_answer("base", "tuned")
    reply = adapted.ask("hi")
    next(reply)
    reply.close()
    adapted.let_answer("tuned")
    assert said(adapted, "hi") == tuned


def test_a_bare_model_has_no_tuned_side(fake: ChatSession) -> None:
    bare = ChatSession(model=fake.model, tokenizer=fake.tokenizer, has_adapter=False)
    assert bare.speakers == ("base",)
    with pytest.raises(InputError, match="no tuned model"):
        bare.let_answer("base", "tuned")


def test_a_seed_repeats_a_whole_chat(adapted: ChatSession) -> None:
    def chat(seed: int) -> list[str]:
        again = ChatSession(
            model=adapted.model,
            tokenizer=adapted.tokenizer,
            has_adapter=True,
            max_new_tokens=8,
            temperature=1.5,
            seed=seed,
        )
        return [said(again, "hi"), said(again, "hi")]

    assert chat(1) == chat(1) != chat(2)


# -------------------------------------------------------------------------------------------- not a terminal


def test_each_line_is_a_turn_and_the_output_holds_replies_alone(fake: ChatSession) -> None:
    out, err = piped(fake, "سلام\n\nnamaste नमस्ते\r\n")
    assert out == "tuned says سلام 1\ntuned says سلام 2\n"
    assert err == ""
    assert "नमस्ते" in fake.model.asked[1]


def test_a_comparison_names_the_speakers(fake: ChatSession) -> None:
    out, _ = piped(fake, "/compare\nhi\n/base\nhi\n")
    assert out == "[base] base says سلام 1\n[tuned] tuned says سلام 2\nbase says سلام 3\n"


@pytest.mark.parametrize("word", ["/exit", "/quit"])
def test_exit_ends_the_chat(fake: ChatSession, word: str) -> None:
    assert piped(fake, f"one\n{word}\ntwo\n")[0] == "tuned says سلام 1\n"


def test_commands_change_the_chat(fake: ChatSession) -> None:
    _, err = piped(
        fake, '/undo\none\n/system sé breve \n/undo\ntwo\n/reset\n/system ""\n/help\n/both\n/tuned\n'
    )
    assert fake.exchanges == [] and fake.system is None and fake.speakers == ("tuned",)
    assert "sé breve" in fake.model.asked[1] and "one" not in fake.model.asked[1]
    assert "nothing to forget" in err and "/compare" in err


def test_the_system_prompt_is_shown_changed_removed_and_restored(fake: ChatSession) -> None:
    fake.system = fake.trained_system = "پاسخ کوتاه\x1b[2J"
    _, err = piped(fake, "/system\n")
    assert "پاسخ کوتاه\\x1b[2J" in err and fake.system == fake.trained_system
    piped(fake, "/system Be brief.\n")
    assert fake.system == "Be brief."
    piped(fake, '/system ""\n')
    assert fake.system is None
    assert "(none)" in piped(fake, "/system\n")[1]
    piped(fake, "/system reset\n")
    assert fake.system == fake.trained_system


def test_who_was_not_asked_is_said(fake: ChatSession) -> None:
    _, err = piped(fake, "one\n/base\ntwo\n/compare\n")
    assert "The base model has not seen 1 question of this chat" in err
    assert "The tuned model has not seen 1 question of this chat" in err


def test_an_unknown_command_names_the_nearest(fake: ChatSession) -> None:
    with pytest.raises(InputError, match="did you mean `/compare`"):
        piped(fake, "/comprae\n")


def test_two_slashes_say_one(fake: ChatSession) -> None:
    piped(fake, "//etc/hosts?\n")
    assert fake.exchanges[0].question == "/etc/hosts?"


def test_other_encodings_are_refused(fake: ChatSession) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("café\n".encode("latin-1")), encoding="utf-8")
    with pytest.raises(InputError, match="not UTF-8"):
        converse(fake, display=Display(io.StringIO()), stdin=stdin, stdout=io.StringIO())


def test_the_chat_ends_with_its_input_even_without_a_last_line_break(fake: ChatSession) -> None:
    assert piped(fake, "hi")[0] == "tuned says سلام 1\n"


# ---------------------------------------------------------------------------------------------- a terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Runs a chat on a terminal where the given lines are typed; an exception stands for its key."""

    def run(session: ChatSession, *lines: str | type[BaseException]) -> tuple[str, str]:
        keys = iter([*lines, EOFError])

        def typed_line(prompt: str) -> str:
            line = next(keys)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", typed_line)
        out, err = Terminal(), io.StringIO()
        converse(session, display=Display(err), stdin=Terminal(), stdout=out)
        return out.getvalue(), err.getvalue()

    return run


def test_ctrl_d_leaves(fake: ChatSession, typed: Callable[..., tuple[str, str]]) -> None:
    out, err = typed(fake, "hi")
    assert "tuned says سلام 1\n" in out and "/help" in err


def test_ctrl_c_at_the_prompt_does_not_leave(
    fake: ChatSession, typed: Callable[..., tuple[str, str]]
) -> None:
    out, err = typed(fake, KeyboardInterrupt, "hi")
    assert "tuned says" in out and "Ctrl-D or /exit leaves" in err


def test_ctrl_c_stops_a_reply_and_not_the_chat(
    fake: ChatSession, typed: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(model: FakeModel, *_: Any, **__: Any) -> Iterator[str]:
        model.asked.append("")
        yield "so far"
        if len(model.asked) == 1:
            raise KeyboardInterrupt
        yield " and on"

    monkeypatch.setattr(module, "stream", stream)
    out, err = typed(fake, "one", "two")
    assert "so far and on" in out and "/undo removes it" in err
    assert [turn["content"] for turn in fake.messages("tuned")] == ["one", "so far", "two", "so far and on"]


def test_a_mistake_is_explained_and_the_chat_goes_on(
    fake: ChatSession, typed: Callable[..., tuple[str, str]]
) -> None:
    out, err = typed(fake, "/baze", "x" * 600, "hi")
    assert "did you mean `/base`" in err and "the model holds 512" in err
    assert "tuned says سلام 1" in out


def test_a_reply_cannot_command_the_terminal(
    fake: ChatSession, typed: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "stream", lambda *_, **__: iter(["\x1b]0;title\x07"]))
    assert "\x1b" not in typed(fake, "hi")[0]
    assert piped(fake, "hi")[0] == "\x1b]0;title\x07\n"


# ------------------------------------------------------------------------------------------------- opening


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
    with pytest.raises(ConfigError, match="temperature="):
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
