from datasets import load_dataset
from trl import SFTTrainer

dataset = load_dataset("example/texts", split="train")

trainer = SFTTrainer(
    "microsoft/Phi-3-mini-4k-instruct",
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=64,
)
trainer.train()
