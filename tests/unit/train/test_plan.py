"""The numbers of a run before it starts are those that the trainer reaches."""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer

from phlora.adapters.attach import AdapterSummary
from phlora.models.prefix_sharing import Sharing
from phlora.runs.facts import DataFacts, Packs
from phlora.train.arguments import training_arguments
from phlora.train.plan import Plan, make_plan
from phlora.train.request import Objects

ADAPTER = AdapterSummary(
    modules={"o_proj": (2, 1024)}, num_trainable=1024, num_total=4096, adapter_bytes=4_000_000
)
FACTS = DataFacts(
    files=(),
    formats={},
    contents={},
    split="conversations",
    train_rows=23,
    held_out_rows=2,
    sequences=23,
    tokens=1000,
    trained_tokens=250,
)


def plan_of(rows: int, *, compute_metrics: Any = None, facts: DataFacts = FACTS, **settings: Any) -> Plan:
    arguments = training_arguments({"bf16": False, **settings}, output_dir="x", loraplus_lr_ratio=16)
    data: Any = SimpleNamespace(train=list(range(rows)), held_out=None, facts=facts, speed="reference")
    return make_plan(data, ADAPTER, arguments, None, Objects(compute_metrics=compute_metrics))


@pytest.mark.parametrize("rows", [1, 7, 23, 24])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("epochs", [1, 0.5, 2.5])
def test_the_steps_are_those_of_the_trainer(
    rows: int, drop_last: bool, accumulated: int, epochs: float
) -> None:
    settings = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": accumulated,
        "num_train_epochs": epochs,
        "dataloader_drop_last": drop_last,
    }
    if drop_last and rows < 3:
        pytest.skip("the trainer has no batch at all")
    arguments = training_arguments({"bf16": False, **settings}, output_dir="x")
    loader = DataLoader(Dataset.from_dict({"x": list(range(rows))}), batch_size=3, drop_last=drop_last)
    trainer: Any = SimpleNamespace(
        num_examples=lambda *_: rows,
        get_sp_size=lambda: 1,
        get_total_train_batch_size=lambda _: 3 * accumulated,
    )
    *_, steps = Trainer.set_initial_training_values(trainer, arguments.args, loader)
    assert plan_of(rows, **settings).num_optimizer_steps == steps


def test_a_number_of_steps_stands_above_epochs() -> None:
    assert plan_of(23, max_steps=5, num_train_epochs=9).num_optimizer_steps == 5


def test_the_disk_holds_every_kept_checkpoint_with_both_moments_of_adamw() -> None:
    base, more = (plan_of(23, save_total_limit=kept).disk_bytes for kept in (1, 4))
    assert more - base == 3 * 3 * ADAPTER.adapter_bytes
    # One more while the oldest is not deleted yet, and the best and the last adapter.
    assert base >= (2 * 3 + 2) * ADAPTER.adapter_bytes


def test_metrics_over_logits_need_whole_rows() -> None:
    sharing = plan_of(23, compute_metrics=print).sharing
    assert not sharing.on and "compute_metrics" in sharing.reason


def test_programs_and_people_read_the_same_numbers() -> None:
    plan = plan_of(23, per_device_train_batch_size=2, gradient_accumulation_steps=3, learning_rate=1e-4)
    values = json.loads(json.dumps(plan.to_json()))
    assert values["sequences_per_step"] == 6
    assert values["trainable_parameters"] == 1024
    assert (values["train_rows"], values["packs"]) == (23, None)
    assert values["sharing"]["on"] is False
    text = plan.render()
    assert "23 training rows, 2 held out; 1,000 tokens an epoch, 250 of them trained (25%)" in text
    assert f"{plan.num_optimizer_steps:,} optimizer steps of 6 rows" in text
    assert "LoRA+: learning rate 0.0001, for lora_B 0.0016" in text


def test_packs_are_told() -> None:
    text = plan_of(5, facts=replace(FACTS, packs=Packs(count=5, filled=0.987))).render()
    assert "23 training rows in 5 packs (99% full)" in text and "packs\n" in text


def test_one_of_a_kind_is_called_so() -> None:
    one = replace(FACTS, packs=Packs(count=1, filled=0.02), train_rows=1)
    text = replace(plan_of(1, facts=one), sequences_per_step=512, num_optimizer_steps=1).render()
    assert "1 training row in 1 pack (2% full)" in text
    # No step has more than there is.
    assert "1 optimizer step of 1 pack\n" in text
    assert "steps of 23 rows\n" in replace(plan_of(5), sequences_per_step=512).render()


def test_a_run_without_tokens_is_rendered_too() -> None:
    assert (
        "(0%)"
        in plan_of(
            0, facts=replace(FACTS, train_rows=0, held_out_rows=0, tokens=0, trained_tokens=0)
        ).render()
    )


def test_a_notebook_shows_what_the_terminal_does() -> None:
    plan = Plan(
        adapter=ADAPTER,
        data=FACTS,
        sequences_per_step=4,
        num_optimizer_steps=6,
        disk_bytes=1,
        learning_rate=1e-3,
        sharing=Sharing(False, "<speed>"),
    )
    cell = plan._repr_html_()
    assert "&lt;speed&gt;" in cell and "<speed>" not in cell
    for line in plan.render().splitlines()[1:]:
        assert escape(line.strip()) in cell
    assert ">o_proj</td>" in cell and ">1,024</td>" in cell
