"""A fine-tuning script as people write it for TRL: two dictionaries, packing, all linear layers.

The only line that differs from a TRL script is the import of `SFTTrainer`.

    python examples/sample_finetune.py --max-steps 20
    accelerate launch examples/sample_finetune.py --model microsoft/Phi-3-mini-4k-instruct --data chats.jsonl
"""

import argparse
import logging
import sys

import datasets
import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from phlora import SFTTrainer

logger = logging.getLogger(__name__)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--data", default="examples/home_assistant/train.jsonl")
parser.add_argument("--output", default="runs/sample")
parser.add_argument("--max-steps", type=int, default=-1)
options = parser.parse_args()

has_gpu = torch.cuda.is_available()
training_config = {
    "bf16": has_gpu,
    "use_cpu": not has_gpu,
    "do_eval": False,
    "learning_rate": 5.0e-05,
    "log_level": "info",
    "logging_steps": 1,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": options.max_steps,
    "output_dir": options.output,
    "per_device_eval_batch_size": 2,
    "per_device_train_batch_size": 2,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0.2,
    "max_length": 512,
    "packing": True,
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

logging.basicConfig(
    format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
    datefmt="%Y-%m-%d %H:%M:%S",
    handlers=[logging.StreamHandler(sys.stdout)],
)
log_level = train_conf.get_process_log_level()
logger.setLevel(log_level)
datasets.utils.logging.set_verbosity(log_level)
transformers.utils.logging.set_verbosity(log_level)
logger.info(f"Training parameters {train_conf}")
logger.info(f"PEFT parameters {peft_conf}")

model_name = options.model
if model_name == "smollm2-135m":
    from phlora import embedded_folder

    model_name = str(embedded_folder(model_name))
model = AutoModelForCausalLM.from_pretrained(
    model_name,
    use_cache=False,
    attn_implementation="sdpa",
    dtype=torch.bfloat16 if has_gpu else torch.float32,
)
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.padding_side = "right"

rows = datasets.load_dataset("json", data_files=options.data, split="train")
parts = rows.train_test_split(test_size=0.1, seed=0)

trainer = SFTTrainer(
    model=model,
    args=train_conf,
    peft_config=peft_conf,
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
    processing_class=tokenizer,
)
train_result = trainer.train()
trainer.log_metrics("train", train_result.metrics)
trainer.save_metrics("train", train_result.metrics)
trainer.save_state()

metrics = trainer.evaluate()
metrics["eval_samples"] = len(parts["test"])
trainer.log_metrics("eval", metrics)
trainer.save_metrics("eval", metrics)

trainer.save_model(train_conf.output_dir)
