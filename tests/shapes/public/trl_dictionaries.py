from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTTrainer

base = dict(report_to="none", per_device_train_batch_size=4, overwrite_output_dir=True)
training_config = {
    **base,
    "output_dir": "dicts",
    'evaluation_strategy': 'no',
    "learning_rate": 1e-4,
    "bf16": False,
    # short
    "max_steps": 2,
    "warmup_ratio": 0.5,  # half of them
}
training_config["logging_steps"] = 1
training_config["warmup_ratio"] = 0.0
training_config.update({"save_strategy": "no", "no_cuda": True})
peft_config = {"r": 8, "lora_alpha": 16, "target_modules": ["qkv_proj"], "merge_weights": False}

trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained("microsoft/Phi-3-mini-4k-instruct"),
    args=TrainingArguments(**training_config),
    peft_config=LoraConfig(**peft_config),
    train_dataset=load_dataset("example/texts", split="train"),
    dataset_text_field="text", max_seq_length=64,
)
trainer.train()
print(training_config["evaluation_strategy"])
