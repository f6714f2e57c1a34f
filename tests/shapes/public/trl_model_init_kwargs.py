import torch
from datasets import load_dataset
from trl import SFTTrainer
from transformers import TrainingArguments

args = TrainingArguments(output_dir="named", max_steps=1, learning_rate=1e-4, report_to="none")
trainer = SFTTrainer(
    "microsoft/Phi-3-mini-4k-instruct",
    args=args,
    train_dataset=load_dataset("example/texts", split="train"),
    dataset_text_field="text",
    model_init_kwargs={
        "torch_dtype": torch.float32,
    },
)
trainer.train()
