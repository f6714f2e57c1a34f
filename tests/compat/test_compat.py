"""Adapters, runs, checkpoints and loralib files that an earlier version wrote are read, continued and converted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from phlora import convert, evaluate_run, finetune, load_model, load_tokenizer, merge_run
from phlora.config import load_config
from phlora.display import Display
from phlora.models import kernels
from phlora.testing import invoke

try:
    from phlora import load_adapter
except ImportError:
    from phlora.adapters.load import load_adapter

STORED = Path(__file__).parent / "stored"
ADAPTERS = ("plain", "blocks", "dora", "blocks_dora")
QUIET = Display(quiet=True)
# Another processor or library sums in another order; eight steps of AdamW carry that on.
ROUNDING = dict(rtol=1e-4, atol=1e-5)
Phlora = Callable[..., Any]


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what is stored, as the working folder: runs name their base and data by relative paths."""
    copy = tmp_path / "stored"
    shutil.copytree(STORED, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def phlora(monkeypatch: pytest.MonkeyPatch) -> Phlora:
    """Runs a command line, which has to succeed, and returns its standard output."""
    monkeypatch.delenv("PHLORA_DEBUG", raising=False)

    def run(*arguments: str, stdin: str = "") -> str:
        done = invoke(*arguments, stdin=stdin)
        assert done.code == 0, done.err + done.out
        return done.out

    return run


@pytest.fixture(scope="module")
def logits() -> dict[str, torch.Tensor]:
    return load_file(STORED / "logits.safetensors")


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits[0, -8:]


def base() -> Any:
    return load_model("base", dtype="float32", device="cpu").model


def is_computed_to_the_bit(logits: dict[str, torch.Tensor]) -> bool:
    """Whether this machine rounds as the one that wrote the files: by stock transformers, on the stored base."""
    model = AutoModelForCausalLM.from_pretrained(STORED / "base", dtype=torch.float32)
    return torch.equal(logits_of(model, logits["ids"]), logits["base"])


# ----------------------------------------------------------------------------------------------------- adapters


def test_the_base_loads_with_its_tokenizer(stored: Path, logits: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(logits_of(base(), logits["ids"]), logits["base"], **ROUNDING)
    assert load_tokenizer("base").tokenizer.chat_template


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_loads_and_gives_its_logits(
    stored: Path, logits: dict[str, torch.Tensor], name: str
) -> None:
    tuned = load_adapter(base(), Path("adapters") / name).model
    torch.testing.assert_close(logits_of(tuned, logits["ids"]), logits[name], **ROUNDING)
    assert not torch.allclose(logits[name], logits["base"], atol=0.1)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_speaks_and_merges_by_command(
    stored: Path, logits: dict[str, torch.Tensor], phlora: Phlora, name: str
) -> None:
    adapter = f"adapters/{name}"
    assert phlora("chat", adapter, "--max-new-tokens", "3", stdin="say 3 xin chào\n")
    options = ["--rows", "heldout.jsonl", "--dtype", "float32", "--device", "cpu", "--json"]
    json.loads(phlora("merge", adapter, "-o", "merged", *options))
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged, logits["ids"]), logits[name], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ loralib files


@pytest.mark.parametrize("name", ["plain", "blocks"])
def test_a_loralib_file_becomes_the_adapter_that_it_was(
    stored: Path, logits: dict[str, torch.Tensor], phlora: Phlora, name: str
) -> None:
    alpha = json.loads(Path(f"adapters/{name}/adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"]
    alpha = alpha // 2 if name == "blocks" else alpha  # two blocks: twice the rank, and twice alpha
    options = ["--enable", "q,v"] if name == "blocks" else []
    options += ["--lora-alpha", str(alpha), "--model", "base", "--json"]
    json.loads(phlora("convert", f"{name}.pt", "--to", "peft", "-o", "by-command", *options))
    convert(
        f"{name}.pt",
        "by-name",
        to="peft",
        lora_alpha=alpha,
        enable=("q", "v") if name == "blocks" else (),
        model="base",
    )
    for folder in ("by-command", "by-name"):
        tuned = load_adapter(base(), folder).model
        torch.testing.assert_close(logits_of(tuned, logits["ids"]), logits[name], **ROUNDING)


@pytest.mark.parametrize("name", ["plain", "blocks"])
def test_an_adapter_becomes_the_loralib_file_that_it_became(stored: Path, phlora: Phlora, name: str) -> None:
    phlora("convert", f"adapters/{name}", "--to", "loralib", "-o", "again.pt")
    before, after = (torch.load(file, weights_only=True) for file in (f"{name}.pt", "again.pt"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


# --------------------------------------------------------------------------------------------------------- runs


def test_a_run_is_proven_again_with_the_same_figures(stored: Path, phlora: Phlora) -> None:
    before = json.loads((STORED / "finished" / "report.json").read_text(encoding="utf-8"))
    by_command = json.loads(phlora("evaluate", "finished", "--json"))
    by_name = evaluate_run("finished", display=QUIET).to_json()
    for report in (by_command, by_name):
        for side in ("base", "tuned"):
            assert report[side]["loss"] == pytest.approx(before[side]["loss"], rel=1e-4)
            assert report[side]["exact_match"] == before[side]["exact_match"]


def test_a_run_speaks_merges_and_converts(
    stored: Path, logits: dict[str, torch.Tensor], phlora: Phlora
) -> None:
    assert phlora("chat", "finished", "--max-new-tokens", "3", stdin="say 3 xin chào\n")
    report = merge_run("finished", "merged", dtype="float32", device="cpu", display=QUIET)
    assert report.changed_tokens == 0
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged, logits["ids"]), logits["plain"], rtol=1e-3, atol=1e-3)
    phlora("convert", "finished", "--to", "loralib", "-o", "finished.pt")
    before, after = (torch.load(file, weights_only=True) for file in ("plain.pt", "finished.pt"))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_adapter_folders_in_a_run_are_taken_by_every_command(
    stored: Path, phlora: Phlora, which: str
) -> None:
    adapter = f"finished/adapter/{which}"
    assert phlora("chat", adapter, "--max-new-tokens", "3", stdin="say 3\n")
    phlora("merge", adapter, "-o", "merged", "--dtype", "float32", "--device", "cpu")
    phlora("convert", adapter, "--to", "loralib", "-o", "converted.pt")


@pytest.mark.parametrize("run", ["finished", "interrupted", "interrupted_split"])
def test_the_configuration_of_a_run_is_understood(stored: Path, phlora: Phlora, run: str) -> None:
    facts = json.loads(Path(run, "run.json").read_text(encoding="utf-8"))
    config = load_config(Path(run, "config.yaml"))
    assert config.model.name == "base" and config.output == facts["config"]["output"]
    assert dict(config.peft_config) == facts["config"]["peft_config"]
    plan = json.loads(phlora("train", f"{run}/config.yaml", "--output", "new", "--dry-run", "--json"))["plan"]
    rows = ("train_rows", "held_out_rows")
    assert sum(plan[name] for name in rows) == sum(facts["data"][name] for name in rows)
    if run != "interrupted_split":  # how a new run splits may change; how a resumed one does may not
        assert plan["train_rows"] == facts["data"]["train_rows"]
        assert plan["num_optimizer_steps"] == facts["num_optimizer_steps"]


# ----------------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def chains_by_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Element-wise chains as the stored runs computed them: compiled ones round their last digit differently."""
    monkeypatch.setenv("PHLORA_KERNELS", "0")
    kernels._library.cache_clear()
    yield
    kernels._library.cache_clear()


@pytest.mark.usefixtures("chains_by_torch")
@pytest.mark.parametrize("suffix", ["", "_split"], ids=["held-out file", "rows split off"])
@pytest.mark.parametrize("way", ["command", "python"])
def test_an_interrupted_run_ends_as_the_one_that_was_not(
    stored: Path, logits: dict[str, torch.Tensor], phlora: Phlora, suffix: str, way: str
) -> None:
    run = Path(f"interrupted{suffix}")
    if way == "command":
        phlora("train", str(run / "config.yaml"), "--resume")
    else:
        finetune(load_config(run / "config.yaml"), resume=True, display=QUIET)
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "finished"
    exact = is_computed_to_the_bit(logits)
    for which in ("best", "last"):
        whole = load_file(f"uninterrupted{suffix}_{which}.safetensors")
        resumed = load_file(run / "adapter" / which / "adapter_model.safetensors")
        assert resumed.keys() == whole.keys()
        for name, weight in whole.items():
            torch.testing.assert_close(resumed[name], weight, **ROUNDING)
            assert not exact or torch.equal(resumed[name], weight), (which, name)


def test_a_finished_run_is_left_as_it_is(stored: Path) -> None:
    file = Path("finished", "adapter", "last", "adapter_model.safetensors")
    before = file.read_bytes()
    done = invoke("train", "finished/config.yaml", "--set", "output=finished")
    assert done.code == 2  # a run is there already
    assert file.read_bytes() == before
