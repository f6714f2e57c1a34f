"""The model card's script: two dictionaries, packing, all linear layers, metrics and state files.

The only line that differs from a TRL script is the import of `SFTTrainer`.

    python examples/guide/sample_finetune.py --max-steps 40
    accelerate launch --cpu --num_processes 1 examples/guide/sample_finetune.py --max-steps 40
    accelerate launch --config_file examples/guide/zero3.yaml examples/guide/sample_finetune.py \\
        --model microsoft/Phi-3-mini-4k-instruct --train chats.jsonl --test others.jsonl

`zero3.yaml` is for several GPUs with deepspeed installed (`pip install deepspeed`).
"""

import argparse
import logging
import os
import sys
from pathlib import Path

import datasets
import torch
import transformers
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

import phlora
from phlora import SFTTrainer

logger = logging.getLogger(__name__)
DATA = Path(__file__).parents[1] / "home_assistant"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--model", default=os.environ.get("PHLORA_SAMPLE_MODEL"), help="default: the embedded one"
)
parser.add_argument("--train", default=str(DATA / "train.jsonl"), help="chats with `messages`")
parser.add_argument("--test", default=str(DATA / "heldout.jsonl"))
parser.add_argument("--output", default="runs/sample_finetune")
parser.add_argument("--epochs", type=float, default=1)
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--max-answers", type=int, default=50, help="held-out chats answered by both models")
parser.add_argument(
    "--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a GPU, else float32"
)
options = parser.parse_args()
options.model = options.model or str(phlora.embedded_folder("smollm2-135m"))

# ------------------------------------------------------------------------------------------------ hyper-parameters

has_gpu = torch.cuda.is_available()
training_config = {
    "bf16": has_gpu,
    "use_cpu": not has_gpu,
    "do_eval": False,
    "learning_rate": 1.0e-03,
    "log_level": "info",
    "logging_steps": 1,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": options.epochs,
    "max_steps": options.max_steps,
    "output_dir": options.output,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": has_gpu,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0.2,
    "max_length": 512,
    "packing": True,
    "dataset_text_field": "text",
    "report_to": "none",
}
peft_config = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}
train_conf = SFTConfig(**training_config)
peft_conf = LoraConfig(**peft_config)

# --------------------------------------------------------------------------------------------------------- logging

logging.basicConfig(
    format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
    datefmt="%Y-%m-%d %H:%M:%S",
    handlers=[logging.StreamHandler(sys.stdout)],
)
log_level = train_conf.get_process_log_level()
logger.setLevel(log_level)
datasets.utils.logging.set_verbosity(log_level)
transformers.utils.logging.set_verbosity(log_level)
transformers.utils.logging.enable_default_handler()
transformers.utils.logging.enable_explicit_format()

is_distributed = train_conf.world_size > 1
logger.warning(
    f"Rank {train_conf.process_index} of {train_conf.world_size} on {train_conf.device}, {train_conf.n_gpu} GPUs, "
    f"distributed: {is_distributed}, bf16: {train_conf.bf16}, fp16: {train_conf.fp16}"
)
logger.info(f"Training parameters {train_conf}")
logger.info(f"PEFT parameters {peft_conf}")

# ---------------------------------------------------------------------------------------------- model and tokenizer

dtype = getattr(torch, options.dtype or ("bfloat16" if has_gpu else "float32"))
model = AutoModelForCausalLM.from_pretrained(
    options.model,
    use_cache=False,
    attn_implementation="sdpa",  # "flash_attention_2" where that is installed
    dtype=dtype,
)
tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.model_max_length = 2048
# A pad token that is also the end of a turn would hide that end from training.
tokenizer.pad_token = tokenizer.unk_token or tokenizer.pad_token
tokenizer.padding_side = "right"

# ------------------------------------------------------------------------------------------------------------ data


def to_text(row: dict) -> dict:
    messages = row["messages"]
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    return {"text": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)}


chats = datasets.load_dataset("json", data_files={"train_sft": options.train, "test_sft": options.test})
with train_conf.main_process_first(desc="chats as text"):
    texts = chats.map(
        to_text, remove_columns=chats["train_sft"].column_names, desc="Applying the chat template"
    )

# -------------------------------------------------------------------------------------------------------- training

trainer = SFTTrainer(
    model=model,
    args=train_conf,
    peft_config=peft_conf,
    train_dataset=texts["train_sft"],
    eval_dataset=texts["test_sft"],
    processing_class=tokenizer,
)
train_result = trainer.train()
metrics = train_result.metrics
metrics["train_samples"] = len(texts["train_sft"])
trainer.log_metrics("train", metrics)
trainer.save_metrics("train", metrics)
trainer.save_state()

# ------------------------------------------------------------------------------------------------------ evaluation

tokenizer.padding_side = "left"
metrics = trainer.evaluate()
metrics["eval_samples"] = len(texts["test_sft"])
trainer.log_metrics("eval", metrics)
trainer.save_metrics("eval", metrics)

trainer.save_model(train_conf.output_dir)

# ------------------------------------------- proof: base against tuned, and the same answers from stock PEFT


def stock_answer(stock: torch.nn.Module, messages: list[dict]) -> str:
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = stock.generate(**inputs, max_new_tokens=40, do_sample=False, use_cache=True)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def prove() -> None:
    report = phlora.evaluate_model(
        trainer.accelerator.unwrap_model(trainer.model),
        tokenizer,
        options.test,
        metrics=["exact_match", "json_valid", "json_equal"],
        max_answers=options.max_answers,
        max_new_tokens=40,
    )
    print(report.summary())
    print(f"Side by side: {report.write(train_conf.output_dir)}")

    # Both in float32: in bfloat16 sums of another order could turn a close choice.
    prompts = [row["messages"][:-1] for row in chats["test_sft"].select(range(min(8, options.max_answers)))]
    ours = phlora.load(train_conf.output_dir, dtype="float32").generate(prompts, max_new_tokens=40)
    stock = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, train_conf.output_dir).eval()
    theirs = [stock_answer(stock, messages) for messages in prompts]
    assert theirs == ours, (theirs, ours)
    print(f"Stock PEFT gives the same {len(ours)} answers")


if trainer.is_deepspeed_enabled:
    logger.warning(
        "Each process holds a part of the weights: prove the adapter afterwards with `phlora.load`"
    )
elif trainer.is_world_process_zero():
    prove()
