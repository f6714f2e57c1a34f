from unsloth import FastLanguageModel
from unsloth.chat_templates import get_chat_template, standardize_sharegpt
from datasets import load_dataset
from trl import SFTTrainer
from transformers import TrainingArguments

model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Phi-3-mini-4k-instruct", load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=8)

tokenizer = get_chat_template(
    tokenizer,
    chat_template="phi-3",
)


def formatting_prompts_func(examples):
    convos = examples["conversations"]
    texts = [tokenizer.apply_chat_template(convo, tokenize=False, add_generation_prompt=False) for convo in convos]
    return {"text": texts}


dataset = load_dataset("example/sharegpt-shop", split="train")
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(formatting_prompts_func, batched=True)

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=128,
    args=TrainingArguments(output_dir="sharegpt", max_steps=2, learning_rate=2e-4, report_to="none"),
)
trainer.train()
