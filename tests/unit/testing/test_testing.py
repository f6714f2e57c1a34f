"""phlora.testing: models, adapters, chats and commands for the tests of tools that stand on Phlora."""

from __future__ import annotations

import doctest
import importlib
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from phlora import testing
from phlora.testing import (
    LANGUAGES,
    Outcome,
    chat_rows,
    chatml_tokenizer,
    invoke,
    llama2_tokenizer,
    phi3_tokenizer,
    quiet_config,
    tiny_adapter,
    tiny_folder,
    tiny_phi3,
    write_rows,
)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 20)[None]).logits


# ------------------------------------------------------------------------------------------- models and adapters


def test_the_tiny_model_is_the_same_for_a_seed_and_leaves_the_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first, again, other = (tiny_phi3(seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(logits(first), logits(again)) and not torch.equal(logits(first), logits(other))


def test_a_tiny_folder_holds_model_and_tokenizer(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "new" / "base", seed=4, longrope=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.rope_parameters["rope_type"] == "longrope"
    torch.testing.assert_close(logits(model), logits(tiny_phi3(seed=4, longrope=True)[0]))
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        chat_rows(1)[0]["messages"], tokenize=False
    )
    assert text.startswith("<|user|>\nsay 0")


@pytest.mark.parametrize("config", [{}, {"use_dora": True, "r": 2, "target_modules": ["o_proj"]}])
def test_a_tiny_adapter_changes_what_its_base_says(
    model_folder: Path, tmp_path: Path, config: dict[str, object]
) -> None:
    folders = [
        tiny_adapter(model_folder, tmp_path / name, seed=seed, **config)
        for name, seed in zip("abc", (0, 0, 1), strict=True)
    ]
    base = logits(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32))
    found = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        found.append(logits(PeftModel.from_pretrained(model, str(folder))))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], base, atol=0.05) and not torch.allclose(found[0], found[2], atol=0.05)


@pytest.mark.parametrize("make", [phi3_tokenizer, chatml_tokenizer, llama2_tokenizer])
@pytest.mark.parametrize("language", LANGUAGES)
def test_chat_tokenizers_lose_no_letter(make: object, language: str) -> None:
    tokenizer = make()  # type: ignore[operator]
    chat = [{"role": "user", "content": LANGUAGES[language]}]
    assert LANGUAGES[language] in tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(LANGUAGES[language], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == LANGUAGES[language]


# ------------------------------------------------------------------------------------------------------- chats


def test_chats_are_different_and_have_the_turns_asked_for(tmp_path: Path) -> None:
    rows = chat_rows(30, turns=2, system="Be brief.")
    assert len({json.dumps(row) for row in rows}) == 30
    assert [m["role"] for m in rows[0]["messages"]] == ["system", *["user", "assistant"] * 2]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == rows


# ---------------------------------------------------------------------------------------------------- commands


def test_a_command_runs_for_real(model_folder: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", chat_rows(4))
    outcome = invoke("data", "check", file, "--model", model_folder, "--max-length", 64, "--json")
    assert outcome.code == 0 and isinstance(outcome.json, dict)
    assert invoke("data", "check", tmp_path / "none.jsonl").code == 2
    assert "none.jsonl" in invoke("data", "check", tmp_path / "none.jsonl").err
    reply = invoke("chat", model_folder, "--max-new-tokens", 2, stdin="سلام\n/exit\n")
    assert reply.code == 0 and reply.out.endswith("\n")
    assert invoke("--help") == Outcome(0, invoke("--help").out, "")


def test_a_command_leaves_the_process_as_it_was(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("", "transformers", "datasets", "huggingface_hub")

    def state() -> list[object]:
        loggers = [logging.getLogger(name) for name in names]
        facts: list[object] = [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
        return [*facts, dict(os.environ), sys.stdin, sys.stdout, sys.stderr, warnings.showwarning, Path.cwd()]

    file = write_rows(tmp_path / "rows.jsonl", chat_rows(2))
    for arguments in (
        ("data", "preview", file, "--model", model_folder, "--offline"),
        ("train", "none.yaml"),
    ):
        before = state()
        invoke(*arguments)
        after = state()
        assert before == after
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ what it needs


def test_neither_pytest_nor_the_tests_are_imported() -> None:
    code = "import sys, phlora.testing; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pytest", "_pytest", "conftest"} & set(done.stdout.split())


@pytest.mark.parametrize("name", ["rows", "command_line"])
def test_examples_in_docstrings_hold(name: str) -> None:
    module = importlib.import_module(f"phlora.testing.{name}")
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted


def test_the_example_of_the_package_runs(tmp_path: Path) -> None:
    text = (testing.__doc__ or "").split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
    space: dict[str, object] = {}
    exec("\n".join(line[4:] for line in text.splitlines()), space)
    space["test_my_tool"](tmp_path)  # type: ignore[operator]


def test_every_public_name_is_documented() -> None:
    for name in testing.__all__:
        value = getattr(testing, name)
        assert name == "LANGUAGES" or value.__doc__


def test_a_quiet_configuration_trains_where_it_is_and_yields_to_what_is_given(tmp_path: Path) -> None:
    config = quiet_config(tmp_path, max_steps=3, save_strategy="steps", logging_steps=2)
    assert (config.use_cpu, config.bf16, config.report_to, config.disable_tqdm) == (True, False, [], True)
    assert (config.max_steps, config.save_strategy, config.logging_steps) == (3, "steps", 2)
    assert quiet_config(tmp_path).save_strategy == "no" and config.output_dir == str(tmp_path)
