"""Inference by name: what is loaded, and that a batch answers what each prompt is answered alone."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

import phlora
from phlora.display import Display
from phlora.errors import ConfigError, InputError, ModelError, RunError
from phlora.export.merge import merge_run
from phlora.serve.chat import open_chat
from phlora.serve.llm import LLM, load
from phlora.testing import chat_rows, tiny_adapter, tiny_phi3
from phlora.train.finetune import Run, finetune

QUIET = Display(quiet=True)
SYSTEM = "You answer in one word."
QUESTIONS = [row["messages"][1]["content"] for row in chat_rows(5, system=SYSTEM)]


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the tiny model on rows with one system prompt."""
    rows = chat_rows(16, system=SYSTEM)
    return finetune(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu"},
        data=rows[:12],
        eval_data=rows[12:],
        training_config={"max_steps": 2, "learning_rate": 2e-2},
        evaluation={"enabled": False},
        output=tmp_path_factory.mktemp("runs") / "run",
        display=QUIET,
    )


@pytest.fixture(scope="module")
def llm(run: Run) -> LLM:
    assert run.folder is not None
    return load(run.folder, display=QUIET)


def alone(llm: LLM, text: str, count: int = 12) -> str:
    """What transformers answers, from a prompt that its own chat template made."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    ids = llm.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    new = llm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=list(llm.stop_token_ids),
        pad_token_id=llm.tokenizer.pad_token_id,
    )
    return str(llm.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("batch_size", ["auto", 1, 2])
def test_a_batch_answers_what_transformers_answers_each_alone(llm: LLM, batch_size: Any) -> None:
    answers = llm.generate(QUESTIONS, max_new_tokens=12, batch_size=batch_size)
    assert answers == [alone(llm, question) for question in QUESTIONS]
    assert answers == [llm.generate(question, max_new_tokens=12) for question in QUESTIONS]


def test_questions_and_chats_are_asked_with_the_runs_own_system_prompt(llm: LLM) -> None:
    assert llm.system == llm.trained_system == SYSTEM
    question = QUESTIONS[0]
    spelled = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    shareGPT = [{"from": "human", "value": question}]
    one = llm.generate(question, max_new_tokens=8)
    assert llm.generate([question, spelled, spelled[1:], shareGPT], max_new_tokens=8) == [one] * 4
    assert llm.generate(spelled, max_new_tokens=8) == one
    assert llm.generate((m for m in [question]), max_new_tokens=8) == [one]  # type: ignore[call-overload]
    assert llm.generate([], max_new_tokens=8) == []


def test_it_answers_as_the_chat_does(llm: LLM, run: Run) -> None:
    chat = open_chat(str(run.folder), max_new_tokens=10, display=QUIET)
    said = "".join(piece for _, piece in chat.ask(QUESTIONS[1]))
    assert said == llm.generate(QUESTIONS[1], max_new_tokens=10)


def test_a_stream_says_what_the_reply_is_and_whoever_stops_listening_meets_the_model_as_it_was(
    llm: LLM,
) -> None:
    options: Any = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 20, "seed": 4}
    pieces = list(llm.generate(QUESTIONS[0], stream=True, **options))
    assert "".join(pieces) == llm.generate(QUESTIONS[0], **options) and len(pieces) > 1
    tuned = llm.generate(QUESTIONS[0], max_new_tokens=8)
    base = llm.generate(QUESTIONS[0], max_new_tokens=8, use_adapter=False)
    assert tuned != base
    left = llm.generate(QUESTIONS[0], stream=True, use_adapter=False)
    next(left)
    assert llm.generate(QUESTIONS[0], max_new_tokens=8) == tuned


def test_the_base_answers_as_it_was(llm: LLM, model_folder: Path) -> None:
    bare = load(model_folder, system=SYSTEM, dtype="float32", display=QUIET)
    assert not bare.has_adapter and bare.system == SYSTEM
    answers = llm.generate(QUESTIONS, max_new_tokens=8, use_adapter=False)
    assert bare.generate(QUESTIONS, max_new_tokens=8) == answers


def test_draws_repeat_by_seed_and_each_prompt_has_its_own(llm: LLM) -> None:
    options: Any = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    twice = [llm.generate(QUESTIONS[:1] * 3, **options, seed=3, batch_size=size) for size in (3, 1)]
    assert twice[0] == twice[1] and len(set(twice[0])) > 1
    assert twice[0][2] == llm.generate(QUESTIONS[0], **options, seed=5)


def test_a_plain_peft_adapter_and_a_merged_model_answer_as_peft_does(
    model_folder: Path, run: Run, llm: LLM, tmp_path: Path
) -> None:
    adapter = tiny_adapter(model_folder, tmp_path / "adapter")
    plain = load(adapter, display=QUIET, dtype="float32")
    assert isinstance(plain.model, PeftModel) and plain.system is None
    base, tokenizer = tiny_phi3()
    peft = LLM.of(PeftModel.from_pretrained(base, adapter).eval(), tokenizer)
    assert plain.generate(QUESTIONS, max_new_tokens=8) == peft.generate(QUESTIONS, max_new_tokens=8)
    assert plain.generate("a", max_new_tokens=8) != load(model_folder, display=QUIET).generate(
        "a", max_new_tokens=8
    )

    merged = merge_run(run.folder, output=tmp_path / "merged", display=QUIET)
    whole = load(tmp_path / "merged", display=QUIET, dtype="float32")
    assert merged and not whole.has_adapter and whole.system == SYSTEM
    assert whole.generate(QUESTIONS, max_new_tokens=8) == llm.generate(QUESTIONS, max_new_tokens=8)


def test_what_finetune_returned_answers_without_loading(run: Run, llm: LLM, monkeypatch: Any) -> None:
    monkeypatch.setattr("phlora.serve.llm.load_pair", None)
    loaded = phlora.load(run)
    assert loaded.model is run.model and loaded.system == SYSTEM
    assert loaded.generate(QUESTIONS, max_new_tokens=8) == llm.generate(QUESTIONS, max_new_tokens=8)
    assert phlora.load(run, system="").system is None
    with pytest.raises(ConfigError, match="in memory already, so `dtype`"):
        phlora.load(run, dtype="bfloat16")


def test_text_is_continued_as_it_is(llm: LLM) -> None:
    text = "Once upon"
    ids = torch.tensor([llm.tokenizer(text).input_ids])
    new = llm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=list(llm.stop_token_ids),
        pad_token_id=0,
    )
    expected = llm.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    assert llm.generate(text, raw=True, max_new_tokens=6) == expected != llm.generate(text, max_new_tokens=6)


def test_stop_tokens_are_not_in_a_reply(llm: LLM) -> None:
    assert llm.stop_token_ids
    for answer in llm.generate(QUESTIONS, max_new_tokens=60):
        assert not any(llm.tokenizer.decode([stop]) in answer for stop in llm.stop_token_ids)


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("prompts", "options", "found", "where"),
    [
        (7, {}, "a number (7) was given", "prompts"),
        (USER, {}, "was given", "prompts"),
        (["a", 7], {}, "a number (7) was given", "prompts[1]"),
        (["a", {"messages": [USER]}], {}, "was given", "prompts[1]"),
        (["a", ""], {}, "The question is empty", "prompts[1]"),
        (["a", []], {}, "empty list", "prompts[1]"),
        ([USER, {"role": "assistant", "content": "b"}], {}, "role assistant", "prompts"),
        ([{"role": "robot", "content": "a"}], {}, "robot", "prompts"),
        ([[USER], [{"role": "user", "contents": "a"}]], {}, "no `content`", "prompts[1]"),
        (["a", "b"], {"stream": True}, "2 prompts were given", ""),
        ("a " * 900, {}, "the model holds", "prompts"),
        ("a", {"tools": "no json"}, "JSON", "tools"),
        (["a", [USER]], {"raw": True}, "was given", "prompts[1]"),
        ("a", {"max_new_tokens": 0}, "`0` was given", "max_new_tokens"),
        ("a", {"max_new_tokens": 2.5}, "`2.5` was given", "max_new_tokens"),
        ("a", {"batch_size": 0}, "0 rows", "batch_size"),
        ("a", {"temperature": -1}, "`-1` was given", "temperature"),
        ("a", {"top_p": 0.5}, "does nothing at temperature 0", ""),
        ("a", {"raw": True, "tools": [{"name": "x"}]}, "raw=True", ""),
    ],
)
def test_mistakes_are_told_with_their_place(
    llm: LLM, prompts: Any, options: dict[str, Any], found: str, where: str
) -> None:
    with pytest.raises(InputError) as error:
        llm.generate(prompts, **options)
    assert found.lower() in str(error.value).lower() and error.value.where == where, error.value


@pytest.mark.parametrize("system", [5, ["You answer."], b"You answer.", {"role": "system"}], ids=repr)
def test_a_system_prompt_is_a_text_or_none_wherever_it_is_given(llm: LLM, system: Any) -> None:
    for give in (
        lambda: setattr(llm, "system", system),
        lambda: load("no such run is looked for", system=system, display=QUIET),
        lambda: open_chat("no such run is looked for", system=system, display=QUIET),
        lambda: LLM.of(*tiny_phi3(), system=system),
    ):
        with pytest.raises(InputError, match="was given") as error:
            give()
        assert error.value.where == "system"
    assert llm.system == SYSTEM


def test_a_model_without_a_template_continues_texts_only() -> None:
    model, tokenizer = tiny_phi3()
    tokenizer.chat_template = None
    bare = LLM.of(model, tokenizer)
    assert bare.generate("a", raw=True, max_new_tokens=2)
    with pytest.raises(ModelError, match="no chat template") as error:
        bare.generate("a")
    assert "raw=True" in error.value.fix


def test_the_tokenizer_that_was_handed_over_stays_as_it_is() -> None:
    model, tokenizer = tiny_phi3()
    tokenizer.pad_token = tokenizer.eos_token
    loaded = LLM.of(model, tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert loaded.tokenizer.pad_token_id not in loaded.stop_token_ids


def test_what_is_not_there_is_told(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(ModelError):
        load(tmp_path / "nowhere", display=QUIET)
    with pytest.raises(InputError, match="`int` was given"):
        load(3, display=QUIET)
    with pytest.raises(ConfigError, match="no setting `dtyp`") as error:
        load(model_folder, dtyp="float32", display=QUIET)  # type: ignore[call-arg]
    assert "dtype" in error.value.fix
    with pytest.raises(ConfigError, match="no adapter"):
        load(model_folder, base="other", display=QUIET)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "running", "config": {}}', encoding="utf-8")
    with pytest.raises(RunError, match="no adapter yet"):
        load(tmp_path / "run", display=QUIET)
    with pytest.raises(ModelError, match="is a `NoneType`"):
        load(SimpleNamespace(model=None, tokenizer=None, folder=None), display=QUIET)


def test_notes_are_shown_and_kept(run: Run) -> None:
    err = io.StringIO()
    loaded = load(str(run.folder), display=Display(err))
    assert "Loading" in err.getvalue() and SYSTEM in err.getvalue()
    assert any(SYSTEM in note for note in loaded.notes)
