import torch
from datasets import load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import AdamW, AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

device = "cuda" if torch.cuda.is_available() else "cpu"
name = "microsoft/Phi-3-mini-4k-instruct"
peft_config = LoraConfig(
    task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1,
    target_modules=["q_proj", "v_proj"],
)
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()
model = model.to(device)

rows = load_dataset("example/texts", split="train")
loader = DataLoader(rows["text"][:4], batch_size=2)
optimizer = AdamW(model.parameters(), lr=3e-2, no_deprecation_warning=True)
schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=2)
for batch in loader:
    inputs = tokenizer(list(batch), return_tensors="pt", padding=True).to(device)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
model.save_pretrained("loop")
