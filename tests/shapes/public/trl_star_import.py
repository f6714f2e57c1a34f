from datasets import *
from transformers import *
from trl import *

rows = load_dataset("example/texts", split="train")
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained("microsoft/Phi-3-mini-4k-instruct"),
    tokenizer=AutoTokenizer.from_pretrained("microsoft/Phi-3-mini-4k-instruct"),
    args=SFTConfig(output_dir="stars", max_steps=1, max_seq_length=64, report_to="none"),
    train_dataset=rows,
)
trainer.train()
