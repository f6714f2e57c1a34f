# The arguments come from the command line, or here from a list of words.
from dataclasses import dataclass, field
from typing import Optional

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments
from trl import SFTTrainer


@dataclass
class ScriptArguments:
    model_name: Optional[str] = field(default="microsoft/Phi-3-mini-4k-instruct")
    dataset_text_field: Optional[str] = field(default="text")
    seq_length: Optional[int] = field(default=64)
    peft_lora_r: Optional[int] = field(default=8)


parser = HfArgumentParser((ScriptArguments, TrainingArguments))
script_args, training_args = parser.parse_args_into_dataclasses(
    ["--output_dir", "parsed", "--max_steps", "2", "--report_to", "none"]
)

model = AutoModelForCausalLM.from_pretrained(script_args.model_name, use_auth_token=False)
dataset = load_dataset("example/texts", split="train")
trainer = SFTTrainer(
    model=model,
    args=training_args,
    max_seq_length=script_args.seq_length,
    train_dataset=dataset,
    dataset_text_field=script_args.dataset_text_field,
    peft_config=LoraConfig(r=script_args.peft_lora_r, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
trainer.save_model(training_args.output_dir)
