"""Subclasses of a script with the signatures of 2024: they run, and their losses are those of the optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from torch import nn

import phlora
from phlora.dropin.layout import choose
from phlora.errors import ConfigError
from phlora.testing import tiny_phi3

# Micro-batches with unlike numbers of trained tokens.
ROWS = Dataset.from_list(
    [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (3, 20)]
)


class Passing(phlora.SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        return super().compute_loss(model, inputs, return_outputs)

    def log(self, logs: dict[str, float]) -> None:
        super().log(logs)

    def _get_train_sampler(self) -> Any:
        return super()._get_train_sampler()


class Halving(Passing):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        return super().compute_loss(model, inputs) / 2


class Today(phlora.SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs)


class Keeping(phlora.SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, return_outputs)


class Mean(phlora.SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        loss = nn.functional.cross_entropy(outputs.logits[0, :-1], inputs["labels"][0, 1:])
        return (loss, outputs) if return_outputs else loss


@pytest.fixture(scope="module")
def weights() -> Any:
    return tiny_phi3()[0].state_dict()


def step(kind: Any, weights: Any, tokenizer: Any, folder: Path) -> tuple[Any, torch.Tensor]:
    """One step of SGD over two micro-batches, and what it has added to the weights of the head."""
    model = tiny_phi3()[0]
    model.load_state_dict(weights)
    args = phlora.SFTConfig(
        str(folder), max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=1, logging_steps=1,
        max_grad_norm=0, lr_scheduler_type="constant", save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = kind(
        model, args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tokenizer,
        optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
    )  # fmt: skip
    trainer.train()
    return trainer, model.lm_head.weight.detach() - weights["lm_head.weight"]


def test_a_loss_that_passes_on_is_that_of_the_step(
    weights: Any, tokenizer: Any, tmp_path: Path, told: Any
) -> None:
    plain, expected = step(phlora.SFTTrainer, weights, tokenizer, tmp_path)
    passing, moved = step(Passing, weights, tokenizer, tmp_path)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-7)
    losses = [trainer.state.log_history[0]["loss"] for trainer in (plain, passing)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert told().count("Passing.compute_loss does not take num_items_in_batch") == 1
    assert passing.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    # Through two of them, and through one that takes the number.
    torch.testing.assert_close(
        step(Halving, weights, tokenizer, tmp_path)[1], expected / 2, rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(step(Today, weights, tokenizer, tmp_path)[1], expected, rtol=1e-5, atol=1e-7)


def test_a_loss_of_its_own_is_the_mean_over_micro_batches(
    weights: Any, tokenizer: Any, tmp_path: Path
) -> None:
    trainer, moved = step(Mean, weights, tokenizer, tmp_path)
    model = tiny_phi3()[0]
    model.load_state_dict(weights)
    for row in ROWS:
        ids = torch.tensor([row["input_ids"]])
        (nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]) / len(ROWS)).backward()
    torch.testing.assert_close(moved, -model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    assert "compute_loss of its own" in choose(trainer).sharing.reason


class EarlyStep(phlora.SFTTrainer):
    def training_step(self, model: Any, inputs: Any) -> Any:
        return super().training_step(model, inputs)


def test_a_step_that_does_not_take_the_number_is_refused(
    weights: Any, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="EarlyStep.training_step does not take num_items_in_batch"):
        step(EarlyStep, weights, tokenizer, tmp_path)


def test_a_number_that_is_taken_and_not_passed_on_is_told(
    weights: Any, tokenizer: Any, tmp_path: Path, told: Any
) -> None:
    trainer, _ = step(Keeping, weights, tokenizer, tmp_path)
    said = "Keeping.compute_loss does not pass num_items_in_batch on"
    assert told().count(said) == 1 and "the 2 of a step" in told()
    trainer.evaluate()
    step(Today, weights, tokenizer, tmp_path)
    step(Passing, weights, tokenizer, tmp_path)
    assert told().count("does not pass num_items_in_batch on") == 1


@pytest.mark.parametrize(("kind", "may_be"), [(phlora.SFTTrainer, True), (Passing, False), (Today, False)])
def test_a_batch_is_cut_only_where_its_loss_is_known_to_be_a_sum(
    weights: Any, tokenizer: Any, tmp_path: Path, kind: Any, may_be: bool
) -> None:
    assert step(kind, weights, tokenizer, tmp_path)[0]._may_be_cut is may_be


HELD_OUT = Dataset.from_list(
    [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (4, 30, 9)]
)


def doubling(base: type) -> type:
    class Doubling(base):  # type: ignore[valid-type,misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(model, inputs, *args, **kwargs)

    return Doubling


def penalised(base: type) -> type:
    """A penalty that no decorator of a library's hides."""

    class Penalised(base):  # type: ignore[valid-type,misc]
        @torch.autocast("cpu", enabled=False)
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return loss + 0.1 * inputs["input_ids"].shape[1]

    return Penalised


def predicting(base: type) -> type:
    class Predicting(base):  # type: ignore[valid-type,misc]
        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            loss, *others = super().prediction_step(*args, **kwargs)
            return (loss + 3, *others)

    return Predicting


def halved_on_the_trainer(base: type) -> Any:
    def make(*args: Any, **kwargs: Any) -> Any:
        trainer = base(*args, **kwargs)
        whole = trainer.compute_loss
        trainer.compute_loss = lambda *given, **named: whole(*given, **named) / 2
        return trainer

    return make


@pytest.mark.parametrize("changed", [doubling, penalised, predicting, halved_on_the_trainer])
def test_the_held_out_loss_is_the_scripts_own(
    weights: Any, tokenizer: Any, tmp_path: Path, told: Any, changed: Any
) -> None:
    def held_out(kind: Any) -> dict[str, float]:
        model = tiny_phi3()[0]
        model.load_state_dict(weights)
        args = trl.SFTConfig(
            str(tmp_path), per_device_eval_batch_size=2, report_to="none", use_cpu=True, bf16=False
        )
        trainer = kind(
            model, args, train_dataset=ROWS, eval_dataset={"one": HELD_OUT, "two": ROWS},
            processing_class=tokenizer,
        )  # fmt: skip
        return {name: value for name, value in trainer.evaluate().items() if name.endswith("_loss")}

    expected = held_out(changed(trl.SFTTrainer))
    assert held_out(changed(phlora.SFTTrainer)) == pytest.approx(expected, rel=1e-5)
    assert told().count("mean over batches, as in TRL") == 1
