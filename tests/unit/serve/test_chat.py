"""The chat: who answers, and what the history holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from chats import FakeModel, piped, said

from phlora.errors import InputError, ModelError
from phlora.models.tokenizer import prepare_tokenizer
from phlora.serve import chat as module
from phlora.serve.chat import ChatSession
from phlora.testing import tiny_phi3


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
