"""A formatting function for many rows, and the configuration inside the call."""
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTTrainer

dataset = load_dataset("example/python-instructions", split="train")
model = AutoModelForCausalLM.from_pretrained("microsoft/Phi-3-mini-4k-instruct", low_cpu_mem_usage=True)
tokenizer = AutoTokenizer.from_pretrained("microsoft/Phi-3-mini-4k-instruct")


def formatting_prompts_func(example):
    output_texts = []
    for i in range(len(example["instruction"])):
        text = f"### Question: {example['instruction'][i]}\n ### Answer: {example['output'][i]}"
        output_texts.append(text)
    return output_texts


trainer = SFTTrainer(
    model,
    TrainingArguments(output_dir="out", max_steps=2, report_to="none"),
    train_dataset=dataset,
    formatting_func=formatting_prompts_func,
    tokenizer=tokenizer,
    max_seq_length=64)

trainer.train()
