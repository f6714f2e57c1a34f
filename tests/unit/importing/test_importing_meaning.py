"""What settings of other tools mean, where a name or a default of theirs could be read otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from phlora.errors import ConfigError
from phlora.importing.story import ImportedConfig, import_config
from phlora.testing import invoke

AXOLOTL = {
    "base_model": "m",
    "adapter": "lora",
    "datasets": [{"path": "owner/chats", "type": "chat_template"}],
    "sequence_len": 128,
}
TORCHTUNE = {
    "model": {"_component_": "torchtune.models.phi3.lora_phi3_mini", "lora_attn_modules": ["q_proj"]},
    "tokenizer": {"_component_": "torchtune.models.phi3.phi3_mini_tokenizer", "max_seq_len": 64},
    "checkpointer": {"checkpoint_dir": "m"},
    "dataset": {"_component_": "torchtune.datasets.chat_dataset", "source": "owner/chats"},
}
LLAMAFACTORY = {
    "model_name_or_path": "m",
    "stage": "sft",
    "finetuning_type": "lora",
    "dataset": "owner/chats",
    "dataset_dir": "ONLINE",
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def imported(base: dict[str, Any], **changes: Any) -> ImportedConfig:
    """A file of a tool, with these settings of it."""
    Path("given.yaml").write_text(yaml.safe_dump({**base, **changes}), encoding="utf-8")
    return import_config("given.yaml")


def looked_at(result: ImportedConfig, key: str) -> bool:
    """Whether a person is told to look at a setting, in the text too."""
    told = result.text.partition("# To look at:")[2].partition("# Left out:")[0]
    return any(note.startswith(f"{key}:") for note in result.notes) and f"# - {key}:" in told


@pytest.mark.parametrize(
    ("given", "rows", "passes"),
    [
        ({"batch_size": 16, "micro_batch_size": 2}, 2, 8),
        ({"batch_size": 16}, 1, 16),
        ({"batch_size": 16, "gradient_accumulation_steps": 4}, 4, 4),
        ({"batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 4}, 2, 4),
        ({"micro_batch_size": 3}, 3, None),
    ],
)
def test_the_batch_of_axolotl(given: dict[str, int], rows: int, passes: int | None) -> None:
    result = imported(AXOLOTL, **given)
    training = result.config["training_config"]
    assert training["per_device_train_batch_size"] == rows
    assert training.get("gradient_accumulation_steps") == passes
    assert all("nothing to do" in one.why for one in result.left_out if one.source == "batch_size")


def test_a_batch_of_axolotl_that_does_not_divide() -> None:
    result = imported(AXOLOTL, batch_size=7, micro_batch_size=2)
    assert result.config["training_config"]["gradient_accumulation_steps"] == 3
    assert looked_at(result, "batch_size")
    for given in (
        {"batch_size": 1, "micro_batch_size": 2},
        {"batch_size": 9, "micro_batch_size": 2, "gradient_accumulation_steps": 4},
        {"batch_size": 9, "gradient_accumulation_steps": 4},
    ):
        with pytest.raises(ConfigError, match="batch_size"):
            imported(AXOLOTL, **given)


@pytest.mark.parametrize(
    ("given", "steps"), [({}, 0.03), ({"warmup_steps": 0}, 0), ({"warmup_ratio": 0.1}, 0.1)]
)
def test_the_warmup_of_axolotl(given: dict[str, float], steps: float) -> None:
    result = imported(AXOLOTL, **given)
    assert result.config["training_config"]["warmup_steps"] == steps
    assert ("Axolotl's default: a share of all steps" in result.text) == (not given)


def test_steps_of_an_epoch_are_to_be_looked_at() -> None:
    result = imported(TORCHTUNE, max_steps_per_epoch=10, epochs=3)
    assert result.config["training_config"]["max_steps"] == 30
    assert looked_at(result, "max_steps_per_epoch")


def rows_at(path: str, count: int) -> str:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    Path(path).write_text("".join(json.dumps(row) + "\n" for _ in range(count)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("steps", "packed", "max_steps", "is_looked_at"),
    # 100 rows, of which 90 train in batches of 2 times 3: 15 steps an epoch.
    [(15, False, None, False), (14, False, 42, False), (15, True, None, False), (14, True, 42, True)],
)
def test_steps_of_an_epoch_are_counted_where_the_rows_are_at_hand(
    steps: int, packed: bool, max_steps: int | None, is_looked_at: bool
) -> None:
    rows = {
        "_component_": "torchtune.datasets.chat_dataset",
        "source": "json",
        "data_files": rows_at("rows.jsonl", 100),
        "conversation_column": "messages",
        "conversation_style": "openai",
        "packed": packed,
    }
    result = imported(
        TORCHTUNE,
        dataset=rows,
        max_steps_per_epoch=steps,
        epochs=3,
        batch_size=2,
        gradient_accumulation_steps=3,
    )
    assert result.config["training_config"].get("max_steps") == max_steps
    assert looked_at(result, "max_steps_per_epoch") == is_looked_at
    assert ("none ends early" in result.text) == (max_steps is None)


@pytest.mark.parametrize(
    ("given", "rows", "steps", "is_looked_at"),
    [
        ({}, 0, 0.03, True),
        ({"max_steps": 3000}, 0, 0.03, False),
        ({"max_steps": 4000}, 0, 100, False),
        ({"num_epochs": 1}, 20, 0.03, False),
        ({"num_epochs": 300}, 20, 100, False),
        ({"num_epochs": 300, "sample_packing": True}, 20, 0.03, True),
        ({"num_epochs": 300, "micro_batch_size": 2}, 20, 0.03, False),
    ],
)
def test_the_default_warmup_of_axolotl_has_an_end(
    given: dict[str, Any], rows: int, steps: float, is_looked_at: bool
) -> None:
    path = rows_at("rows.jsonl", rows) if rows else "owner/chats"
    result = imported(AXOLOTL, datasets=[{"path": path, "type": "chat_template"}], **given)
    assert result.config["training_config"]["warmup_steps"] == steps
    assert looked_at(result, "warmup_steps") == is_looked_at


@pytest.mark.parametrize(
    "betas", [[0.9], [0.9, 0.95, 0.99], [0.9, "much"], [0.9, True], "0.9, 0.95", 0.9, [0.9, 1]]
)
def test_betas_that_are_none_are_refused(betas: Any) -> None:
    with pytest.raises(ConfigError, match="betas"):
        imported(TORCHTUNE, optimizer={"_component_": "torch.optim.AdamW", "betas": betas})


def test_betas() -> None:
    given = {"_component_": "torch.optim.AdamW", "betas": [0.8, "0.9"]}
    training = imported(TORCHTUNE, optimizer=given).config["training_config"]
    assert training["adam_beta1"] == 0.8 and training["adam_beta2"] == 0.9


@pytest.mark.parametrize(
    "section",
    [
        {"teacher_model": {"_component_": "torchtune.models.llama3_1.llama3_1_8b"}},
        {"kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"}},
        {"quantizer": {"_component_": "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer"}},
        {"ref_checkpointer": {"checkpoint_dir": "m"}},
    ],
)
def test_other_recipes_of_torchtune_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="of a recipe that"):
        imported(TORCHTUNE, **section)


@pytest.mark.parametrize("base", [LLAMAFACTORY, AXOLOTL])
def test_arguments_of_transformers_are_what_they_are_in_a_run(base: dict[str, Any]) -> None:
    given = {"label_smoothing_factor": 0.1, "logging_first_step": True, "dataloader_drop_last": True}
    result = imported(
        base,
        **given,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        pad_to_multiple_of=8,
    )
    training = result.config["training_config"]
    assert {key: training[key] for key in given} == given
    assert [note.partition(":")[0] for note in result.notes if "warmup" not in note] == ["pad_to_multiple_of"]


@pytest.mark.parametrize(
    ("text", "split", "limit"),
    [("train", None, None), ("test", "test", None), ("train[:9]", None, 9), ("a.b[:3]", "a.b", 3)],
)
def test_a_split_and_the_first_rows_of_it(text: str, split: str | None, limit: int | None) -> None:
    kept = {key: value for key, value in (("split", split), ("limit", limit)) if value}
    rows = {**TORCHTUNE["dataset"], "split": text}
    given = {"path": "owner/chats", "type": "chat_template", "split": text}
    for result in (imported(TORCHTUNE, dataset=rows), imported(AXOLOTL, datasets=[given])):
        (file,) = result.config["data"]["files"]
        assert {key: file[key] for key in ("split", "limit") if key in file} == kept
        assert not any("split" in note for note in result.notes)


@pytest.mark.parametrize("text", ["train[10:]", "train[:10%]", "train+test", "train[:0]", "train[", "[:3]"])
def test_other_slices_are_to_be_looked_at(text: str) -> None:
    result = imported(TORCHTUNE, dataset={**TORCHTUNE["dataset"], "split": text})
    assert looked_at(result, "dataset.split") and "split" not in result.config["data"]["files"][0]


def test_the_smaller_of_two_limits_counts() -> None:
    info = {"d": {"hf_hub_url": "owner/chats", "num_samples": 50}}
    Path("sets.json").write_text(json.dumps(info), encoding="utf-8")
    for most, limit in ((10, 10), (90, 50)):
        given = {**LLAMAFACTORY, "dataset": "d", "dataset_dir": ".", "max_samples": most}
        Path("given.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
        files = import_config("given.yaml", dataset_info="sets.json").config["data"]["files"]
        assert files[0]["limit"] == limit


def test_held_out_rows_of_torchtune() -> None:
    held_out = {"_component_": "torchtune.datasets.chat_dataset", "source": "owner/held", "split": "test"}
    result = imported(TORCHTUNE, dataset_val=held_out, run_val_every_n_steps=7, batch_size_val=3)
    assert result.config["data"]["eval"] == [
        {"path": "owner/held", "format": "conversations", "split": "test"}
    ]
    assert "eval_size" not in result.config["data"] and "would train on all rows" not in result.text
    training = result.config["training_config"]
    assert training["eval_steps"] == 7 and training["per_device_eval_batch_size"] == 3


@pytest.mark.parametrize("seed", [9007199254740993, "9007199254740993"])
def test_whole_numbers_stay_as_they_are(seed: Any) -> None:
    assert imported(AXOLOTL, seed=seed).config["training_config"]["seed"] == 9007199254740993
    assert imported(AXOLOTL, weight_decay=3).config["training_config"]["weight_decay"] == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("learning_rate", value) for value in (-1, -1e-4, True, "-1")),
        *(("lora_r", value) for value in (0, -3, True)),
        *(("num_epochs", value) for value in (0, -1, False)),
        *(
            ("seed", -1),
            ("lora_alpha", 0),
            ("lora_dropout", -0.1),
            ("micro_batch_size", 0),
            ("batch_size", -8),
            ("adam_beta1", 1),
            ("adam_beta2", 1.5),
            ("lora_dropout", 1),
        ),
        *(("sequence_len", 0), ("warmup_steps", -1), ("warmup_ratio", -0.1), ("eval_batch_size", 0)),
    ],
)
def test_numbers_without_a_meaning_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        imported(AXOLOTL, **{key: value})
    assert key in error.value.where and error.value.expected


def test_no_steps_at_most_is_no_number_of_steps() -> None:
    assert imported(AXOLOTL, max_steps=-1).config["training_config"]["max_steps"] == -1
    assert "max_steps" not in imported(AXOLOTL, max_steps=0).config["training_config"]


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        *((base, "no_such_setting", 3) for base in (AXOLOTL, TORCHTUNE, LLAMAFACTORY)),
        (LLAMAFACTORY, "default_system", "Be short."),
        (LLAMAFACTORY, "rope_scaling", "linear"),
        (LLAMAFACTORY, "mix_strategy", "interleave_under"),
        (LLAMAFACTORY, "interleave_probs", "0.3,0.7"),
        (LLAMAFACTORY, "disable_shuffling", True),
        (LLAMAFACTORY, "add_tokens", "<a>,<b>"),
        (AXOLOTL, "tokens", ["<a>"]),
        (AXOLOTL, "special_tokens", {"eos_token": "<end>"}),
        (AXOLOTL, "special_tokens", 1.5),
        (AXOLOTL, "default_system_message", "Be short."),
        (AXOLOTL, "chat_template_jinja", "{{ messages }}"),
        (AXOLOTL, "cosine_min_lr_ratio", 0.1),
        (AXOLOTL, "early_stopping_patience", 3),
        (AXOLOTL, "embedding_lr", 1e-5),
        (AXOLOTL, "overrides_of_model_config", {"rope_scaling": {"factor": 2}}),
        (AXOLOTL, "train_on_eos", "none"),
        (AXOLOTL, "curriculum_sampling", True),
        (TORCHTUNE, "shuffle", False),
    ],
)
def test_what_changes_the_training_or_is_not_known_is_to_be_looked_at(
    base: dict[str, Any], key: str, value: Any
) -> None:
    result = imported(base, **{key: value})
    assert looked_at(result, key)
    assert any(one.source == key for one in result.left_out)


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (LLAMAFACTORY, "overwrite_cache", True),
        (LLAMAFACTORY, "mix_strategy", "concat"),
        (LLAMAFACTORY, "resize_vocab", False),
        (AXOLOTL, "special_tokens", {"pad_token": "<pad>"}),
        (AXOLOTL, "deepspeed", "zero2.json"),
        (TORCHTUNE, "device", "cuda"),
        (TORCHTUNE, "shuffle", True),
    ],
)
def test_what_is_harmless_is_left_out_alone(base: dict[str, Any], key: str, value: Any) -> None:
    result = imported(base, **{key: value})
    assert not looked_at(result, key) and any(one.source == key for one in result.left_out)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("dataset", "new_system_prompt", "Be short."),
        ("dataset", "prompt_template", "torchtune.data.QuestionAnswerTemplate"),
        ("dataset", "column_map.input", "q"),
        ("tokenizer", "prompt_template", "torchtune.data.QuestionAnswerTemplate"),
        ("tokenizer", "prompt_template.user", ["[", "]"]),
        ("lr_scheduler", "num_cycles", 0.25),
    ],
)
def test_sections_of_torchtune_too(section: str, key: str, value: Any) -> None:
    outer, _, inner = key.partition(".")
    given = {**TORCHTUNE.get(section, {}), outer: {inner: value} if inner else value}
    result = imported(TORCHTUNE, **{section: given})
    assert looked_at(result, f"{section}.{key}")
    assert all("that is so here anyway" not in one.why for one in result.left_out if one.source.endswith(key))


@pytest.mark.parametrize(
    ("base", "given", "says"),
    [
        *(
            (AXOLOTL, {"datasets": [{"path": "a/b", "type": "chat_template", key: value}]}, key)
            for key, value in (
                ("message_property_mappings", ["role"]),
                ("message_property_mappings", "role"),
                ("roles", "user"),
            )
        ),
        (AXOLOTL, {"test_datasets": "owner/held"}, "test_datasets"),
        (TORCHTUNE, {"dataset": "torchtune.datasets.alpaca_dataset"}, "`torchtune.datasets.alpaca_dataset`"),
    ],
)
def test_values_of_another_kind_are_one_message(
    base: dict[str, Any], given: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        imported(base, **given)
    assert error.value.expected


def test_both_trackers_of_axolotl() -> None:
    config = imported(AXOLOTL, wandb_project="p", use_tensorboard=True).config["training_config"]
    assert config["report_to"] == ["wandb", "tensorboard"] and config["project"] == "p"
    assert imported(AXOLOTL, use_tensorboard=True).config["training_config"]["report_to"] == "tensorboard"


def test_settings_of_a_data_set_of_axolotl_too() -> None:
    rows = {
        "path": "owner/chats",
        "type": "chat_template",
        "train_on_eos": "turn",
        "drop_system_message": True,
    }
    result = imported(AXOLOTL, datasets=[rows])
    assert looked_at(result, "datasets[0].drop_system_message")
    assert not looked_at(result, "datasets[0].train_on_eos")


def test_other_names_of_what_phlora_has() -> None:
    config = imported(AXOLOTL, noisy_embedding_alpha=5).config
    assert config["training_config"]["neftune_noise_alpha"] == 5
    config = imported(LLAMAFACTORY, use_dft_loss=True).config
    assert config["training_config"]["loss_type"] == "dft"


SHAREGPT = {"file_name": "c.jsonl", "formatting": "sharegpt"}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        *(({**SHAREGPT, "tags": odd}, "tags") for odd in (7, "role", ["role"], {"role_tag": 3})),
        *(({**SHAREGPT, "columns": odd}, "columns") for odd in (7, ["a"], {"messages": [1]}, {"system": {}})),
        *(({**SHAREGPT, "num_samples": odd}, "num_samples") for odd in (-5, "many", 1.5, True)),
        *(({**SHAREGPT, "formatting": odd}, "formatting") for odd in ([1], {"a": 1}, True, "odd")),
        *(({"file_name": odd}, "file_name") for odd in (5, ["c.jsonl"], True)),
        ({"hf_hub_url": 5}, "hf_hub_url"),
        ({**SHAREGPT, "split": ["a"]}, "split"),
        ({**SHAREGPT, "ranking": "maybe"}, "ranking"),
        (None, "a mapping with file_name"),
        (5, "a mapping with file_name"),
        ([SHAREGPT], "a mapping with file_name"),
    ],
)
def test_odd_entries_of_a_table_of_data_sets_are_one_message(entry: Any, says: str) -> None:
    Path("given.yaml").write_text(yaml.safe_dump({**LLAMAFACTORY, "dataset": "d"}).replace("ONLINE", "."))
    Path("sets.info").write_text(json.dumps({"d": entry}), encoding="utf-8")
    done = invoke("import-config", "given.yaml", "--dataset-info", "sets.info")
    assert done.code == 2 and says in done.err and "sets.info" in done.err, done.err
    assert "did you mean `d`" not in done.err


@pytest.mark.parametrize(
    "given",
    [
        {"base_model": "https://user:s3cret@hub.example/m"},
        {"base_model": "hf_s3cret/m"},
        {"output_dir": "s3://KEY:s3cret@bucket/x"},
        {"datasets": [{"path": "https://u:s3cret@host/c.jsonl?token=s3cret", "type": "chat_template"}]},
        {"datasets": [{"path": "https://host/c.jsonl?sig=s3cret", "type": "chat_template"}]},
        {"wandb_project": "p", "wandb_run_id": "hf_s3cret"},
        {"hub_model_id": "hf_s3cret"},
        {"mlflow_tracking_uri": "https://u:s3cret@host"},
        {"pwd": "s3cret", "authorization": "s3cret", "cookie": "s3cret", "sas_url": "s3cret"},
        {"deepspeed": {"auth": {"bearer": "s3cret", "passwd": "s3cret", "list": ["hf_s3cret"]}}},
    ],
)
def test_what_opens_a_door_is_not_written(given: dict[str, Any]) -> None:
    result = imported(AXOLOTL, **given)
    everything = result.text + json.dumps(result.to_json())
    assert "s3cret" not in everything and "not shown" in everything
    assert yaml.safe_load(result.text) == result.config


def test_a_folder_may_be_called_as_tokens_begin() -> None:
    Path("hf_models/phi").mkdir(parents=True)
    rows = rows_at("hf_rows.jsonl", 2)
    given = {"base_model": "hf_models/phi", "datasets": [{"path": rows, "type": "chat_template"}]}
    config = imported(AXOLOTL, **given, output_dir="hf_out/a").config
    assert config["model"]["name"] == "hf_models/phi" and config["output"] == "hf_out/a"
    assert config["data"]["files"][0]["path"] == rows
    result = imported(AXOLOTL, base_model="hf_gone/phi", output_dir="hf_0123456789abcdefghij")
    assert result.config["model"]["name"] == "(not shown)" and "./hf_" in result.text
    assert "0123456789" not in result.text


def test_nor_said_in_an_error() -> None:
    with pytest.raises(ConfigError) as error:
        imported(AXOLOTL, learning_rate="hf_s3cret")
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize("name", ["${nope}/m", "${oc.env:HOME}", "${output_dir}"])
def test_references_to_nothing_are_to_be_looked_at(name: str) -> None:
    result = imported(TORCHTUNE, checkpointer={"checkpoint_dir": name}, output_dir="runs/a")
    assert looked_at(result, "checkpointer.checkpoint_dir") == (name != "${output_dir}")
