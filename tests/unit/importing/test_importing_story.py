"""Configurations of other tools: every setting accounted for, the same training, a run that Phlora can plan."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from phlora.config import load_config
from phlora.errors import ConfigError
from phlora.importing.settings import flattened
from phlora.importing.story import ImportedConfig, import_config
from phlora.testing import Outcome, invoke

CONFIGS = Path(__file__).parent / "configs"
FILES = {
    "llamafactory": ("lora_sft.yaml", "qlora_packed.yaml", "pissa_dora.json", "webui_train.yaml"),
    "axolotl": ("lora_chat.yaml", "qlora_alpaca.yaml", "sharegpt_and_text.yml", "own_columns.yaml"),
    "torchtune": ("mini_lora.yaml", "mini_qlora.yaml", "instruct_two_sets.yaml", "text_completion.yaml"),
    "unsloth": ("lora_text.yaml", "studio_defaults.yaml", "smallest.yaml", "raw_text.json"),
}
EACH = [(tool, name) for tool, names in FILES.items() for name in names]
# Rows of all their data sets lie beside them.
WITH_ROWS = [
    ("llamafactory", "lora_sft.yaml"),
    ("axolotl", "sharegpt_and_text.yml"),
    ("torchtune", "mini_lora.yaml"),
    ("unsloth", "smallest.yaml"),
    *(
        pytest.param(tool, name, marks=pytest.mark.slow)
        for tool, name in [
            ("llamafactory", "qlora_packed.yaml"),
            ("llamafactory", "pissa_dora.json"),
            ("axolotl", "lora_chat.yaml"),
            ("axolotl", "qlora_alpaca.yaml"),
            ("torchtune", "text_completion.yaml"),
            ("unsloth", "lora_text.yaml"),
            ("unsloth", "raw_text.json"),
        ]
    ),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the tools, in a folder to write into."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(tool: str, name: str, **changes: Any) -> ImportedConfig:
    """A file of a tool with some settings changed; None takes one out."""
    path = Path("configs") / tool / name
    if changes:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        values = {key: value for key, value in {**values, **changes}.items() if value is not None}
        path = path.with_name(f"changed-{path.stem}.yaml")
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return import_config(path)


@pytest.mark.parametrize(("tool", "name"), EACH)
def test_no_setting_is_dropped_silently(place: Path, tool: str, name: str) -> None:
    imported = read(tool, name)
    text = (CONFIGS / tool / name).read_text(encoding="utf-8")
    given = yaml.safe_load(text) if not name.endswith(".json") else json.loads(text)
    told = {part.strip() for one in imported.mapped for part in one.source.split(",")}
    told |= {one.source for one in imported.left_out}
    for key in flattened(given):
        assert any(key == word or key.startswith(f"{word}.") for word in told), key
    assert all(one.why for one in imported.left_out)
    for one in imported.left_out:
        assert one.source in imported.text


@pytest.mark.parametrize(("tool", "name"), EACH)
def test_what_is_written_is_what_was_read(place: Path, tool: str, name: str) -> None:
    imported = read(tool, name)
    written = place / "phlora.yaml"
    written.write_text(imported.text, encoding="utf-8")
    assert yaml.safe_load(imported.text) == json.loads(json.dumps(imported.config))
    config = load_config(written)
    assert config.training_config == imported.config["training_config"]
    assert not config.notes


@pytest.mark.parametrize(("tool", "name"), WITH_ROWS)
def test_phlora_can_plan_the_run(place: Path, model_folder: Path, tool: str, name: str) -> None:
    os.chdir(place / "configs" / tool)
    done = invoke("import-config", name, "-o", "phlora.yaml", "--json")
    assert done.code == 0, done.err
    named = [
        "--model",
        model_folder,
        "--offline",
        "--set",
        "model.dtype=float32",
        "--set",
        "data.cache=false",
    ]
    named += ["--set", "data.eval_size=1", "--set", "training_config.report_to=none"]
    done = invoke("train", "phlora.yaml", *named, "--dry-run", "--json")
    assert done.code == 0, done.err
    resolved, wanted = done.json["config"], yaml.safe_load(Path("phlora.yaml").read_text(encoding="utf-8"))
    for section in ("training_config", "peft_config"):
        for key, value in wanted[section].items():
            if key not in ("report_to", "loraplus_lr_ratio"):
                assert resolved[section][key] == value, key


# ----------------------------------------------------------------------------------------------- meaning


def test_llamafactory_trains_the_same(place: Path) -> None:
    config = read("llamafactory", "lora_sft.yaml").config
    assert config["peft_config"] == {"target_modules": "all-linear", "r": 8, "lora_alpha": 16}
    assert config["data"]["eval_size"] == 0.2
    training = config["training_config"]
    assert training["warmup_steps"] == 0.1 and training["gradient_accumulation_steps"] == 8
    config = read("llamafactory", "qlora_packed.yaml").config
    assert config["model"]["quantization"] == {"type": "nf4", "double_quant": False}
    assert config["data"]["train_on"] == "last" and config["training_config"]["packing"] is True
    # Defaults of LLaMA-Factory that are not Phlora's.
    config = read("llamafactory", "pissa_dora.json").config
    assert config["training_config"]["learning_rate"] == 5e-5
    assert config["training_config"]["lr_scheduler_type"] == "linear"
    assert config["peft_config"]["init_lora_weights"] == "pissa_niter_16"
    assert config["peft_config"]["lora_alpha"] == 48 and config["peft_config"]["use_dora"] is True
    assert config["data"]["train_on"] == "all"


def test_axolotl_trains_the_same(place: Path) -> None:
    config = read("axolotl", "lora_chat.yaml").config
    assert config["model"]["quantization"] == "int8" and config["data"]["too_long"] == "drop"
    training = config["training_config"]
    assert training["eval_steps"] == 1 / (4 * 2) and training["save_steps"] == 1 / 2
    config = read("axolotl", "qlora_alpaca.yaml").config
    assert config["model"]["quantization"] == "nf4" and config["training_config"]["max_steps"] == 20
    assert (
        config["data"]["too_long"] == "truncate_history"
        and config["training_config"]["learning_rate"] == 1e-4
    )
    config = read("axolotl", "sharegpt_and_text.yml").config
    assert [file["format"] for file in config["data"]["files"]] == ["conversations", "text"]
    assert config["data"]["files"][1]["columns"] == {"text": "story"}


def test_torchtune_trains_the_same(place: Path) -> None:
    config = read("torchtune", "mini_lora.yaml").config
    wanted = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert config["peft_config"]["target_modules"] == wanted
    assert config["data"]["files"][0]["columns"] == {"conversations": "dialogue"}
    assert config["training_config"]["max_grad_norm"] == 0.0
    config = read("torchtune", "mini_qlora.yaml").config
    assert config["model"]["quantization"] == "nf4" and config["data"]["train_on"] == "all"
    assert config["training_config"]["max_steps"] == 20 and config["training_config"]["adam_beta2"] == 0.95
    config = read("torchtune", "text_completion.yaml").config
    assert config["model"] == {"name": "/tmp/base", "quantization": "nf4"}
    assert config["training_config"]["optim"] == "sgd"


def test_unsloth_trains_the_same(place: Path) -> None:
    config = read("unsloth", "lora_text.yaml").config
    assert config["model"]["quantization"] == "nf4" and config["data"]["train_on"] == "all"
    config = read("unsloth", "studio_defaults.yaml").config
    assert "quantization" not in config["model"] and "train_on" not in config["data"]
    assert config["peft_config"]["use_rslora"] is True
    config = read("unsloth", "smallest.yaml").config
    assert config["peft_config"]["r"] == 64 and config["peft_config"]["lora_alpha"] == 16
    assert config["training_config"]["warmup_steps"] == 5 and "quantization" not in config["model"]


def test_what_changes_the_training_is_to_be_looked_at(place: Path) -> None:
    imported = read("axolotl", "own_columns.yaml")
    for word in ("train[:10%]", "english", "muon", "[INST]"):
        assert any(word in note for note in imported.notes), word
        assert word in imported.text.partition("# To look at:")[2].partition("# Left out:")[0]


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("tool", "name", "changes", "says"),
    [
        ("llamafactory", "lora_sft.yaml", {"stage": "dpo"}, "is DPO"),
        ("llamafactory", "lora_sft.yaml", {"stage": "rm"}, "a reward model"),
        ("llamafactory", "lora_sft.yaml", {"finetuning_type": "full"}, "LoRA adapters"),
        ("llamafactory", "lora_sft.yaml", {"finetuning_type": "freeze"}, "LoRA adapters"),
        ("llamafactory", "lora_sft.yaml", {"use_galore": True}, "GaLore"),
        ("llamafactory", "lora_sft.yaml", {"adapter_name_or_path": "old"}, "phlora merge"),
        ("llamafactory", "lora_sft.yaml", {"dataset": "house_preferences"}, "preferences"),
        ("llamafactory", "lora_sft.yaml", {"dataset": "house_pictures"}, "text"),
        ("llamafactory", "lora_sft.yaml", {"dataset": "odd_roles"}, "rename it"),
        ("llamafactory", "lora_sft.yaml", {"dataset": "no_place"}, "file_name or hf_hub_url"),
        ("llamafactory", "lora_sft.yaml", {"dataset": "house_request"}, "did you mean `house_requests`"),
        ("llamafactory", "lora_sft.yaml", {"dataset_dir": "elsewhere"}, "--dataset-info"),
        ("llamafactory", "lora_sft.yaml", {"quantization_bit": 3}, "quantization_bit: 4 or 8"),
        ("llamafactory", "lora_sft.yaml", {"learning_rate": "fast"}, "learning_rate"),
        ("llamafactory", "lora_sft.yaml", {"lora_rank": 8.5}, "a whole number"),
        ("llamafactory", "lora_sft.yaml", {"dataset": None}, "dataset_info.json"),
        ("axolotl", "lora_chat.yaml", {"rl": "dpo"}, "preferences"),
        ("axolotl", "lora_chat.yaml", {"adapter": None}, "LoRA adapters"),
        ("axolotl", "lora_chat.yaml", {"adapter": "llama-adapter"}, "no adapter that Phlora trains"),
        ("axolotl", "lora_chat.yaml", {"processor_type": "AutoProcessor"}, "images"),
        ("axolotl", "lora_chat.yaml", {"lora_model_dir": "old"}, "begins its own"),
        ("axolotl", "lora_chat.yaml", {"pretraining_dataset": "c4"}, "pre-training"),
        ("axolotl", "lora_chat.yaml", {"load_in_4bit": True}, "contradict"),
        ("axolotl", "lora_chat.yaml", {"datasets": [{"path": "x"}]}, "tokens already"),
        ("axolotl", "lora_chat.yaml", {"datasets": "chats.jsonl"}, "a list of data sets"),
        ("axolotl", "lora_chat.yaml", {"val_set_size": -1}, "0 or more"),
        (
            "torchtune",
            "mini_lora.yaml",
            {"dataset": {"_component_": "torchtune.datasets.preference_dataset"}},
            "chats",
        ),
        (
            "torchtune",
            "mini_lora.yaml",
            {"dataset": {"_component_": "my.own.dataset"}},
            "only torchtune knows",
        ),
        (
            "torchtune",
            "mini_lora.yaml",
            {"model": {"_component_": "torchtune.models.phi3.phi3_mini"}},
            "LoRA adapters",
        ),
        (
            "torchtune",
            "mini_lora.yaml",
            {"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}},
            "another loss",
        ),
        ("unsloth", "lora_text.yaml", {"training": {"training_type": "full"}}, "LoRA adapters"),
        ("unsloth", "lora_text.yaml", {"model": None}, "base model"),
        ("unsloth", "lora_text.yaml", {"data": None}, "local_dataset"),
        ("unsloth", "lora_text.yaml", {"lora": {"use_loftq": True, "lora_r": 8}}, "leave it out"),
        ("unsloth", "lora_text.yaml", {"lora": {"vision_all_linear": True}}, "Phlora trains text"),
    ],
)
def test_what_would_train_something_else_is_refused(
    place: Path, tool: str, name: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read(tool, name, **changes)
    assert says in str(error.value) and "changed-" in str(error.value) or "dataset_info" in str(error.value)


# --------------------------------------------------------------------------------------- files and command


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: m\npeft_config: {r: 8}\n", "configuration of Phlora already"),
        ("hello: world\n", "--from llamafactory|axolotl|torchtune|unsloth"),
        ('{"a": {"file_name": "a.json"}}', "table of data sets"),
        ("- a\n", "holds a list"),
        ("", "holds nothing"),
        ("base_model: !!python/object/apply:os.system [true]\n", "no valid YAML"),
        ("stage: sft\nstage: dpo\n", "a second time"),
        ('{"stage": "sft", "stage": "dpo"}', "a second time"),
        ("a: &a [*a]\n", "refers to itself"),
        ("a: &a {b: *a}\n", "refers to itself"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
            "again and again",
        ),
        ("[" * 3000, "no valid YAML"),
        ("stage: \xff\n", "UTF-8"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_message(place: Path, text: str, says: str) -> None:
    Path("file.yaml").write_bytes(text.encode("latin-1"))
    done = invoke("import-config", "file.yaml")
    assert done.code == 2 and says in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_other_encodings_are_read(place: Path, encoding: str) -> None:
    path = Path("configs/axolotl/lora_chat.yaml")
    text = path.read_text(encoding="utf-8").replace("./outputs/lora-out", "./خروجی")
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    path.write_bytes((mark + text).encode(encoding))
    assert import_config(path).config["output"] == "./خروجی"


def test_nothing_in_a_file_leaves_its_comment(place: Path) -> None:
    path = Path("configs/unsloth/lora_text.yaml")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["inference"] = {"note\nmodel: {name: evil}": "x\nmodel: evil\u2028data: evil"}
    values["training"]["output_dir"] = "out\nmodel: evil"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    imported = import_config(path)
    assert yaml.safe_load(imported.text) == imported.config
    assert "evil" not in imported.config["model"]["name"]


def test_tokens_are_not_shown(place: Path) -> None:
    for name in ("studio_defaults.yaml", "raw_text.json"):
        imported = read("unsloth", name)
        everything = imported.text + json.dumps(imported.to_json())
        assert "0123456789abcdef" not in everything and "abcdefghijklmnop" not in everything


def test_the_command_writes_what_phlora_reads(place: Path) -> None:
    source = "configs/axolotl/lora_chat.yaml"
    done = invoke("import-config", source)
    assert done.code == 0 and yaml.safe_load(done.out)["model"]["quantization"] == "int8"
    done = invoke("import-config", source, "-o", "new/phlora.yaml")
    assert done.code == 0 and "left out: chat_template" in done.out, done.err
    assert load_config("new/phlora.yaml").data.too_long == "drop"
    again = invoke("import-config", source, "-o", "new/phlora.yaml")
    assert again.code == 2 and "--overwrite" in again.err
    done = invoke("import-config", source, "-o", "new/phlora.yaml", "--overwrite", "--json")
    assert done.code == 0 and done.json["tool"] == "Axolotl" and done.json["output"] == "new/phlora.yaml"
    assert {"target": "peft_config.r", "value": 32, "source": "lora_r", "remark": ""} in done.json["mapped"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere.yaml",), "does not exist"),
        (("configs",), "A folder"),
        (("configs/axolotl/lora_chat.yaml", "--from", "axolot"), "did you mean `axolotl`"),
        (("configs/axolotl/lora_chat.yaml", "--from", "llamafactory"), "model_name_or_path"),
        (("configs/llamafactory/lora_sft.yaml", "--dataset-info", "nowhere.json"), "--dataset-info"),
    ],
)
def test_wrong_arguments_are_one_message(place: Path, arguments: tuple[str, ...], says: str) -> None:
    done: Outcome = invoke("import-config", *arguments)
    assert done.code == 2 and says in done.err and "Traceback" not in done.err


def test_the_table_of_data_sets_may_lie_anywhere(place: Path) -> None:
    moved = place / "elsewhere"
    shutil.move(place / "configs" / "llamafactory" / "data", moved)
    done = invoke(
        "import-config",
        "configs/llamafactory/lora_sft.yaml",
        "--dataset-info",
        moved / "dataset_info.json",
        "--json",
    )
    assert done.code == 0, done.err
    assert Path(done.json["config"]["data"]["files"][0]["path"]) == moved / "house_requests.json"


def test_every_tool_is_told_from_the_others(place: Path) -> None:
    names: dict[str, str] = {
        "llamafactory": "LLaMA-Factory",
        "axolotl": "Axolotl",
        "torchtune": "torchtune",
        "unsloth": "Unsloth Studio",
    }
    for tool, name in EACH:
        assert read(tool, name).tool == names[tool]
