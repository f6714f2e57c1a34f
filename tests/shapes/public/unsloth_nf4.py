import unsloth
from datasets import load_dataset
from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments

model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/Phi-3-mini-4k-instruct", max_seq_length=64, load_in_4bit=True
)
model = FastLanguageModel.get_peft_model(
    model, r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"], random_state=1
)
trainer = UnslothTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=load_dataset("example/texts", split="train"),
    args=UnslothTrainingArguments(output_dir="nf4", max_steps=1, max_seq_length=64, report_to="none"),
)
trainer.train()
