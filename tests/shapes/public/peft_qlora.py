import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_int8_training
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTTrainer

model = AutoModelForCausalLM.from_pretrained(
    "microsoft/Phi-3-mini-4k-instruct",
    load_in_4bit=True,
    use_flash_attention_2=True,
    torch_dtype=torch.float32,
    device_map="cuda:0",
)
model = prepare_model_for_int8_training(model)
peft_config = LoraConfig(r=4, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
model = get_peft_model(model, peft_config)

trainer = SFTTrainer(
    model=model,
    train_dataset=load_dataset("example/texts", split="train"),
    peft_config=peft_config,
    dataset_text_field="text",
    max_seq_length=64,
    args=TrainingArguments(output_dir="qlora", max_steps=1, report_to="none"),
)
trainer.train()
