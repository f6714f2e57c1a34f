"""`finetune` with what a TRL script has in its hands: model objects, configurations, data sets, callbacks, metrics."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
import yaml
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
)

from phlora import finetune, load_config
from phlora.display import Display
from phlora.errors import ConfigError, ModelError, PhloraError, RunError
from phlora.train.arguments import DEFAULTS
from phlora.train.config_objects import NOT_FOLLOWED, plain_setting

ROWS = [{"question": f"what is {i}?", "answer": f"it is {i % 5}"} for i in range(20)]


def run_it(model: Any, output: Path, **changes: Any) -> Any:
    arguments: dict[str, Any] = dict(
        model=model
        if isinstance(model, nn.Module)
        else {"name": str(model), "dtype": "float32", "device": "cpu"},
        data=ROWS,
        training_config={"max_steps": 2, "learning_rate": 1e-2},
        peft_config={"r": 2},
        evaluation={"enabled": False},
        output=output,
        display=Display(quiet=True),
    )
    return finetune(**{**arguments, **changes})


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "adapter" / "last" / "adapter_model.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def plain(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_it(model_folder, tmp_path_factory.mktemp("runs") / "plain")


def test_rows_in_memory_are_kept_and_the_configuration_runs_again(plain: Any, tmp_path: Path) -> None:
    assert lines_of(plain.folder / "rows.jsonl") == ROWS
    config = load_config(plain.folder / "config.yaml", [f"output={tmp_path / 'again'}"])
    assert [file.path for file in config.data.files] == [str(plain.folder / "rows.jsonl")]
    assert_equal(last(finetune(config, display=Display(quiet=True))), last(plain))
    with pytest.raises(RunError, match="would be replaced"):
        finetune(load_config(plain.folder / "config.yaml"), overwrite=True, display=Display(quiet=True))
    assert (plain.folder / "rows.jsonl").is_file()


def test_rows_in_memory_can_be_resumed(plain: Any, model_folder: Path) -> None:
    before = last(plain)
    assert_equal(last(run_it(model_folder, plain.folder, resume=True)), before)


@pytest.mark.parametrize("kind", ["Dataset", "IterableDataset", "generator", "DatasetDict"])
def test_data_sets_train_as_their_rows_do(plain: Any, model_folder: Path, tmp_path: Path, kind: str) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    data = {
        "Dataset": rows,
        "IterableDataset": rows.to_iterable_dataset(),
        "generator": iter(ROWS),
        "DatasetDict": datasets.DatasetDict(train=rows),
    }[kind]
    assert_equal(last(run_it(model_folder, tmp_path / "run", data=data)), last(plain))


def test_a_dictionary_of_splits_brings_its_held_out_rows(model_folder: Path, tmp_path: Path) -> None:
    sets = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS[:16]), test=datasets.Dataset.from_list(ROWS[16:])
    )
    run = run_it(model_folder, tmp_path / "run", data=sets)
    assert run.plan.to_json()["train_rows"] == 16 and run.plan.to_json()["held_out_rows"] == 4
    assert len((run.folder / "eval_rows.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    with pytest.raises(ConfigError, match="none of them is `train`"):
        run_it(model_folder, tmp_path / "b", data={"a": sets["train"], "b": sets["test"]})
    with pytest.raises(ConfigError, match="dictionary of data sets"):
        run_it(model_folder, tmp_path / "b", eval_data={"a": sets["train"], "b": sets["test"]})


def test_configuration_objects_mean_what_their_dictionaries_mean(model_folder: Path, tmp_path: Path) -> None:
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, use_cpu=True, bf16=False
    )
    lora = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM")
    run = run_it(model_folder, None, training_config=args, peft_config=lora)  # type: ignore[arg-type]
    assert run.folder == tmp_path / "run"
    written = {"max_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "linear", "warmup_steps": 0}
    written |= {"max_length": 1024, "gradient_checkpointing": True, "eval_strategy": "no"}
    assert_equal(last(run), last(run_it(model_folder, tmp_path / "b", training_config=written)))
    assert "  max_steps: 2  # SFTConfig" in run.config_text and "  r: 2  # LoraConfig" in run.config_text


@pytest.mark.parametrize("kind", [trl.SFTConfig, TrainingArguments])
def test_an_object_is_followed_where_it_holds_its_librarys_defaults(
    kind: Any, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = kind(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2)
    lora = LoraConfig(target_modules={"v_proj", "q_proj"}, use_rslora=True)
    run = run_it(
        model_folder,
        tmp_path / "run",
        training_config=args,
        peft_config=lora,
        dry_run=True,
        display=Display(),
    )
    written = yaml.safe_load(run.config_text)["training_config"]
    # What the object says of checkpointing is said as `activation_memory`.
    followed = set(DEFAULTS) - {*NOT_FOLLOWED, "bf16", "gradient_checkpointing"}
    assert written["activation_memory"] == ("recompute" if args.gradient_checkpointing else "keep")
    if kind is TrainingArguments:
        followed.remove("max_length")
        assert written["max_length"] == DEFAULTS["max_length"][0]
    for name in {*followed, "per_device_train_batch_size", "per_device_eval_batch_size"}:
        value = getattr(args, name)
        assert written[name] == getattr(value, "value", value), name
    told = [
        line for line in capsys.readouterr().err.splitlines() if f"{kind.__name__}: it counts whole" in line
    ]
    assert len(told) == 1 and f"learning_rate {args.learning_rate} (here 0.0002)" in told[0]
    adapter = yaml.safe_load(run.config_text)["peft_config"]
    for name in set(adapter) - {"target_modules", "task_type"}:
        assert adapter[name] == plain_setting(getattr(lora, name)), name
    assert adapter["target_modules"] == ["q_proj", "v_proj"] and adapter["r"] == 8
    bare = finetune(model=str(model_folder), data=ROWS, output=tmp_path / "bare", dry_run=True)
    assert bare.config_text.count("# argument") == 3


def test_only_what_somebody_gave_is_marked_as_an_argument(model_folder: Path, tmp_path: Path) -> None:
    run = run_it(model_folder, tmp_path / "run", eval_data=ROWS[:2], dry_run=True)
    marked = [
        line.split(":")[0].strip() for line in run.config_text.splitlines() if line.endswith("# argument")
    ]
    given = [
        "name",
        "dtype",
        "device",
        "files",
        "eval",
        "enabled",
        "max_steps",
        "learning_rate",
        "r",
        "output",
    ]
    assert sorted(marked) == sorted(given)


def test_an_output_dir_that_gives_way_is_named(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 1, "output_dir": str(tmp_path / "other"), "group_by_length": True}
    run_it(model_folder, tmp_path / "run", training_config=settings, dry_run=True, display=Display())
    told = " ".join(capsys.readouterr().err.split())
    assert f"training_config.output_dir ({tmp_path / 'other'}) gives way to output" in told
    assert "group_by_length is now called train_sampling_strategy" in told and "no effect" not in told


def test_objects_of_another_kind_are_refused_by_their_name(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PrefixTuningConfig"):
        run_it(model_folder, tmp_path / "run", peft_config=PrefixTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="`training_config` is a `list`"):
        run_it(model_folder, tmp_path / "run", training_config=[1])
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    with pytest.raises(ModelError, match="carries an adapter already"):
        run_it(get_peft_model(base, LoraConfig(target_modules="all-linear")), tmp_path / "run")
    with pytest.raises(ModelError, match="Linear"):
        run_it(nn.Linear(2, 2), tmp_path / "run")


def test_a_model_object_carries_the_adapter_and_no_other_change(
    plain: Any, model_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    classes = {name: type(module) for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    generation = copy.deepcopy(model.generation_config.to_dict())
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    pad_token = tokenizer.pad_token
    run = run_it(model, tmp_path / "run", tokenizer=tokenizer)
    assert_equal(last(run), last(plain))
    assert run.model.get_base_model() is model
    changed = {name for name, value in model.config.to_dict().items() if config.get(name) != value}
    assert not changed
    assert model.config._attn_implementation == attention and model.generation_config.to_dict() == generation
    assert tokenizer.pad_token == pad_token
    for given, way in ((model, "unload"), (run.model, "merge_and_unload")):
        with pytest.raises(ModelError, match=rf"(?s)carries an adapter already.*{way}\(\)"):
            run_it(given, tmp_path / "again", tokenizer=tokenizer)
    bare = run.model.unload()
    assert bare is model and all(
        torch.equal(value, weights[name]) for name, value in bare.state_dict().items()
    )
    assert {name: type(module) for name, module in bare.named_modules()} == classes
    # Its name is known, so that the run can be evaluated and run again.
    assert load_config(run.folder / "config.yaml").model.name == str(model_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_config": {"use_liger_kernel": True}}, "Liger's kernels need CUDA"),
        ({"training_config": {"debug": "underflow_overflow"}}, "`debug` cannot be set here"),
        ({"peft_config": {"target_modules": ["qkv_proj", "lm_head"]}}, "modules_to_save"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    changes: dict[str, Any], message: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phlora.extras.is_installed", lambda module: module != "liger_kernel")
    with pytest.raises(PhloraError, match=message):
        run_it(model_folder, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_offloading_has_no_effect_where_there_is_nowhere_to_go(model_folder: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 1, "activation_offloading": True}
    run_it(model_folder, tmp_path / "run", training_config=settings)


def test_a_model_object_brings_its_tokenizer_by_its_name(model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    assert run_it(model, tmp_path / "run", dry_run=True).model is model
    model.config._name_or_path = ""
    with pytest.raises(ModelError, match="give it too|does not say where"):
        run_it(model, tmp_path / "run", dry_run=True)


def test_a_quantised_model_object_trains(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=nf4, device_map="cpu")
    run = run_it(model, tmp_path / "run")
    assert all(value.dtype == torch.float32 for value in last(run).values())
    assert any(value.any() for name, value in last(run).items() if "lora_B" in name)


def test_callbacks_hear_of_the_training_and_may_stop_it(model_folder: Path, tmp_path: Path) -> None:
    class StopAtOne(TrainerCallback):
        steps = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.steps = state.global_step
            control.should_training_stop = True

    stop = StopAtOne()
    run = run_it(model_folder, tmp_path / "run", callbacks=[stop])
    assert stop.steps == 1
    assert json.loads((run.folder / "adapter/last/phlora.json").read_text(encoding="utf-8"))["step"] == 1


def test_early_stopping_goes_by_the_held_out_loss(model_folder: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-12}
    early = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e-3)
    run = run_it(model_folder, tmp_path / "run", training_config=settings, callbacks=[early])
    assert json.loads((run.folder / "adapter/last/phlora.json").read_text(encoding="utf-8"))["step"] == 2


@pytest.mark.filterwarnings("ignore:`return_outputs:FutureWarning")
def test_compute_metrics_sees_the_logits_of_the_held_out_rows(model_folder: Path, tmp_path: Path) -> None:
    shapes = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"mine": 0.5}

    run = run_it(model_folder, tmp_path / "run", compute_metrics=compute_metrics)
    assert shapes and "compute_metrics" in run.plan.sharing.reason
    assert any(event.get("eval_mine") == 0.5 for event in lines_of(run.folder / "events.jsonl"))


def test_metrics_may_be_functions(model_folder: Path, tmp_path: Path) -> None:
    def starts_alike(answer: str, reference: str) -> float:
        return float(answer[:1] == reference[:1])

    evaluation = {"metrics": [starts_alike, "exact_match"], "max_answers": 2, "max_new_tokens": 2}
    run = run_it(model_folder, tmp_path / "run", evaluation=evaluation)
    assert {"starts_alike", "exact_match"} <= run.report.to_json()["base"].keys()


def test_the_switches_of_trl_decide_what_trains(plain: Any, model_folder: Path, tmp_path: Path) -> None:
    everything = run_it(
        model_folder,
        tmp_path / "all",
        training_config={"max_steps": 2, "assistant_only_loss": False},
        dry_run=True,
    )
    assert "  train_on: all  # training_config.assistant_only_loss" in everything.config_text
    assert everything.plan.to_json()["trained_tokens"] > plain.plan.to_json()["trained_tokens"]
    data = {"files": str(plain.folder / "rows.jsonl"), "train_on": "last"}
    with pytest.raises(ConfigError, match="contradict"):
        run_it(model_folder, tmp_path / "b", data=data, training_config={"completion_only_loss": False})
    run_it(
        model_folder, tmp_path / "b", data=data, training_config={"completion_only_loss": True}, dry_run=True
    )


def test_a_refused_resume_says_what_differs_in_plain_words(plain: Any, model_folder: Path) -> None:
    def refusal(**changes: Any) -> str:
        with pytest.raises(RunError) as error:
            run_it(model_folder, plain.folder, resume=True, **changes)
        return str(error.value)

    assert "training_config.learning_rate: 0.01 -> 0.02" in refusal(
        training_config={"max_steps": 2, "learning_rate": 2e-2}
    )
    text = refusal(peft_config={"r": 4, "use_rslora": True})
    assert "peft_config.r: 2 -> 4" in text and "peft_config.use_rslora: false -> true" in text
    assert "19 rows" in refusal(data=ROWS[:-1]) and "20 rows" in refusal(data=ROWS[:-1])
    assert "data.train_on: assistant -> all" in refusal(
        training_config={"max_steps": 2, "learning_rate": 1e-2, "assistant_only_loss": False}
    )
