"""What README and docs show works: Python runs in the order of its page, commands run, configurations are valid.

A tiny random model stands where a page says `smollm2-135m` or a Phi-3, so that the names are resolved as they are for
a reader and the weights cost nothing. README's snippet also runs with the model that it names.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.main import get_command

from phlora import load_config
from phlora.cli.program import app
from phlora.models import builtin
from phlora.testing import chat_rows, invoke, tiny_adapter, tiny_folder, write_rows

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "guide" / "en.md"),
        *(*ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")),
    ]
)
# Models that are not on this machine; and sixteen bits, in which a random model's many near ties turn.
IN_PLACE_OF = {
    "microsoft/Phi-3-mini-4k-instruct": "base",
    "BASE": "base",
    "PHI3": "base",
    "bfloat16": "float32",
}
# Configurations of other tools, as the pages call them.
THEIRS = {
    "llama3_lora_sft.yaml": "llamafactory/lora_sft.yaml",
    "sft.yaml": "llamafactory/qlora_packed.yaml",
    "lora.yml": "axolotl/lora_chat.yaml",
    "mini_qlora_single_device.yaml": "torchtune/mini_qlora.yaml",
}
# Commands that are checked word by word and not run, with the reason.
NOT_RUN = {
    "phlora data convert table.xlsx": "needs a program that writes spreadsheets",
    "phlora export runs/support --for gguf --verify-only": "needs what the export before it left",
    "phlora convert gpt2.pt --to merged": "needs a chat model with equal q, k and v",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Lines of a page that a reader would type, without the comments behind them."""
    lines = re.findall(r"^(?: {4}|)((?:echo [^|]+\| )?phlora .*)$", text_of(page), re.MULTILINE)
    return [re.split(r"\s{3,}|\s+#", line.replace("\\\n", " "))[0] for line in lines]


def examples_of(command: Any = None) -> list[str]:
    """The examples in the help of all commands."""
    command = command or get_command(app)
    lines = re.findall(r"^ +((?:echo [^|]+\| )?phlora .*)$", command.epilog or "", re.MULTILINE)
    inner = [line for sub in getattr(command, "commands", {}).values() for line in examples_of(sub)]
    return [*(re.split(r"\s{3,}", line)[0] for line in lines), *inner]


def mentions(page: Path) -> list[str]:
    """Commands within sentences."""
    return [" ".join(found.split()) for found in re.findall(r"`(phlora [a-z][^`]*)`", text_of(page))]


# ------------------------------------------------------------------------------------------------ where it runs


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the tiny model, which also answers to the name of the embedded one."""
    folder = tmp_path_factory.mktemp("snippets")
    tiny_folder(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHLORA_CACHE", str(folder / "cache"))
        patch.setattr(builtin, "_convert_gguf", lambda source, target, **_: tiny_folder(target))
        yield folder


@pytest.fixture(scope="module")
def furnished(tiny_models: Path) -> Path:
    """What the pages take for granted: chats, a run, an adapter, loralib files, the configuration of the guide."""
    folder = tiny_models / "furnished"
    folder.mkdir()
    (folder / "base").symlink_to(tiny_models / "base")
    (folder / "examples").symlink_to(ROOT / "examples")
    names = ("chats", "other", "a", "b", "important", "heldout")
    for number, name in enumerate(names):
        write_rows(folder / f"{name}.jsonl", chat_rows(12 * number + 12, turns=2)[12 * number :])
    (guide,) = blocks(ROOT / "docs" / "guide.md", "yaml")
    chat = json.dumps(
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    )
    (folder / "conversations.json").write_text(f"[{chat}]", encoding="utf-8")
    lines = ["12/24/25, 9:41 PM - Ben: How are you?", "12/24/25, 9:42 PM - Ana: Fine."]
    (folder / "WhatsApp Chat.txt").write_text("\n".join(lines), encoding="utf-8")
    for name in ("run.yaml", "config.yaml", "phlora.yaml"):
        (folder / name).write_text(guide.replace("smollm2-135m", "base"), encoding="utf-8")
    for name, theirs in THEIRS.items():
        shutil.copy(ROOT / "tests" / "unit" / "importing" / "configs" / theirs, folder / name)
    shutil.copytree(
        ROOT / "tests" / "unit" / "importing" / "configs" / "llamafactory" / "data", folder / "data"
    )
    shapes = ROOT / "tests" / "shapes"
    shutil.copy(shapes / "public" / "trl_no_config.py", folder / "train.py")
    shutil.copy(shapes / "guide" / "finetune_lora.ipynb", folder)
    (folder / "finetune_lora.ipynb").rename(folder / "finetune.ipynb")
    (folder / "scripts").mkdir()
    (folder / "scripts" / "done.py").write_text("from phlora import SFTTrainer\n", encoding="utf-8")
    qkv = "model.layers.0.self_attn.qkv_proj"
    files = {
        "phi3": {f"{qkv}.lora_A": torch.randn(4, 64), f"{qkv}.lora_B": torch.randn(96, 2)},
        "gpt2": {f"{qkv}.lora_A": torch.randn(4, 64), f"{qkv}.lora_B": torch.randn(128, 2)},
        "vision": {"conv1.lora_A": torch.randn(6, 12), "conv1.lora_B": torch.randn(24, 6)},
    }
    for name, state in files.items():
        torch.save(state, folder / f"{name}.pt")
    tiny_adapter(folder / "base", folder / "some" / "adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for options in (["-o", "runs/support"], ["-o", "runs/nf4", "--quantization", "nf4"]):
            if "nf4" not in options or find_spec("bitsandbytes"):
                done = invoke("train", "run.yaml", *options)
                assert done.code == 0, done.err
        assert invoke("merge", "runs/support", "-o", "models/support").code == 0
    return folder


@pytest.fixture
def place(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that, as the working folder."""
    folder = tmp_path / "place"
    shutil.copytree(furnished, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


# ------------------------------------------------------------------------------------------------------- Python


def run_python(page: Path) -> None:
    """The snippets share what they define, as for somebody who types them one after the other."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for snippet in blocks(page, "python"):
        exec(compile(snippet, name_of(page), "exec"), space)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_runs(page: Path, place: Path) -> None:
    run_python(page)


@pytest.mark.slow
def test_the_readme_s_python_runs_with_the_model_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    run_python(ROOT / "README.md")
    assert "Perplexity" in capsys.readouterr().out


def test_no_python_hides_from_these_tests() -> None:
    for page in PAGES:
        assert not re.search(r"^    (from|import) \w+", text_of(page), re.MULTILINE), name_of(page)


# ----------------------------------------------------------------------------------------------------- commands


def parse(words: list[str]) -> str:
    """Check command and options against the program; returns the words behind the command."""
    command, name = get_command(app), "phlora"
    while words and words[0] in getattr(command, "commands", {}):
        name, words = words[0], words[1:]
        command = command.commands[name]  # type: ignore[attr-defined]
    assert name != "phlora" or all(word.startswith("-") for word in words), f"no command: {words}"
    # Values may be placeholders; options may not.
    command.make_context(name, [*words], resilient_parsing=True, ignore_unknown_options=False)
    return " ".join(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in [*commands(page), *mentions(page)]:
        parse(shlex.split(line.rpartition("| ")[2])[1:])


@pytest.mark.parametrize(
    "line", dict.fromkeys([line for page in PAGES for line in commands(page)] + examples_of())
)
def test_commands_run(line: str, place: Path) -> None:
    said, _, command = line.rpartition("| ")
    words = shlex.split(command)[1:]
    if not parse(list(words)) or any(line.startswith(start) for start in NOT_RUN):
        return  # the name of a command in a list of them, or one that cannot run here
    if "--quantize" in words:
        pytest.importorskip("auto_round")
    if {"nf4", "dequantized"} & {*words}:
        pytest.importorskip("bitsandbytes")
    if words[0] == "train" and "--resume" not in words:
        shutil.rmtree("runs")
    if words[0] == "import-config":
        Path("phlora.yaml").unlink()
    if words[0] == "merge":
        shutil.rmtree("models")
    if words[:2] == ["data", "convert"]:
        Path("chats.jsonl").unlink()
    words = [IN_PLACE_OF.get(word, word) for word in words]
    if "dequantized" in words:
        words = [word.replace("runs/support", "runs/nf4") for word in words]
    done = invoke(*words, stdin=f"{said.removeprefix('echo ').strip()}\n")
    assert done.code == 0, done.err


def test_other_things_to_type_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for page in PAGES:
        text = text_of(page)
        assert {*re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text, re.MULTILINE)} <= {*targets}, name_of(page)
        for found in re.findall(r"phlora\[([\w,-]+)\]", text):
            assert {*found.split(",")} <= extras.keys(), name_of(page)
        for script in re.findall(r"python ((?:benchmarks|examples|tools|docs)/[\w/]+\.py)", text):
            assert (ROOT / script).is_file(), f"{name_of(page)}: {script}"


# ----------------------------------------------------------------------------------- configurations and links


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name_of)
def test_configurations_are_valid(page: Path, tmp_path: Path) -> None:
    for snippet in blocks(page, "yaml"):
        given = yaml.safe_load(snippet)
        file = tmp_path / "run.yaml"
        file.write_text(
            yaml.safe_dump({"model": "smollm2-135m", "data": "chats.jsonl", **given}), encoding="utf-8"
        )
        config = load_config(file)
        assert config.model.name and config.data.files


@pytest.mark.parametrize("file", sorted(ROOT.glob("examples/*.yaml")), ids=name_of)
def test_the_examples_can_be_run(file: Path, place: Path) -> None:
    done = invoke("train", f"examples/{file.name}", "--output", "runs/new", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert done.json["plan"]["num_optimizer_steps"] > 0


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", text_of(page)):
        assert (page.parent / target).exists(), target
