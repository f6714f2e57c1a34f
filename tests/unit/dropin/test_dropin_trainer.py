"""`phlora.SFTTrainer` for scripts of which one import was changed: names, targets, rows, and what is told of them."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import TrainerCallback

import phlora
from phlora.errors import ConfigError, DataError, NetworkError
from phlora.testing import chat_rows, tiny_phi3, tiny_tokenizer


def new_model() -> Any:
    return tiny_phi3()[0]


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return new_model().state_dict()


@pytest.fixture
def model(weights: dict[str, torch.Tensor]) -> nn.Module:
    made = new_model()
    made.load_state_dict(copy.deepcopy(weights))
    return made


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, "phlora.dropin")
    return lambda: "\n".join(r.getMessage() for r in caplog.records if r.name == "phlora.dropin")


@pytest.fixture
def make(model: nn.Module, tokenizer: Any, tmp_path: Path) -> Callable[..., phlora.SFTTrainer]:
    def make_trainer(
        rows: Any = None, *, settings: dict[str, Any] | None = None, **kwargs: Any
    ) -> phlora.SFTTrainer:
        given = {"max_steps": 2, "report_to": "none", "per_device_train_batch_size": 2, "max_length": 96}
        kwargs.setdefault("args", phlora.SFTConfig(str(tmp_path / "out"), **{**given, **(settings or {})}))
        kwargs.setdefault("model", model)
        kwargs.setdefault("processing_class", tokenizer)
        kwargs.setdefault("train_dataset", chats() if rows is None else rows)
        return phlora.SFTTrainer(**kwargs)

    return make_trainer


def chats(n: int = 6) -> Dataset:
    return Dataset.from_list([{"messages": row["messages"]} for row in chat_rows(n)])


def sharegpt(n: int = 6, *, roles: tuple[str, str] = ("human", "gpt")) -> list[dict[str, Any]]:
    return [
        {
            "conversations": [
                {"from": roles[0], "value": f"how many are {i} and one"},
                {"from": roles[1], "value": f"they are {i + 1}"},
            ]
        }
        for i in range(n)
    ]


def trained_text(trainer: phlora.SFTTrainer, number: int = 0) -> str:
    row = trainer.train_dataset[number]
    return str(trainer.processing_class.decode([label for label in row["labels"] if label != -100]))


# ------------------------------------------------------------------------------------------------ names


def test_a_call_of_2024_trains(make: Any, tokenizer: Any, told: Any, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": f"a plain text of number {i}"} for i in range(6)])
    trainer = phlora.SFTTrainer(
        new_model(),
        phlora.TrainingArguments(str(tmp_path), evaluation_strategy="no", max_steps=2, report_to="none"),
        train_dataset=rows,
        tokenizer=tokenizer,
        max_seq_length=32,
        dataset_text_field="text",
        packing=False,
        dataset_num_proc=1,
        dataset_kwargs={"append_concat_token": False},
        peft_config={"r": 4, "target_modules": ["o_proj"]},
    )
    assert isinstance(trainer, trl.SFTTrainer) and isinstance(trainer.args, trl.SFTConfig)
    assert (trainer.args.max_length, trainer.args.packing, trainer.args.max_steps) == (32, False, 2)
    assert trainer.train().global_step == 2
    for line in (
        "tokenizer is now called processing_class",
        "SFTConfig(max_length=...)",
        "append_concat_token",
    ):
        assert told().count(line) == 1


def test_all_problems_of_a_call_are_one_error(model: nn.Module) -> None:
    with pytest.raises(ConfigError) as error:
        phlora.SFTTrainer(model, model_init=lambda: model, train_datset=chats(), tokeniser=None)
    for word in (
        "3 arguments",
        "model_init is gone",
        "did you mean `train_dataset`",
        "did you mean `tokenizer`",
    ):
        assert word in str(error.value)


def test_the_configuration_of_the_script_stays_as_it_was(make: Any, tmp_path: Path) -> None:
    args = phlora.SFTConfig(str(tmp_path), max_steps=1, report_to="none")
    assert make(args=args).args is args
    moved = make(args=args, max_seq_length=48)
    assert (args.max_length, moved.args.max_length) == (1024, 48)
    plain = trl.SFTConfig(
        str(tmp_path), max_steps=1, report_to="none", bf16=False, activation_checkpointing=False
    )
    assert make(args=plain).args is plain


def test_without_a_configuration_there_is_trls_own(
    model: nn.Module, tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = phlora.SFTTrainer(model, train_dataset=chats(), processing_class=tokenizer)
    assert trainer.args.output_dir.endswith("-SFT") and trainer.args.learning_rate == 2e-5


# ------------------------------------------------------------------------------------------------ targets


def test_the_usual_seven_names_are_all_adapted_and_saved_as_a_plain_adapter(
    make: Any, model: nn.Module, weights: Any, tokenizer: Any, told: Any, tmp_path: Path
) -> None:
    trainer = make(peft_config=LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM"))
    assert (
        "q_proj, k_proj, v_proj, gate_proj, up_proj are parts of qkv_proj and gate_up_proj: adapted as such; "
        "stock PEFT would have adapted o_proj and down_proj only" in told()
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    ids = tokenizer("how many are two", return_tensors="pt")
    with torch.no_grad():
        ours = trainer.model.eval()(**ids).logits
    base = new_model()
    base.load_state_dict(weights)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert {"qkv_proj", "gate_up_proj", "o_proj", "down_proj"} == set(
        stock.peft_config["default"].target_modules
    )
    with torch.no_grad():
        torch.testing.assert_close(stock(**ids).logits, ours, rtol=1e-5, atol=1e-5)


def test_the_parts_learn_what_separate_layers_would(make: Any) -> None:
    """Each row block has an A and a B of its own, of the rank that was asked for."""
    trainer = make(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert len(trained) and all("qkv_proj" in name for name in trained)
    shown = phlora.dropin.trainer.what_trains(trainer.model)  # type: ignore[attr-defined]
    assert "qkv_proj" in shown and "parameters will be trained" in shown


def test_names_that_peft_finds_are_left_to_peft(make: Any, told: Any) -> None:
    config = LoraConfig(r=4, target_modules=["qkv_proj", "o_proj", "w1"])
    trainer = make(peft_config=config)
    assert trainer.model.peft_config["default"] is config
    assert "this model has no module w1" in told() and "parts of" not in told()


def test_an_expression_that_peft_would_half_match(make: Any, told: Any) -> None:
    trainer = make(peft_config=LoraConfig(r=4, target_modules=r".*\.(q_proj|o_proj)"))
    assert "q_proj are parts of qkv_proj" in told() or "q_proj is a part of qkv_proj" in told()
    assert any("qkv_proj" in n for n, p in trainer.model.named_parameters() if p.requires_grad)


def test_an_adapter_that_peft_has_made_without_the_parts_is_refused(make: Any, model: nn.Module) -> None:
    half = peft.get_peft_model(model, LoraConfig(r=4, target_modules=SEVEN))
    with pytest.raises(ConfigError, match="phlora.get_peft_model"):
        make(model=half)


@pytest.mark.parametrize("targets", [SEVEN, ".*(q_proj|o_proj)"])
def test_a_second_adapter_that_peft_has_made_without_the_parts_is_refused(
    make: Any, model: nn.Module, told: Any, targets: Any
) -> None:
    adapted = phlora.get_peft_model(model, LoraConfig(r=4, target_modules=SEVEN))
    adapted.add_adapter("two", LoraConfig(r=4, target_modules=targets))
    adapted.set_adapter("two")
    with pytest.raises(ConfigError, match=r"q_proj.* the adapter `two`.*qkv_proj"):
        make(model=adapted)
    # The one that is whole trains, and the other is told.
    adapted.set_adapter("default")
    assert make(model=adapted) and "The adapter `two` has no q_proj" in told()


def test_a_second_adapter_with_all_that_it_names_trains(make: Any, model: nn.Module, told: Any) -> None:
    adapted = phlora.get_peft_model(model, LoraConfig(r=4, target_modules=SEVEN))
    adapted.add_adapter("two", LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"]))
    adapted.set_adapter("two")
    assert make(model=adapted) and "has no" not in told()


def test_get_peft_model_adapts_the_parts(make: Any, model: nn.Module, told: Any) -> None:
    adapted = phlora.get_peft_model(model, LoraConfig(r=4, target_modules=SEVEN))
    assert isinstance(adapted, PeftModel) and "adapted as such" in told()
    assert make(model=adapted).train().global_step == 2


def test_get_peft_model_is_pefts_where_nothing_is_missing(model: nn.Module) -> None:
    config = peft.IA3Config(target_modules=["o_proj"], feedforward_modules=[])
    assert "ia3" in str(type(phlora.get_peft_model(model, config, "mine").base_model)).lower()


def test_what_row_blocks_cannot_have_is_one_error(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="low_cpu_mem_usage"):
        phlora.get_peft_model(model, LoraConfig(target_modules=["q_proj"]), low_cpu_mem_usage=True)


def test_a_model_by_its_name_is_adapted_in_its_parts_too(
    make: Any, tmp_path: Path, weights: Any, tokenizer: Any
) -> None:
    made = new_model()
    made.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = make(
        model=str(tmp_path / "base"), processing_class=None, peft_config=LoraConfig(r=4, target_modules=SEVEN)
    )
    assert any("qkv_proj" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert trainer.train().global_step == 2


def test_the_parts_of_a_base_in_4_bits_are_adapted_too(model_folder: Path, make: Any, tmp_path: Path) -> None:
    """As PEFT's own layers compute a plain adapter of the same values."""
    pytest.importorskip("bitsandbytes")
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=quantised)
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    trainer = make(
        model=base,
        peft_config=LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM"),
        settings={"optim": "paged_adamw_8bit", "learning_rate": 1e-2, "activation_checkpointing": False},
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    fused = trainer.model.base_model.model.model.layers[0].self_attn.qkv_proj
    x = torch.randn(3, fused.in_features)
    with torch.no_grad():
        ours = fused.train()(x)
        A, B = fused.lora_A["default"].weight, fused.lora_B["default"].weight
        plain = fused.base_layer(x) + x @ A.T @ B.T * fused.scaling["default"]
    assert bool(B.any()) and {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {
        torch.float32
    }
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    stock = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))
    loaded = stock.base_model.model.model.layers[0].self_attn.qkv_proj
    torch.testing.assert_close(loaded.lora_B["default"].weight.detach(), B.detach(), rtol=0, atol=0)
    assert type(stock.merge_and_unload()) is type(stock.get_base_model())


def test_full_fine_tuning_is_said(make: Any, told: Any) -> None:
    make()
    assert "No peft_config: all" in told() and "full fine-tuning" in told()


# ------------------------------------------------------------------------------------------------ rows


def test_a_leftover_chat_does_not_hide_the_texts_of_the_script(make: Any, told: Any) -> None:
    rows = Dataset.from_list([{**row, "text": f"the text of {i}"} for i, row in enumerate(sharegpt())])
    trainer = make(rows, dataset_text_field="text")
    assert trained_text(trainer, 1) == "the text of 1<|endoftext|>"
    assert "conversations is left out" in told()


def test_a_text_beside_a_chat_is_told_once_and_a_mask_asks_for_the_chat(make: Any, told: Any) -> None:
    rows = Dataset.from_list([{**row, "text": "x"} for row in chats()])
    assert "say 0" in trained_text(make(rows))
    assert told().count("text is not used") == 1
    trainer = make(rows, settings={"assistant_only_loss": True, "dataset_text_field": "text"})
    assert trained_text(trainer) == "salam دنیا 0<|end|><|endoftext|>"
    with pytest.raises(ConfigError, match="one of refuse, warn"):
        make(rows, row_problems="ignore")


def kinds_of_rows() -> dict[str, Dataset]:
    turns = [row["messages"] for row in chat_rows(4)]
    return {
        "messages": Dataset.from_list([{"messages": messages} for messages in turns]),
        "prompt": Dataset.from_list([{"prompt": f"{i} and", "completion": " one"} for i in range(4)]),
        "text": Dataset.from_list([{"text": f"{i} and one"} for i in range(4)]),
    }


@pytest.mark.parametrize("column", ["labels", "input_ids", "completion_mask", "assistant_masks"])
@pytest.mark.parametrize("kind", ["messages", "prompt", "text"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_leftover_numbers_named_as_tokens_or_labels_are_left_out(
    make: Any, told: Any, kind: str, column: str, is_stream: bool
) -> None:
    rows = kinds_of_rows()[kind]
    plain = make(rows).train_dataset[:]
    # A list in input_ids says that rows are tokenised.
    for values in [[1] * 4] + [[[1, 2, 3]] * 4] * (column != "input_ids"):
        more = rows.add_column(column, values)
        trainer = make(more.to_iterable_dataset() if is_stream else more)
        assert f"train: {column} is left out" in told()
        made = list(trainer.train_dataset)
        assert [row["labels"] for row in made] == plain["labels"]
        assert [row["input_ids"] for row in made] == plain["input_ids"]


@pytest.mark.parametrize("column", ["labels", "completion_mask", "assistant_masks"])
def test_single_values_beside_tokens_are_refused_by_their_column(make: Any, column: str) -> None:
    tokens = Dataset.from_list([{"input_ids": [5, 6, 7]}] * 4)
    with pytest.raises(DataError, match=f"`{column}` holds int"):
        make(tokens.add_column(column, [1] * 4))
    with pytest.raises(DataError, match="`input_ids` holds int"):
        make(Dataset.from_list([{"input_ids": 5}] * 4))


@pytest.mark.parametrize("is_stream", [False, True])
def test_labels_of_another_length_than_their_tokens_are_refused(make: Any, is_stream: bool) -> None:
    rows = Dataset.from_list(
        [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [5], "labels": [5, 6]}]
    )
    with pytest.raises(DataError, match="train:2: `labels` has 2 values for 1 tokens"):
        make(rows.to_iterable_dataset() if is_stream else rows)


def test_a_formatting_function_wins_over_leftover_columns(make: Any) -> None:
    rows = Dataset.from_list(sharegpt())
    trainer = make(
        rows,
        formatting_func=lambda row: f"Q: {row['conversations'][0]['value']}",
        dataset_text_field="text",
        max_seq_length=128,
    )
    assert trained_text(trainer).startswith("Q: how many are 0 and one")
    trainer.evaluate(Dataset.from_list(sharegpt(2)))


def test_roles_that_the_template_does_not_know_are_called_as_it_knows_them(make: Any, told: Any) -> None:
    trainer = make(Dataset.from_list(sharegpt()))
    assert "how many are 0 and one" in trained_text(trainer) and "they are 1" in trained_text(trainer)
    assert "gpt is assistant, human is user" in told()


def test_turns_that_the_template_leaves_out_are_refused(make: Any, told: Any) -> None:
    rows = Dataset.from_list(sharegpt(roles=("critic", "gpt")))
    with pytest.raises(DataError, match=r"leaves out turn 1 \(critic\) \(6 rows\)") as error:
        make(rows)
    assert "train:1" in str(error.value) and 'row_problems="warn"' in str(error.value)
    make(rows, row_problems="warn")
    assert "leaves out turn 1" in told()


def test_a_leftover_prompt_is_no_key_error(make: Any, told: Any) -> None:
    rows = Dataset.from_list([{**row, "prompt": "x"} for row in chats()])
    assert make(rows).train().global_step == 2
    assert "prompt is left out" in told()


def test_columns_of_which_nothing_can_be_trained(make: Any) -> None:
    with pytest.raises(DataError, match="rename_column"):
        make(Dataset.from_list([{"prompt": "a", "response": "b"}]))
    with pytest.raises(DataError, match="dataset_text_field"):
        make(Dataset.from_list([{"quote": "a"}]))


def test_chats_that_are_no_lists(make: Any) -> None:
    with pytest.raises(DataError, match="json.loads"):
        make(Dataset.from_list([{"messages": '[{"role": "user", "content": "a"}]'}]))
    with pytest.raises(DataError, match="is empty"):
        make(Dataset.from_list([{"messages": []}, *chats()]))


def test_a_template_that_drops_parts_is_refused(make: Any, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content if m.content is string else '' }}{{ eos_token }}{% endfor %}"
    )
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}]
    with pytest.raises(DataError, match="leaves out turn 1"):
        make(Dataset.from_list(rows), processing_class=tokenizer, row_problems="refuse")


def test_contents_that_the_template_does_not_write_as_text(make: Any) -> None:
    rows = [
        {
            "messages": [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                for message in row["messages"]
            ]
        }
        for row in chat_rows(3)
    ]
    with pytest.raises(DataError, match="cannot be prepared") as error:
        make(Dataset.from_list(rows))
    assert "a text as content" in str(error.value)


def test_rows_of_one_length_and_of_another_format(make: Any, told: Any) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [[5, 6, 7]] * 4})
    fixed = rows.cast(Features(dict.fromkeys(rows.column_names, Sequence(Value("int32"), length=3))))
    make(fixed.with_format("torch"))
    assert "train: 4 rows, 12 tokens, 12 of them trained" in told()


def test_masked_training_that_masks_nothing_is_refused(make: Any) -> None:
    with pytest.raises(DataError, match="assistant_only_loss"):
        make(settings={"completion_only_loss": True})


def test_answers_alone_train_where_trl_has_no_markers_for_the_template(
    make: Any, tokenizer: Any, model: nn.Module, tmp_path: Path
) -> None:
    args = phlora.SFTConfig(str(tmp_path), assistant_only_loss=True, max_steps=1, report_to="none")
    with pytest.raises(ValueError, match="training-compatible"):
        trl.SFTTrainer(model, args, train_dataset=chats(), processing_class=tokenizer)
    trainer = make(args=args)
    assert trained_text(trainer) == "salam دنیا 0<|end|><|endoftext|>" and trainer.args.assistant_only_loss
    whole = tokenizer.apply_chat_template(chats()[0]["messages"])["input_ids"]
    assert trainer.train_dataset[0]["input_ids"] == whole
    assert trainer.train().global_step == 1
    assert trainer.evaluate(chats(2))["eval_loss"] > 0
    pairs = [{"prompt": [row["messages"][0]], "completion": row["messages"][1:]} for row in chats()]
    assert trained_text(make(Dataset.from_list(pairs), args=args)) == "salam دنیا 0<|end|><|endoftext|>"
    with pytest.raises(DataError, match="no chats|are none"):
        make(Dataset.from_list([{"text": "x"}]), args=args)


def test_answers_alone_train_with_a_model_by_its_name(make: Any, model_folder: Path) -> None:
    trainer = make(model=str(model_folder), processing_class=None, settings={"assistant_only_loss": True})
    assert "say 0" not in trained_text(trainer)


def test_rows_are_counted_and_shown(make: Any, told: Any) -> None:
    rows = [{"text": "<s><s>x"}, {"text": ""}, {"text": "a" * 200}, {"text": "plain"}]
    trainer = make(Dataset.from_list(rows))
    assert len(trainer.train_dataset) == 4
    said = told()
    assert "train: 4 rows" in said and "(100.0%)" in said
    assert "begins with the first token twice" in said and "train:1" in said
    assert "Nothing of the row is left but control tokens" in said and "train:2" in said
    assert "longer than max_length (96)" in said and "train:3" in said
    assert "⟦<s>│<s>│x│<|endoftext|>⟧" in said


def test_an_empty_system_message_is_counted(make: Any, told: Any) -> None:
    rows = [{"messages": [{"role": "system", "content": ""}, *row["messages"]]} for row in chat_rows(4)]
    make(Dataset.from_list(rows))
    assert "The content of a system turn is empty (4 rows)" in told()


def test_rows_that_train_nothing_are_refused_when_all_do(make: Any, told: Any) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    make(Dataset.from_list(rows))
    assert "None of the row's tokens is trained" in told()
    with pytest.raises(DataError, match="None of the row's tokens"):
        make(Dataset.from_list(rows[:1]))


LATE = [{"input_ids": [5] * 10 + [6, 7], "labels": [-100] * 10 + [6, 7]}] * 4


@pytest.mark.parametrize("row_problems", ["refuse", "warn"])
@pytest.mark.parametrize("layout", [{}, {"packing": True}])
@pytest.mark.parametrize("side", ["train", "eval"])
def test_rows_that_lose_all_trained_tokens_to_max_length_are_refused(
    make: Any, layout: dict[str, Any], side: str, row_problems: str
) -> None:
    sets = {"train": chats(4), "eval": chats(4), side: Dataset.from_list(LATE)}
    with pytest.raises(
        DataError, match="max_length .8. cuts off every trained token: none of 4 rows"
    ) as refused:
        make(
            sets["train"],
            eval_dataset=sets["eval"],
            settings={"max_length": 8, "eval_packing": layout.get("packing"), **layout},
            row_problems=row_problems,
        )
    assert side in str(refused.value) and "the longest row has 12 tokens" in str(refused.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_cut_leaves_of_rows_is_said_as_it_is(make: Any, told: Any) -> None:
    some = Dataset.from_list([*LATE, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    packed = {"max_length": 8, "packing": True}
    make(some, settings=packed)
    assert "within max_length: the row trains nothing (4 rows)" in told() and "left out" not in told()
    assert len(make(some, settings={"max_length": 8}).train_dataset) == 1
    assert "within max_length: the row is left out (4 rows)" in told()
    # What splits rows, or keeps their ends, loses nothing here.
    assert make(Dataset.from_list(LATE), settings={**packed, "packing_strategy": "bfd_split"}).train()
    kept = make(Dataset.from_list(LATE), settings={"max_length": 8, "truncation_mode": "keep_end"})
    assert len(kept.train_dataset) == 4 and "its beginning is cut off" in told()


def test_rows_without_a_trained_token_are_refused_whatever_is_said(make: Any) -> None:
    with pytest.raises(DataError, match="None of the row's tokens") as refused:
        make(Dataset.from_list([{"input_ids": [5, 6], "labels": [-100] * 2}]), row_problems="warn")
    assert "row_problems" not in str(refused.value)


def test_a_collator_that_never_trains_the_end_is_told(make: Any, tokenizer: Any, told: Any) -> None:
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = make(data_collator=collator)
    assert "makes labels of its own" in told() and trainer.train().global_step == 2
    assert "leaves <|endoftext|> untrained, which ends an answer: pad_token is the same token" in told()


def test_streams_are_looked_at_as_far_as_can_be(make: Any, told: Any) -> None:
    def produce() -> Iterator[dict[str, Any]]:
        yield from sharegpt(150)

    trainer = make(IterableDataset.from_generator(produce))
    assert "train: the first 100 rows" in told()
    assert trainer.train().global_step == 2


def test_each_of_several_held_out_sets_is_looked_at(make: Any, told: Any) -> None:
    trainer = make(eval_dataset={"one": chats(2), "two": Dataset.from_list(sharegpt(2))})
    assert "one: 2 rows" in told() and "two: 2 rows" in told()
    metrics = trainer.evaluate()
    assert {"eval_one_loss", "eval_two_loss"} <= metrics.keys()


@pytest.mark.parametrize("packing", [False, True])
def test_rows_are_prepared_as_trl_prepares_them(
    make: Any, model: nn.Module, tokenizer: Any, packing: bool
) -> None:
    rows = chats(9).train_test_split(test_size=3, seed=0)
    ours = make(rows["train"], eval_dataset=rows["test"], settings={"packing": packing})
    theirs = trl.SFTTrainer(
        model, ours.args, train_dataset=rows["train"], eval_dataset=rows["test"], processing_class=tokenizer
    )
    for name in ("train_dataset", "eval_dataset"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one["input_ids"][:] == other["input_ids"][:] and one["labels"][:] == other["labels"][:]


def batched(rows: dict[str, list[str]]) -> list[str]:
    return [f"Q: {q} A: {a}" for q, a in zip(rows["q"], rows["a"], strict=True)]


def test_a_formatting_function_of_batches_as_trl_once_had_it(make: Any, told: Any) -> None:
    rows = Dataset.from_list([{"q": f"what is {i}", "a": str(i)} for i in range(5)])
    trainer = make(rows, formatting_func=batched)
    assert len(trainer.train_dataset) == 5
    assert trained_text(trainer, 3) == "Q: what is 3 A: 3<|endoftext|>"
    assert "called with batches" in told()
    with pytest.raises(DataError, match="returned int"):
        make(rows, formatting_func=lambda row: 3)


# --------------------------------------------------------------------------------- what scripts bring along


class Own(phlora.SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().compute_loss(model, inputs, *args, **kwargs)


class Counting(TrainerCallback):
    steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        Counting.steps += 1


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_subclasses_callbacks_optimizers_and_metrics_keep_working(
    model: nn.Module, tokenizer: Any, tmp_path: Path
) -> None:
    args = phlora.SFTConfig(str(tmp_path), max_steps=2, report_to="none", eval_strategy="steps", eval_steps=2)
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"one": 1.0}

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = Own(
        model,
        args,
        train_dataset=chats(),
        eval_dataset=chats(2),
        processing_class=tokenizer,
        callbacks=[Counting],
        compute_metrics=metrics,
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert trainer.calls >= 2 and Counting.steps == 2 and seen
    assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is optimizer
    assert pickle.loads(pickle.dumps(trainer.args)).max_steps == 2


def test_a_hub_that_is_not_to_be_had_is_one_message(make: Any, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="train without push_to_hub"):
        make(settings={"push_to_hub": True, "hub_model_id": "us/shop"})
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = make(model=base, peft_config=LoraConfig(r=2, target_modules=["o_proj"]))
    trainer.train()
    with pytest.raises(NetworkError, match="hf upload out "):
        trainer.push_to_hub()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "[None]" not in card and model_folder.name in card


def test_nothing_global_is_left_changed(make: Any) -> None:
    before = (
        trl.SFTTrainer._prepare_dataset,
        peft.get_peft_model,
        torch.get_default_dtype(),
        nn.Linear.forward,
    )
    make(peft_config=LoraConfig(r=4, target_modules=SEVEN)).train()
    after = (
        trl.SFTTrainer._prepare_dataset,
        peft.get_peft_model,
        torch.get_default_dtype(),
        nn.Linear.forward,
    )
    assert before == after
