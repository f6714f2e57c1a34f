"""LoRA+: every B learns at a multiple of the learning rate, whatever the optimizer, the layer and the schedule."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from torch import Tensor, nn

from phlora import SFTTrainer
from phlora.adapters.attach import attach, lora_settings
from phlora.data.collate import Collator
from phlora.display import Display
from phlora.errors import ConfigError, RunError
from phlora.testing import quiet_config, tiny_phi3
from phlora.train.arguments import training_arguments
from phlora.train.finetune import finetune
from phlora.train.optimizer import is_lora_B, raise_rate_of_B, take_loraplus

ROWS = [{"input_ids": list(range(5, 25)), "labels": [-100] * 10 + list(range(15, 25))} for _ in range(8)]
# Row blocks, whole weights, and an embedding; weights kept beside the adapter are neither A nor B.
TARGETS = ["q_proj", "v_proj", "o_proj", "embed_tokens"]


def trainer_for(folder: Path, ratio: float | None, **settings: Any) -> SFTTrainer:
    model, tokenizer = tiny_phi3()
    torch.manual_seed(0)
    peft_config = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False}
    adapted = attach(model, {**peft_config, "modules_to_save": ["norm"]}).model
    # PEFT would warn that it saves the embedding whole, too.
    adapted.save_pretrained = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    args = quiet_config(folder, remove_unused_columns=False, **{**steps, "max_length": None, **settings})
    return SFTTrainer(
        model=adapted,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id),
        loraplus_lr_ratio=ratio,
    )


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def moves(folder: Path, ratio: float | None, **settings: Any) -> dict[str, Tensor]:
    """What one step of plain gradient descent does to every trained parameter."""
    trainer = trainer_for(
        folder, ratio, optim="sgd", lr_scheduler_type="constant", learning_rate=0.1, max_steps=1, **settings
    )
    before = trained(trainer.model)
    trainer.train()
    return {name: after - before[name] for name, after in trained(trainer.model).items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_every_B_moves_ratio_times_as_far_and_nothing_else_does(tmp_path: Path, weight_decay: float) -> None:
    plain, raised = (moves(tmp_path, ratio, weight_decay=weight_decay) for ratio in (None, 4.0))
    assert plain.keys() == raised.keys()
    ups = {name for name in plain if is_lora_B(name)}
    kinds = {name.partition("lora_")[2].partition(".")[0] for name in ups}
    assert kinds == {"B", "embedding_B"} and any("weight_q_proj" in name for name in ups)
    assert any("modules_to_save" in name for name in plain.keys() - ups)
    for name, move in plain.items():
        assert move.abs().max() > 0, name
        factor = 4 if name in ups else 1
        # A move is the difference of two fp32 weights of about 1.
        torch.testing.assert_close(raised[name], factor * move, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_the_schedule_scales_both_rates_and_logs_that_of_A(tmp_path: Path, optim: str) -> None:
    settings = {"optim": optim, "lr_scheduler_type": "linear", "learning_rate": 0.1, "weight_decay": 0.5}
    trainer = trainer_for(tmp_path, 4.0, save_strategy="no", **settings)
    seen = []

    class Watch(trl.trainer.sft_trainer.TrainerCallback):
        def on_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])

    trainer.add_callback(Watch())
    trainer.train()
    for step, groups in enumerate(seen):
        rate = 0.1 * (1 - step / 4)
        expected = [(rate, 0.5), (rate, 0.0), (4 * rate, 0.5)]
        assert [pytest.approx(group) for group in expected] == groups
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    whole = trainer_for(tmp_path / "whole", 16.0, learning_rate=1e-3)
    whole.train()
    half = trainer_for(tmp_path / "half", 16.0, learning_rate=1e-3)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = trained(whole.model)
    for name, weight in trained(half.model).items():
        assert torch.equal(weight, expected[name]), name
    plain = trainer_for(tmp_path / "plain", None, learning_rate=1e-3)
    plain.train()
    assert any(not torch.equal(weight, expected[name]) for name, weight in trained(plain.model).items())


def test_training_on_does_not_raise_the_rate_again(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, 4.0, max_steps=1, learning_rate=0.1, lr_scheduler_type="constant")
    trainer.train()
    trainer.create_optimizer()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.1, 0.4}


def test_a_ratio_that_could_have_no_effect_is_refused(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, None)
    with pytest.raises(ConfigError, match="An optimizer was given"):
        SFTTrainer(
            model=trainer.model,
            args=trainer.args,
            train_dataset=trainer.train_dataset,
            processing_class=trainer.processing_class,
            optimizers=(torch.optim.SGD(trainer.model.parameters(), lr=0.1), None),
            loraplus_lr_ratio=4.0,
        )
    layer = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="no lora_B"):
        raise_rate_of_B(torch.optim.SGD(layer.parameters(), lr=0.1), layer, 4.0)


# -------------------------------------------------------------------------------------------------- whole runs


def run_it(model_folder: Path, output: Path, ratio: Any, **changes: Any) -> Any:
    rows = [{"question": f"say {i}", "answer": f"xin chào {i}"} for i in range(12)]
    arguments: dict[str, Any] = dict(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu"},
        data=rows,
        training_config={"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2},
        peft_config={"r": 4, "target_modules": TARGETS[:3]}
        | ({} if ratio is None else {"loraplus_lr_ratio": ratio}),
        evaluation={"enabled": False},
        output=output,
        display=Display(quiet=True),
    )
    return finetune(**{**arguments, **changes})


def test_a_run_shows_the_ratio_trains_with_it_and_continues_with_no_other(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_it(model_folder, tmp_path / "run", 16, display=Display())
    assert "LoRA+: learning rate 0.001, for lora_B 0.016" in capsys.readouterr().err
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert facts["identity"]["peft_config.loraplus_lr_ratio"] == 16
    assert "loraplus_lr_ratio: 16" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    adapter = json.loads((tmp_path / "run" / "adapter" / "best" / "adapter_config.json").read_text())
    assert "loraplus_lr_ratio" not in adapter
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["initial_lr"] for group in groups} == {1e-3, 16e-3}
    for other in (None, 8):
        with pytest.raises(RunError, match="loraplus_lr_ratio: 16.0 -> "):
            run_it(model_folder, tmp_path / "run", other, resume=True)
    run_it(model_folder, tmp_path / "run", 16, resume=True)


@pytest.mark.parametrize("ratio", [0, -1, True, "fast", float("inf"), float("nan")])
def test_a_ratio_that_is_none_is_an_error(ratio: Any) -> None:
    with pytest.raises(ConfigError, match="(?s)peft_config.loraplus_lr_ratio.*above 0"):
        take_loraplus({"loraplus_lr_ratio": ratio})


def test_a_ratio_with_a_wrong_name_or_in_the_wrong_place_is_led_to_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean `loraplus_lr_ratio`"):
        lora_settings({"loraplus_ratio": 16}, also_known=("loraplus_lr_ratio",))
    with pytest.raises(ConfigError, match="(?s)cannot be set here.*peft_config"):
        training_arguments({"loraplus_lr_ratio": 16}, output_dir=tmp_path)


@pytest.mark.parametrize(
    ("settings", "where", "says"),
    [
        ({"adam_beta1": 1.0}, "adam_beta1", "from 0 to below 1"),
        ({"adam_beta2": -0.5}, "adam_beta2", "from 0 to below 1"),
        ({"adam_epsilon": -1e-8}, "adam_epsilon", "from 0 to 1"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "lr_scheduler_kwargs", "a mapping with num_cycles"),
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_cycles": 2}},
            "lr_scheduler_kwargs",
            "",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 9.0}},
            "lr_scheduler_kwargs",
            "9.0",
        ),
        ({"optim": "adafactor", "optim_args": "evil"}, "optim_args", "key=value"),
    ],
)
def test_a_setting_that_cannot_be_used_is_blamed_itself(
    settings: dict[str, Any], where: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        training_arguments(settings, output_dir=tmp_path)
    assert error.value.where == f"training_config.{where}" and says in str(error.value)
    assert "OptimizerNames" not in str(error.value) and "SchedulerType" not in str(error.value)


def test_settings_that_an_optimizer_does_not_read_are_told(tmp_path: Path) -> None:
    settings = {"optim_args": "momentum=0.9", "optim_target_modules": ["q_proj"]}
    notes = training_arguments(settings, output_dir=tmp_path).notes
    for name in settings:
        assert any(f"{name} changes nothing with optim: adamw_torch" in note for note in notes)
