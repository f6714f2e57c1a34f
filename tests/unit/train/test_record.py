"""What is written about a run can be run again, and says which run it is and nothing that does not matter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from peft import LoraConfig

from phlora.adapters.attach import AdapterSummary, lora_settings
from phlora.config import RunConfig, build_config, resolved
from phlora.display import Display
from phlora.errors import RunError
from phlora.models.load import LoadedModel, load_model
from phlora.models.prefix_sharing import Sharing
from phlora.runs.facts import DataFacts, RunFacts
from phlora.runs.folder import RunFolder
from phlora.runs.trained_rows import TrainedKeys
from phlora.testing import chat_rows
from phlora.train.arguments import Arguments, training_arguments
from phlora.train.optimizer import take_loraplus
from phlora.train.plan import Plan
from phlora.train.record import config_text, open_run, plain_lora, run_facts
from phlora.train.request import IN_MEMORY, Objects

QUIET = Display(quiet=True)
FACTS = DataFacts(
    files=("rows.jsonl",),
    formats={},
    contents={},
    split="conversations",
    train_rows=4,
    held_out_rows=0,
    sequences=4,
    tokens=40,
    trained_tokens=20,
)
PLAN = Plan(
    adapter=AdapterSummary({"o_proj": (2, 1024)}, 1024, 4096, 4096),
    data=FACTS,
    sequences_per_step=2,
    num_optimizer_steps=5,
    disk_bytes=1,
    learning_rate=2e-4,
    sharing=Sharing(False, "speed is reference"),
)
SETTINGS: dict[str, Any] = {"max_steps": 5, "learning_rate": 1e-3, "seed": 3, "bf16": False}


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedModel:
    return load_model(model_folder, dtype="float32", device="cpu")


def parts(
    training: dict[str, Any] | None = None, peft: dict[str, Any] | None = None, **values: Any
) -> tuple[RunConfig, Arguments, LoraConfig]:
    training, peft = {**SETTINGS, **(training or {})}, peft or {"r": 4, "target_modules": ["q_proj"]}
    config = build_config(
        {"model": "m", "data": "rows.jsonl", "training_config": training, "peft_config": peft, **values},
        {"training_config.max_steps": "run.yaml"},
    )
    adapter, ratio = take_loraplus(peft)
    arguments = training_arguments(training, output_dir="runs/x", loraplus_lr_ratio=ratio)
    return config, arguments, lora_settings(adapter)


def facts_of(loaded: LoadedModel, *, data_print: str = "d" * 64, **settings: Any) -> RunFacts:
    config, arguments, lora = parts(**settings)
    data: Any = SimpleNamespace(fingerprint=data_print, facts=FACTS, system_prompts=None)
    return run_facts(config, data, loaded, arguments, lora, PLAN)


def test_the_written_configuration_is_the_same_run_again() -> None:
    config, arguments, lora = parts({"z_loss": 1e-4}, {"r": 4, "loraplus_lr_ratio": 8})
    text = config_text(config, arguments, lora)
    values = yaml.safe_load(text)
    assert values["training_config"]["z_loss"] == 1e-4
    assert values["peft_config"]["loraplus_lr_ratio"] == 8
    again = build_config(values)
    assert resolved(again) | {"training_config": 0, "peft_config": 0} == resolved(config) | {
        "training_config": 0,
        "peft_config": 0,
    }
    adapter, ratio = take_loraplus(again.peft_config)
    repeated = training_arguments(again.training_config, output_dir="runs/x", loraplus_lr_ratio=ratio)
    assert repeated.args.to_dict() == arguments.args.to_dict()
    assert (repeated.z_loss, repeated.loraplus_lr_ratio) == (1e-4, 8)
    assert lora_settings(adapter).to_dict() == lora.to_dict()


def test_each_line_says_where_its_value_came_from() -> None:
    lines = config_text(*parts()).splitlines()
    said = {line.strip().partition(":")[0]: line.partition("  # ")[2] for line in lines}
    assert said["max_steps"] == "run.yaml"
    assert said["lora_alpha"] == "twice r"
    assert "Phlora's default" in said.values() and "PEFT's default" in said.values()
    # What belongs to this machine or to nobody else is not handed on.
    assert not {"output_dir", "hub_token", "use_cpu"} & said.keys()


def test_a_model_that_was_an_object_is_said_to_be_none_that_can_be_named() -> None:
    first, second, *_ = config_text(*parts(model=IN_MEMORY)).splitlines()
    assert first.startswith("# Written by Phlora") and "was an object in memory" in second
    assert "object in memory" not in config_text(*parts())


def test_names_in_every_script_survive() -> None:
    config, arguments, lora = parts(output="runs/پشتیبانی")
    text = config_text(config, arguments, lora)
    assert "runs/پشتیبانی" in text and yaml.safe_load(text)["output"] == "runs/پشتیبانی"


def test_the_adapter_is_written_with_values_that_yaml_has() -> None:
    lora = lora_settings({"r": 4, "target_modules": ["v_proj", "q_proj"], "rank_pattern": {"q_proj": 2}})
    values = plain_lora(lora)
    assert yaml.safe_load(yaml.safe_dump(values)) == values
    assert sorted(values["target_modules"]) == ["q_proj", "v_proj"]
    assert (values["r"], values["lora_alpha"], values["rank_pattern"]) == (4, 8, {"q_proj": 2})
    assert None not in values.values()


@pytest.mark.parametrize(
    "changes",
    [
        {"data_print": "e" * 64},
        {"training": {"learning_rate": 2e-3}},
        {"training": {"z_loss": 1e-4}},
        {"training": {"weight_decay": 0.1}},
        {"peft": {"r": 8, "target_modules": ["q_proj"]}},
        {"peft": {"r": 4, "target_modules": ["v_proj"]}},
        {"peft": {"r": 4, "target_modules": ["q_proj"], "loraplus_lr_ratio": 4}},
        {"data": {"files": "rows.jsonl", "train_on": "all"}},
        {"data": {"files": "rows.jsonl", "too_long": "drop"}},
    ],
)
def test_what_changes_the_result_is_another_run(loaded: LoadedModel, changes: dict[str, Any]) -> None:
    assert facts_of(loaded, **changes).identity != facts_of(loaded).identity


@pytest.mark.parametrize(
    "training",
    [
        {"logging_steps": 3},
        {"save_steps": 2},
        {"per_device_eval_batch_size": 5},
        {"dataloader_num_workers": 2},
        {"run_name": "other"},
    ],
)
def test_what_changes_nothing_about_the_result_is_the_same_run(
    loaded: LoadedModel, training: dict[str, Any]
) -> None:
    given, other = facts_of(loaded).identity, facts_of(loaded, training=training).identity
    assert other == given


def test_another_template_or_base_is_another_run(loaded: LoadedModel) -> None:
    base = facts_of(loaded)
    assert facts_of(dataclasses.replace(loaded, fingerprint="bfloat16:other")).identity != base.identity
    tokenizer = loaded.tokenizer.tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages }}"
    try:
        assert facts_of(loaded).identity != base.identity
    finally:
        tokenizer.chat_template = template


def test_a_base_that_was_named_from_the_working_folder_is_found_from_another(
    loaded: LoadedModel, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    near = dataclasses.replace(loaded.source, name=model_folder.name, location=model_folder.name)
    named = facts_of(dataclasses.replace(loaded, source=near)).to_json()["model"]
    assert (
        str(model_folder) in named.values()
        and str(model_folder) not in facts_of(loaded).to_json()["model"].values()
    )
    # It is JSON as it stands.
    assert json.loads(json.dumps(facts_of(loaded).to_json()))["model"]["fingerprint"] == loaded.fingerprint


def prepared(rows: list[Any]) -> Any:
    return SimpleNamespace(held_out_rows=rows, trained_keys=TrainedKeys())


def test_a_run_is_opened_once_and_continued_only_as_what_it_is(loaded: LoadedModel, tmp_path: Path) -> None:
    folder, rows = RunFolder(tmp_path / "run"), chat_rows(3)
    facts, objects = facts_of(loaded), Objects(train=rows, held_out=rows[:1])
    assert open_run(folder, facts, "a: 1\n", prepared([]), objects, resume=False, display=QUIET) is None
    assert (folder.path / "config.yaml").read_text("utf-8") == "a: 1\n"
    written = [json.loads(line) for line in (folder.path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert written == rows
    assert folder.facts()["identity"] == facts.identity
    assert open_run(folder, facts, "b: 2\n", prepared([]), objects, resume=True, display=QUIET) is None
    assert (folder.path / "config.yaml").read_text("utf-8") == "a: 1\n"
    other = facts_of(loaded, training={"learning_rate": 2e-3})
    with pytest.raises(RunError, match="not the same run any more(?s:.*)learning_rate"):
        open_run(folder, other, "c: 3\n", prepared([]), objects, resume=True, display=QUIET)
