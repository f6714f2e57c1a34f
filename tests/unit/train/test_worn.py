"""After `SFTTrainer` a model is what it was before, but for its weights; copies compute with their own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from phlora import SFTTrainer, at_speed
from phlora.data.collate import Collator
from phlora.errors import NonFiniteError
from phlora.testing import tiny_phi3

ROWS = [{"input_ids": list(range(5, 25)), "labels": [-100] * 10 + list(range(15, 25))} for _ in range(8)]
# What training changes by design: the mode, the weights, and two facts that TRL keeps on a model for its model card
# and for generation.
BY_DESIGN = {"training", "_parameters", "_buffers", "_modules", "config", "generation_config", "model_tags"}


def adapted(kind: str = "lora") -> Any:
    torch.manual_seed(0)
    model = tiny_phi3()[0]
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")) if kind == "lora" else model


def trainer_for(folder: Path, model: Any, **settings: Any) -> SFTTrainer:
    callbacks = settings.pop("callbacks", None)
    extra = {name: settings.pop(name) for name in ("peft_config", "compute_metrics") if name in settings}
    tokenizer = tiny_phi3()[1]
    values = dict(bf16=False, gradient_checkpointing=False, max_length=None, max_steps=2, report_to="none")
    values |= dict(use_cpu=True, remove_unused_columns=False, disable_tqdm=True, save_strategy="no")
    return SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(folder), **{**values, **settings}),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:2]),
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=callbacks,
        **extra,
    )


def state_of(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Class, hooks and every instance attribute of every module; dictionaries by their contents."""
    state: dict[tuple[str, str], Any] = {}
    for name, module in model.named_modules():
        state[name, "class"] = type(module)
        for key, value in module.__dict__.items():
            if key not in BY_DESIGN:
                state[name, key] = dict(value) if isinstance(value, dict) else value
    return state


def assert_same_state(model: nn.Module, before: dict[tuple[str, str], Any]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    assert not [key for key in before if not (after[key] is before[key] or after[key] == before[key])]


def answers(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None], use_cache=False).logits


# TRL announces that `predict` recomputes logits.
@pytest.mark.filterwarnings("ignore:`return_outputs:FutureWarning")
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"loss_type": "dft"},
        {"neftune_noise_alpha": 5},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_training_leaves_no_trace_on_the_model(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    model = adapted(kind)
    before = state_of(model)
    trainer = trainer_for(tmp_path, model, **settings)
    assert_same_state(model, before)
    for step in (
        trainer.train,
        trainer.evaluate,
        lambda: trainer.predict(trainer.eval_dataset),
        trainer.train,
    ):
        step()
        assert_same_state(model, before)
    assert torch.equal(answers(pickle.loads(pickle.dumps(model))), answers(model))


def test_a_copy_computes_with_its_own_weights(tmp_path: Path) -> None:
    model = adapted()
    trainer_for(tmp_path, model).train()
    before, twin = answers(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(answers(model), before)
    assert not answers(twin).any()


def test_a_copy_made_while_training_computes_with_its_own_weights(tmp_path: Path) -> None:
    class Average(TrainerCallback):
        twin: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if self.twin is None:
                self.twin = copy.deepcopy(model)
                self.expected = answers(model)
                model.train()

    average = Average()
    trainer_for(tmp_path, adapted(), callbacks=[average], learning_rate=1e-1, max_steps=3).train()
    assert torch.equal(answers(average.twin), average.expected)


def test_an_exception_in_training_leaves_no_trace(tmp_path: Path) -> None:
    model = adapted()
    before = state_of(model)
    trainer = trainer_for(tmp_path, model)
    with torch.no_grad():
        model.get_parameter(next(n for n, p in model.named_parameters() if p.requires_grad)).fill_(
            float("nan")
        )
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert_same_state(model, before)


def test_a_trainer_that_could_not_be_made_leaves_no_trace(tmp_path: Path) -> None:
    model = adapted()
    before = state_of(model)
    with pytest.raises(ValueError, match="peft_config"):
        trainer_for(tmp_path, model, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    assert_same_state(model, before)


def test_a_forward_and_hooks_of_the_callers_own_stay(tmp_path: Path) -> None:
    model = adapted("full")
    own = model.forward
    calls = []
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    model.enable_input_require_grads()
    before = state_of(model)
    trainer = trainer_for(tmp_path, model, gradient_checkpointing=True)
    for step in (trainer.train, trainer.evaluate):
        step()
        assert_same_state(model, before)
    assert calls


def test_an_adapter_that_the_trainer_adds_is_all_that_it_adds(tmp_path: Path) -> None:
    model = adapted("full")
    trainer = trainer_for(tmp_path, model, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert not [name for name, module in trainer.model.named_modules() if "forward" in module.__dict__]
    pickle.loads(pickle.dumps(trainer.model))
    unloaded = trainer.model.unload()
    assert "forward" not in unloaded.__dict__


def test_at_speed_training_and_copies_work_alike(tmp_path: Path) -> None:
    model = adapted()
    with at_speed(model, "auto"):
        before = state_of(model)
        trainer = trainer_for(tmp_path, model)
        trainer.train()
        trainer.evaluate()
        assert_same_state(model, before)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(answers(twin), answers(model))


def test_losses_of_the_trainer_are_there_between_its_runs_too(tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_for(tmp_path, model)
    batch = trainer.data_collator([ROWS[0], ROWS[1]])
    first = float(trainer.compute_loss(model, dict(batch)).detach())
    trainer.train()
    assert float(trainer.compute_loss(model, dict(batch)).detach()) < first


def test_metrics_from_logits_leave_no_trace(tmp_path: Path) -> None:
    model = adapted()
    before = state_of(model)
    with pytest.warns(FutureWarning):
        trainer = trainer_for(tmp_path, model, compute_metrics=lambda p: {"shape": p.predictions.shape[-1]})
        assert trainer.evaluate()["eval_shape"] == model.config.vocab_size
    assert_same_state(model, before)


def test_two_trainers_one_after_the_other_train_as_one_that_starts_anew(tmp_path: Path) -> None:
    def weights(model: Any) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    twice, once = adapted(), adapted()
    trainer_for(tmp_path / "a", twice, bf16=True).train()
    once.load_state_dict(twice.state_dict())
    for model in (twice, once):
        trainer_for(tmp_path / "b", model, bf16=True).train()
    assert all(torch.equal(value, weights(once)[name]) for name, value in weights(twice).items())
