try:
    from trl import SFTTrainer
    HAS_TRL = True
except ImportError:
    SFTTrainer = None
    HAS_TRL = False

from datasets import load_dataset
from transformers import TrainingArguments; from peft import LoraConfig

if HAS_TRL:
    trainer = SFTTrainer(
        model="microsoft/Phi-3-mini-4k-instruct",
        args=TrainingArguments(output_dir="maybe", max_steps=1, report_to="none"),
        train_dataset=load_dataset("example/texts", split="train"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        dataset_text_field="text",
    )
    trainer.train()
