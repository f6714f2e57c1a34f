"""What a script's trainer takes to be exact for it, what it says of that, and that it leaves nothing behind."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, XLoraConfig
from torch import nn
from transformers import TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import phlora
from phlora.dropin import obstacles
from phlora.dropin.layout import choose, decide_held_out, longest_of, rows_of, some_sequences
from phlora.errors import ConfigError
from phlora.lora import matmul
from phlora.testing import quiet_config, tiny_phi3

START = list(range(20, 44))


def rows(number: int = 16) -> Dataset:
    ids = [[*START, 50 + i % 9, 60, 61 + i % 3] for i in range(number)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 8 + row[8:] for row in ids]})


def trainer_on(
    folder: Path,
    data: Any = None,
    *,
    kind: type = phlora.SFTTrainer,
    model: Any = None,
    lora: Any = None,
    speed: Any = "auto",
    given: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    tiny, tokenizer = tiny_phi3()
    settings = dict(max_steps=2, per_device_train_batch_size=4, max_length=None)
    args = quiet_config(folder, **{**settings, **changes})
    return kind(
        model=tiny if model is None else model,
        args=args,
        train_dataset=rows() if data is None else data,
        peft_config=lora or LoraConfig(r=4, target_modules="all-linear"),
        processing_class=tokenizer,
        speed=speed,
        **(given or {}),
    )


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "phlora.dropin")


def speed_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if line.startswith("speed=")]


def said(caplog: pytest.LogCaptureFixture) -> str:
    lines = speed_lines(caplog)
    assert len(lines) == 1, lines
    return lines[0]


def test_one_line_says_what_was_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_on(tmp_path)
    assert not speed_lines(caplog)
    trainer.train()
    line = said(caplog)
    assert line.startswith("speed=auto: shared prefixes on: ") and "2 gated MLPs" in line
    trainer.train()
    trainer.evaluate(rows(4))
    assert said(caplog) == line


def test_speed_is_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="speed is 'fast'"):
        trainer_on(tmp_path, speed="fast")


class Watching(TrainerCallback):
    """What the layers are while a step is taken."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.kinds = model, set()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.kinds |= {type(module).__name__ for module in self.model.modules()}


def state_of(model: Any) -> Any:
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return (
        [(type(module), sorted(vars(module))) for module in model.modules()],
        [config._attn_implementation for config in configs],
        [config.to_dict() for config in configs],
        matmul.libraries(),
        matmul._onednn_allowed,
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
    )


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
@pytest.mark.parametrize("ends", ["well", "with an error"])
@pytest.mark.parametrize("speed", ["auto", "reference"])
def test_nothing_is_left_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speed: Any, ends: str
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("phlora.models.lean_layers.keep_freed_memory", lambda: kept.append(True) or True)
    monkeypatch.setattr("phlora.adapters.speed.return_freed_memory", lambda: kept.append(False))
    matmul.use_libraries({"forward": matmul.Library.BLAS.value})
    trainer = trainer_on(tmp_path, speed=speed)
    watching = Watching(trainer.model)
    trainer.add_callback(watching)
    if ends != "well":
        trainer.add_callback(Stopping())
    collator, before = trainer.data_collator, state_of(trainer.model)
    try:
        trainer.train()
        assert ends == "well"
    except ZeroDivisionError:
        assert ends != "well"
    trainer.evaluate(rows(4))
    trainer.predict(rows(4))
    assert state_of(trainer.model) == before
    assert trainer.data_collator is collator
    assert ("LeanMLP" in watching.kinds) == (speed == "auto")
    assert kept == ([True, False] * 3 if speed == "auto" else [])
    matmul.use_libraries(dict.fromkeys(matmul.Kind, matmul.Library.ONEDNN.value))


class Stopping(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError


def test_what_a_script_has_made_fast_itself_stays_so(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path)
    phlora.speed_up(trainer.model)
    before = [type(module).__name__ for module in trainer.model.modules()]
    assert "LeanMLP" in before
    trainer.train()
    assert [type(module).__name__ for module in trainer.model.modules()] == before
    trainer.speed = "reference"
    trainer.evaluate(rows(4))
    assert [type(module).__name__ for module in trainer.model.modules()] == before
    phlora.speed_up(trainer.model)
    trainer.train()


def test_the_random_state_is_that_of_trl(tmp_path: Path) -> None:
    drawn = []
    for speed in ("auto", "reference"):
        trainer = trainer_on(tmp_path, speed=speed)
        torch.manual_seed(5)
        trainer.train()
        trainer.evaluate(rows(4))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_batches_outside_of_training_are_those_of_trl(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"} and len(batch["input_ids"]) == 4


class OwnLoss(phlora.SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **given: Any) -> Any:
        assert len(inputs["input_ids"]) == 4
        return super().compute_loss(model, inputs, return_outputs, **given)


class OwnLoader(phlora.SFTTrainer):
    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        assert len(next(iter(loader))["input_ids"]) == 4
        return loader


class OwnOptimizer(phlora.SFTTrainer):
    def create_optimizer(self, *args: Any) -> Any:
        return super().create_optimizer(*args)


def own_collator(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    assert len(features) in (1, 4)
    return DataCollatorForLanguageModeling(pad_token_id=0)(features)


class OwnCollator(DataCollatorForLanguageModeling):
    pass


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


@pytest.mark.filterwarnings("ignore:`compute_loss_func`:FutureWarning")
@pytest.mark.parametrize(
    ("reason", "asked"),
    [
        ("OwnLoss has a compute_loss of its own", {"kind": OwnLoss}),
        ("OwnLoader has a get_train_dataloader of its own", {"kind": OwnLoader}),
        ("data_collator is a own_collator", {"given": {"data_collator": own_collator}}),
        ("data_collator is a OwnCollator", {"given": {"data_collator": OwnCollator(0)}}),
        ("compute_loss_func needs the logits", {"given": {"compute_loss_func": mean_loss}}),
        ("loss_type dft needs the logits", {"loss_type": "dft"}),
        ("neftune_noise_alpha is set", {"neftune_noise_alpha": 5.0}),
        (
            "drops 0.1: rows would share one random mask",
            {"lora": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)},
        ),
        ("include_num_input_tokens_seen counts", {"include_num_input_tokens_seen": "all"}),
        ("split_batches would cut", {"accelerator_config": {"split_batches": True}}),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_needs_whole_rows_gets_them_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reason: str, asked: dict[str, Any]
) -> None:
    trainer = trainer_on(tmp_path, **asked)
    trainer.train()
    line = said(caplog)
    assert f"shared prefixes off: {reason}" in line or ("shared prefixes off: " in line and reason in line), (
        line
    )
    assert "2 gated MLPs" in line


def test_what_concerns_no_batch_turns_nothing_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {"data_collator": DataCollatorForLanguageModeling(0), "callbacks": [TrainerCallback()]}
    trainer = trainer_on(tmp_path, kind=OwnOptimizer, given=given)
    trainer.train()
    assert "shared prefixes on" in said(caplog)


def test_a_method_that_was_put_on_the_trainer_counts_as_its_own(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path)
    plain = trainer.compute_loss
    trainer.compute_loss = types.MethodType(lambda self, *args, **given: plain(*args, **given), trainer)
    assert "compute_loss of its own" in choose(trainer).sharing.reason


def stream() -> Iterator[dict[str, Any]]:
    yield from rows()


def test_rows_of_which_nothing_is_known_are_trained_as_they_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_on(tmp_path, IterableDataset.from_generator(stream)).train()
    assert "shared prefixes off: the rows are a stream" in said(caplog)
    made = rows().with_transform(lambda batch: batch)
    trainer = trainer_on(tmp_path, made, dataset_kwargs={"skip_prepare_dataset": True})
    assert choose(trainer).sharing.reason == "the rows are made as they are read"


def test_rows_that_are_changed_after_the_trainer_was_made_are_those_that_are_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `train_on_responses_only` and its kin do."""
    trainer = trainer_on(tmp_path)
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row: {"labels": [-100] * 26 + row["input_ids"][26:]}
    )
    trainer.data_collator = own_collator
    trainer.train()
    assert "data_collator is a own_collator" in said(caplog)
    assert trainer._sums["train"]["trained"] == 0 and trainer.state.log_history[0]["num_tokens"] == 4 * 27


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "before": lambda module, hook: module.register_forward_pre_hook(hook),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_in_the_model_sees_what_it_would_see_with_trl(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    seen = []
    trainer = trainer_on(tmp_path)
    layer = trainer.model.get_base_model().model.layers[1].mlp

    def hook(module: nn.Module, given: Any, *results: Any) -> None:
        seen.append(given[0].shape)

    HOOKS[kind](layer, hook)
    trainer.train()
    assert seen == [(4, 27, 64)] * 2
    line = said(caplog)
    assert "shared prefixes off: a hook on base_model.model.model.layers.1.mlp" in line
    assert "layers as they are: a hook on" in line


def test_a_hook_on_the_whole_model_sees_whole_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = []
    trainer = trainer_on(tmp_path)
    trainer.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    trainer.train()
    assert seen == [(4, 27)] * 2
    assert "a hook on the model sees whole batches" in said(caplog) and "2 gated MLPs" in said(caplog)


class OwnMLP(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x - x.mean(1, keepdim=True))


def test_parts_of_the_scripts_own_are_left_alone(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path)
    layer = trainer.model.get_base_model().model.layers[0]
    layer.mlp = OwnMLP(layer.mlp)
    layout = choose(trainer)
    assert not layout.sharing.on and layout.why_plain is not None and "OwnMLP" in layout.why_plain
    trainer.train()
    layer.mlp = layer.mlp.inner
    assert choose(trainer).sharing.on
    layer.self_attn.forward = layer.self_attn.forward
    assert (
        choose(trainer).why_plain == "the forward of base_model.model.model.layers.0.self_attn was replaced"
    )


def test_adapters_that_see_more_than_a_position_share_nothing() -> None:
    model, _ = tiny_phi3()
    model.peft_config = {"default": XLoraConfig(adapters={"a": "b"}, hidden_size=64)}  # type: ignore[attr-defined]
    assert "adapter default is XLORA" in (obstacles.unknown_adapter(model) or "")
    model.peft_config = {"default": LoraConfig()}  # type: ignore[attr-defined]
    assert obstacles.unknown_adapter(model) is None


def test_held_out_rows_share_where_training_cannot(tmp_path: Path) -> None:
    lora, losses = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1), {}
    for speed in ("auto", "reference"):
        trainer = trainer_on(tmp_path, lora=lora, speed=speed)
        data = rows(8)
        assert not choose(trainer).sharing.on and decide_held_out(trainer, data).on == (speed == "auto")
        losses[speed] = trainer.evaluate(data)["eval_loss"]
    assert losses["auto"] == pytest.approx(losses["reference"], rel=1e-6)


def test_metrics_find_the_logits_of_whole_rows(tmp_path: Path) -> None:
    shapes = []

    def metrics(found: Any) -> dict[str, float]:
        shapes.append(found.predictions.shape[:2])
        return {"seen": 1.0}

    with pytest.warns(FutureWarning):
        trainer = trainer_on(tmp_path, given={"compute_metrics": metrics, "eval_dataset": rows(8)})
        trainer.train()
        assert trainer.num_positions < 2 * 4 * 27
        assert trainer.evaluate()["eval_seen"] == 1.0
    assert shapes == [(8, 27)]


def test_rows_are_those_that_trl_trains() -> None:
    pack = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, -100, 4, 5], "seq_lengths": [2, 3]}
    assert [(row.input_ids, row.labels) for row in rows_of(pack)] == [
        ([1, 2], [1, 2]),
        ([3, 4, 5], [-100, 4, 5]),
    ]
    alone = {"input_ids": torch.tensor([1, 2]), "weights": [0.5, 0.5]}
    (row,) = rows_of(alone)
    assert (row.input_ids, row.labels, row.weights) == ([1, 2], [1, 2], None)


def test_a_forecast_reads_a_part_of_the_rows() -> None:
    data = rows(5000)
    assert 1024 <= len(some_sequences(data, seed=0)) < 1200
    assert longest_of(data) == 27 and longest_of(data.shuffle(seed=0).select(range(3))) == 27
    assert longest_of(data.select([])) == 0 and some_sequences(data.select([]), seed=0) == []
