from datasets import load_dataset
from transformers import TrainingArguments, AutoTokenizer
from trl import SFTTrainer

args = TrainingArguments(output_dir="attributes", max_steps=1, evaluation_strategy="no", report_to="none")
args.evaluation_strategy = "steps"
print(f"evaluation_strategy: {args.evaluation_strategy!r}")
data = load_dataset("example/texts")
trainer = SFTTrainer(
    model="microsoft/Phi-3-mini-4k-instruct",
    args=args,
    train_dataset=data["train"],
    eval_dataset=data["test"],
    dataset_text_field="text",
    tokenizer=AutoTokenizer.from_pretrained("microsoft/Phi-3-mini-4k-instruct"),
)
trainer.train()
trainer.tokenizer.save_pretrained("attributes")
