"""TRL's own tests of its SFTTrainer, with `phlora.SFTTrainer` in its place.

    python tests/parity/trl_own_tests.py SOURCE [--stock] [ARGUMENTS OF PYTEST]

SOURCE is a checkout of TRL (its package on PyPI has no tests), as near to the installed version as there is. `--stock`
runs the same tests with TRL's own trainer: what fails there too is not Phlora's (a version that differs, a model that
has no stand-in). No hub is asked: the tiny models and the data sets that the tests name are made here, as folders of
the same names, which both libraries prefer to the hub.

Not collected by pytest, and no part of `make test`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import chat_template_utils as templates

from phlora.models.tiny import tiny_tokenizer
from phlora.testing.models import TINY_SIZES

ORGANISATION = "trl-internal-testing"
# Name of a stand-in -> its configuration, beyond the sizes, and its chat template.
MODELS: dict[str, tuple[str, Mapping[str, Any], str | None]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}, templates.qwen2_5_chat_template),
    "tiny-Qwen3ForCausalLM": ("qwen3", {"head_dim": 8}, templates.qwen3_chat_template),
    "tiny-Phi3ForCausalLM": ("phi3", {}, templates.phi3_chat_template),
    "tiny-LlamaForCausalLM-3.2": ("llama", {}, templates.llama3_2_chat_template),
    "tiny-LlamaForCausalLM-3.1": ("llama", {}, templates.llama3_1_chat_template),
    "tiny-LlamaForCausalLM-3": ("llama", {}, templates.llama3_chat_template),
    "tiny-MistralForCausalLM-0.1": ("mistral", {}, templates.qwen2_5_chat_template),
    "tiny-MistralForCausalLM-0.2": ("mistral", {}, templates.qwen2_5_chat_template),
    "tiny-GemmaForCausalLM": ("gemma", {"head_dim": 8}, templates.gemma_chat_template),
    "tiny-Gemma2ForCausalLM": ("gemma2", {"head_dim": 8}, templates.gemma_chat_template),
    "tiny-CohereForCausalLM": ("cohere", {}, templates.cohere_chat_template),
    "tiny-Cohere2ForCausalLM": ("cohere2", {"head_dim": 8}, templates.cohere2_chat_template),
    "tiny-GPTNeoXForCausalLM": ("gpt_neox", {}, None),
    "tiny-Olmo3ForCausalLM": ("olmo3", {}, templates.qwen3_chat_template),
    "tiny-Qwen3MoeForCausalLM": (
        "qwen3_moe",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        templates.qwen3_chat_template,
    ),
}
# The classes of these test functions of TRL's, not its trainer.
OF_FUNCTIONS = "not ChunkedCrossEntropy and not PatchChunked and not TestDFTLoss and not vlm and not VLM"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--stock", action="store_true", help="TRL's own trainer")
    options, others = parser.parse_known_args()
    tests = options.source.resolve() / "tests" / "test_sft_trainer.py"
    if not tests.is_file():
        parser.error(f"{tests} is missing: SOURCE is a checkout of TRL")
    for file in (tests, tests.with_name("testing_utils.py")):
        lend_missing_names(file)
    if not options.stock:
        import phlora

        trl.SFTTrainer = phlora.SFTTrainer
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        make_data(Path(folder))
        with contextlib.chdir(folder):
            os.environ["HF_HUB_OFFLINE"] = "1"
            arguments = ["-q", "-p", "no:cacheprovider", "-k", OF_FUNCTIONS, "--no-header", "-W", "ignore"]
            return int(
                pytest.main([*arguments, "--tb=line", str(tests), *others], plugins=[Plugin(tests.parent)])
            )


def lend_missing_names(file: Path) -> None:
    """Let a file of another version be imported: what it takes from TRL and is not there says that it is not."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("trl"):
            module = importlib.import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name):
                    setattr(module, name, lambda *args, **kwargs: False)


class Plugin:
    """What pytest lacks here for TRL's tests."""

    def __init__(self, tests: Path) -> None:
        self.tests = tests

    @pytest.fixture
    def lazy_shared_datadir(self) -> Path:
        return self.tests / "data"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        try:
            return (yield)
        except OSError as error:
            if "offline" in str(error).lower() or "couldn't" in str(error).lower():
                pytest.skip(f"no stand-in: {str(error)[:80]}")
            raise


def make_models(folder: Path) -> None:
    for name, (kind, more, template) in MODELS.items():
        tokenizer = make_tokenizer(template)
        ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**TINY_SIZES, **more}, **ids)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / ORGANISATION / name)
        tokenizer.save_pretrained(folder / ORGANISATION / name)
    make_tokenizer(templates.qwen3_chat_template).save_pretrained(folder / "Qwen/Qwen3-4B")


def make_tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.padding_side = "<|im_end|>", "right"
    tokenizer.chat_template = template
    return tokenizer


def make_data(folder: Path) -> None:
    questions = [f"What is {i} and {i}?" for i in range(20)]
    answers = [f"It is {2 * i}, as everybody knows." for i in range(20)]
    pairs = list(zip(questions, answers, strict=True))

    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    write_sets(
        folder / ORGANISATION / "zen",
        {
            "standard_language_modeling": [{"text": f"{q} {a}"} for q, a in pairs],
            "conversational_language_modeling": [
                {"messages": [said("user", q), said("assistant", a)]} for q, a in pairs
            ],
            "standard_prompt_completion": [{"prompt": q, "completion": f" {a}"} for q, a in pairs],
            "conversational_prompt_completion": [
                {"prompt": [said("user", q)], "completion": [said("assistant", a)]} for q, a in pairs
            ],
            "standard_implicit_prompt_preference": [{"chosen": a, "rejected": q} for q, a in pairs],
        },
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"left": 1, "right": 2}}}
    tool = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
    turns = [
        said("user", "Add 1 and 2"),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
        said("assistant", "It is 3."),
    ]
    write_sets(
        folder / ORGANISATION / "toolcall",
        {"language_modeling": [{"messages": turns, "tools": json.dumps([tool])}] * 20},
    )


def write_sets(folder: Path, sets: Mapping[str, list[dict[str, Any]]]) -> None:
    """A data set of several configurations, as the library finds it in a folder: 17 rows and 3."""
    folder.mkdir(parents=True)
    entries = []
    for name, rows in sets.items():
        for split, part in (("train", rows[:17]), ("test", rows[17:])):
            lines = "\n".join(map(json.dumps, part))
            (folder / f"{name}-{split}.jsonl").write_text(lines, encoding="utf-8")
        files = [{"split": split, "path": f"{name}-{split}.jsonl"} for split in ("train", "test")]
        entries.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': entries})}\n---\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
