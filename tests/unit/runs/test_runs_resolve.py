"""Every command takes the same base, adapter, tokenizer and run from every way to name them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from phlora.config import TRUST_VARIABLE
from phlora.display import Display
from phlora.errors import ModelError, PhloraError, RunError
from phlora.evaluate import run as evaluation
from phlora.evaluate.run import evaluate_run
from phlora.export import convert as conversion
from phlora.export import merge as merging
from phlora.files import read_json, write_json
from phlora.runs import resolve as module
from phlora.runs.folder import RunFolder
from phlora.runs.resolve import Resolved, load_pair, load_tokenizer_of, resolve, resolve_adapter
from phlora.serve import chat, llm
from phlora.testing import chat_rows, write_rows
from phlora.train.finetune import finetune

ROWS = chat_rows(20)
QUIET = Display(quiet=True)

SOURCES = {
    "": "adapter/best",
    "adapter": "adapter/best",
    "adapter/best": "adapter/best",
    "adapter/last": "adapter/last",
    "checkpoints": "checkpoints/checkpoint-2",
    "checkpoints/checkpoint-2": "checkpoints/checkpoint-2",
}


class Stop(Exception):
    """Raised where a command has resolved its source."""


@pytest.fixture
def mine(run: Path, tmp_path: Path) -> Path:
    """A copy of the run whose adapters were trained with a chat template of their own."""
    copy = Path(shutil.copytree(run, tmp_path / "runs" / "mine"))
    for file in copy.rglob("chat_template.jinja"):
        file.write_text(file.read_text().replace("<|assistant|>", "<|assistant|>Well:"))
    return copy


def command(name: str, source: Path, out: Path) -> None:
    calls: dict[str, Any] = {
        "chat": lambda: chat.open_chat(str(source), display=QUIET),
        "merge": lambda: merging.merge_run(source, out, display=QUIET),
        "convert": lambda: conversion.convert(source, out, to="peft"),
        "evaluate": lambda: evaluate_run(source, display=QUIET),
    }
    calls[name]()


def resolved_by(name: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Resolved:
    """What a command takes a source for; the command goes no further."""
    found: list[Resolved] = []
    place, function = {
        "chat": (llm, "resolve"),
        "merge": (merging, "resolve_adapter"),
        "convert": (conversion, "resolve_adapter"),
        "evaluate": (evaluation, "resolve_adapter"),
    }[name]

    def record(*arguments: Any, **options: Any) -> Any:
        found.append(getattr(module, function)(*arguments, **options))
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(place, function, record)
        with pytest.raises(Stop):
            command(name, source, out)
    return found[0]


@pytest.mark.parametrize("name", ["chat", "merge", "convert", "evaluate"])
@pytest.mark.parametrize(("given", "adapter"), SOURCES.items())
def test_commands_agree(
    mine: Path, model_folder: Path, tmp_path: Path, given: str, adapter: str, name: str, monkeypatch: Any
) -> None:
    found = resolved_by(name, mine / given, tmp_path / "out", monkeypatch)
    assert found.adapter is not None and found.adapter.resolve() == (mine / adapter).resolve()
    assert found.base.name == str(model_folder) and found.base.dtype == "float32"
    assert found.run is not None and found.run.path.resolve() == mine.resolve()
    assert "Well:" in load_tokenizer_of(found).tokenizer.chat_template


@pytest.mark.parametrize("given", SOURCES)
def test_chat_and_evaluation_load_base_adapter_and_its_tokenizer(mine: Path, given: str) -> None:
    pair = load_pair(resolve(mine / given))
    assert hasattr(pair.model, "disable_adapter") and "Well:" in pair.tokenizer.tokenizer.chat_template


def test_an_adapter_that_writes_chats_or_ends_replies_in_another_way_than_its_base_says_so(
    run: Path, mine: Path
) -> None:
    assert not load_tokenizer_of(resolve(run)).notes
    assert [
        note for note in load_pair(resolve(mine)).notes if "chat template is not that of its base" in note
    ]
    file = mine / "adapter" / "best" / "tokenizer_config.json"
    write_json(file, {**read_json(file, ModelError), "eos_token": "<|user|>"})
    said = [note for note in load_tokenizer_of(resolve(mine)).notes if "replies end at the tokens" in note]
    assert len(said) == 1


def test_a_base_without_a_tokenizer_is_no_obstacle(mine: Path, model_folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(model_folder, tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    notes = load_tokenizer_of(resolve(mine, model=str(bare))).notes
    assert [note for note in notes if "not compared with its base's" in note]


def test_an_adapter_outside_of_a_run_says_its_base_itself(
    mine: Path, model_folder: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(mine / "adapter", tmp_path / "sent"))
    for source in (alone, alone / "best"):
        found = resolve(source)
        assert found.adapter == alone / "best" and found.run is None and found.base.name == str(model_folder)
    with pytest.raises(RunError, match="lies in no run"):
        evaluate_run(alone, display=QUIET)


def test_a_link_to_an_adapter_finds_its_run(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mine / "adapter" / "best")
    found = resolve(tmp_path / "link")
    assert found.run is not None and found.run.path.resolve() == mine.resolve()


def test_a_moved_run_is_found_where_it_is(mine: Path, tmp_path: Path) -> None:
    moved = mine.rename(tmp_path / "čudno ime #1 (kopija)")
    assert resolve(moved / "adapter").adapter == moved / "adapter" / "best"


@pytest.fixture
def named_from_here(mine: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run of a base that was named from the working folder, which is another one now."""
    Path(shutil.copytree(model_folder, tmp_path / "here" / "base"))
    monkeypatch.chdir(tmp_path / "here")
    done = finetune(
        model={"name": "base", "dtype": "float32", "device": "cpu"},
        data=ROWS[:6],
        training_config={"max_steps": 2, "learning_rate": 2e-2},
        evaluation={"enabled": False},
        output="run",
        display=QUIET,
    )
    assert done.folder is not None
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "here" / "run"


def test_a_base_named_from_the_working_folder_is_found_from_another(
    named_from_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in ("", "adapter/best", "checkpoints/checkpoint-2"):
        assert load_pair(resolve(named_from_here / given)).model.get_base_model() is not None
    assert resolve(named_from_here).base.name == str(tmp_path / "here" / "base")
    # Another model of that name is not the one that was trained on.
    (tmp_path / "elsewhere" / "base").mkdir()
    assert resolve(named_from_here).base.name == str(tmp_path / "here" / "base")
    (tmp_path / "elsewhere" / "base").rmdir()

    monkeypatch.chdir(tmp_path / "here")
    assert resolve(named_from_here).base.name == "base"
    # Everything moved together: the name leads there again.
    moved = (tmp_path / "here").rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    assert resolve("run").base.name == "base" and load_tokenizer_of(resolve("run"))

    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ModelError) as gone:
        load_tokenizer_of(resolve(moved / "run"))
    assert "`base`" in str(gone.value) and str(tmp_path / "here" / "base") in str(gone.value)
    assert resolve_adapter(moved / "run", needs_base=False).adapter is not None
    assert resolve(moved / "run", model=str(moved / "base")).base.name == str(moved / "base")


def test_a_run_that_does_not_say_where_its_base_lay_is_taken_by_the_name(
    named_from_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = read_json(named_from_here / "run.json", RunError)
    del facts["model"]["location"]
    write_json(named_from_here / "run.json", facts)
    assert resolve(named_from_here).base.name == "base"
    monkeypatch.chdir(tmp_path / "here")
    assert load_tokenizer_of(resolve("run"))


def test_a_model_has_no_adapter(model_folder: Path) -> None:
    found = resolve(model_folder)
    assert found.adapter is None and found.base.name == str(model_folder)
    with pytest.raises(RunError, match="neither a run nor an adapter"):
        resolve_adapter(model_folder)
    with pytest.raises(RunError, match="does not exist"):
        resolve_adapter(model_folder / "gone")


def test_what_cannot_be_used_says_why(mine: Path) -> None:
    (mine / "checkpoints" / "checkpoint-2" / "complete.json").unlink()
    with pytest.raises(RunError, match="incomplete"):
        resolve(mine / "checkpoints" / "checkpoint-2")
    for file in mine.glob("checkpoints/*/complete.json"):
        file.unlink()
    with pytest.raises(RunError, match="no adapter yet"):
        resolve(mine / "checkpoints")
    (mine / "adapter").rename(mine / "elsewhere")
    with pytest.raises(RunError, match="no adapter yet"):
        resolve(mine)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"base_model_name_or_path": 5}', '{"base_model_name_or_path": []}']
)
def test_an_adapter_that_does_not_say_its_base(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError):
        resolve_adapter(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": []}', '{"config": {"model": 5}}'])
@pytest.mark.parametrize("given", ["", "adapter/best"])
def test_a_broken_run_file_is_one_message(mine: Path, content: str, given: str) -> None:
    (mine / "run.json").write_text(content)
    with pytest.raises(PhloraError):
        resolve(mine / given)


def test_the_device_of_the_run_where_it_is_and_any_other_elsewhere(mine: Path) -> None:
    folder = RunFolder(mine)
    assert resolve(mine).base.device == "cpu"
    config = folder.facts()["config"]
    folder.update_facts(config={**config, "model": {**config["model"], "device": "cuda:99"}})
    assert resolve(mine).base.device == "auto"


@pytest.mark.parametrize(("said", "trusted"), [("", False), ("0", False), ("1", True)])
def test_a_run_alone_never_lets_code_of_its_base_run(
    mine: Path, monkeypatch: pytest.MonkeyPatch, said: str, trusted: bool
) -> None:
    folder = RunFolder(mine)
    config = folder.facts()["config"]
    folder.update_facts(config={**config, "model": {**config["model"], "trust_remote_code": True}})
    monkeypatch.setenv(TRUST_VARIABLE, said)
    for source in SOURCES:
        assert resolve(mine / source).base.trust_remote_code is trusted
    folder.update_facts(config=config)
    assert resolve(mine).base.trust_remote_code is False


# ------------------------------------------------------------------------------------------- evaluating again


@pytest.fixture
def proven(mine: Path) -> Path:
    (mine / "report.json").write_text("the proof")
    (mine / "report.html").write_text("the page")
    return mine


def test_an_evaluation_is_a_record_of_its_own(proven: Path) -> None:
    folders = [evaluate_run(proven, max_answers=0, display=QUIET).folder for _ in range(2)]
    assert (proven / "report.json").read_text() == "the proof"
    assert (proven / "report.html").read_text() == "the page"
    assert sorted(p for p in (proven / "evaluations").iterdir()) == sorted(filter(None, folders))
    assert len(set(folders)) == 2
    for folder in folders:
        assert folder is not None and {p.name for p in folder.iterdir()} == {"report.json", "report.html"}


def test_held_out_rows_are_held_out(proven: Path) -> None:
    report = evaluate_run(proven, max_answers=0, display=QUIET)
    assert report.num_trained_rows == 0 and "held-out" in report.verdict
    assert "training did not see" in report.to_html()


def test_a_run_of_which_little_is_written_down_is_evaluated(proven: Path) -> None:
    unknown = "model data adapter environment timing origins identity lora max_length".split()
    RunFolder(proven).update_facts(**dict.fromkeys(unknown))
    assert evaluate_run(proven, max_answers=0, display=QUIET).num_trained_rows == 0


@pytest.mark.parametrize(("rows", "trained"), [(ROWS[:14], 14), (ROWS[10:20], 4), (ROWS[14:], 0)])
def test_trained_rows_are_counted_and_never_called_held_out(proven: Path, rows: Any, trained: int) -> None:
    respelled = [
        {"messages": [{**turn, "content": f" {turn['content'].title()}. "} for turn in row["messages"]]}
        for row in rows
    ]
    report = evaluate_run(proven, data=respelled, max_answers=0, display=QUIET)
    assert report.num_trained_rows == trained
    assert ("held-out" in report.verdict) == (not trained)
    assert ("training did not see" in report.to_html()) == (not trained)
    assert any(
        f"{trained} of {len(rows)} rows were trained on (equal or nearly" in note for note in report.notes
    ) == bool(trained)


def test_a_trained_prompt_with_another_answer_is_said(proven: Path) -> None:
    question, answer = ROWS[0]["messages"]
    other = [{"messages": [question, {**answer, "content": "something else"}]}, *ROWS[15:]]
    report = evaluate_run(proven, data=other, max_answers=0, display=QUIET)
    assert report.num_trained_rows == 0
    assert any(f"1 of {len(other)} rows have a prompt that was trained on" in note for note in report.notes)


def test_rows_that_were_not_compared_are_not_counted(proven: Path) -> None:
    long = [
        {**row, "messages": [{"role": "user", "content": "x " * 9000}, row["messages"][1]]}
        for row in ROWS[14:16]
    ]
    report = evaluate_run(proven, data=[*ROWS[:3], *long], max_answers=0, display=QUIET)
    assert any("3 of 3 rows were trained on" in note for note in report.notes)


def test_held_out_rows_that_were_exchanged_for_trained_ones_are_not_called_held_out(proven: Path) -> None:
    write_rows(proven / "heldout.jsonl", ROWS[:14])
    report = evaluate_run(proven, max_answers=0, display=QUIET)
    assert report.num_trained_rows == 14 and "held-out" not in report.verdict


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other bytes"])
def test_a_run_that_does_not_say_what_it_trained_on_calls_no_other_rows_held_out(
    proven: Path, damage: str
) -> None:
    keys = proven / "trained.keys"
    if damage == "missing":
        keys.unlink()
    else:
        content = {"empty": b"", "cut": keys.read_bytes()[:-3], "other bytes": b"x" * 16}
        keys.write_bytes(content[damage])
    report = evaluate_run(proven, data=ROWS[14:], max_answers=0, display=QUIET)
    assert report.num_trained_rows is None and "held-out" not in report.verdict
    assert "may have seen" in report.to_html()
    assert evaluate_run(proven, max_answers=0, display=QUIET).num_trained_rows == 0
