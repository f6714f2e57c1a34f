import transformers
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("microsoft/Phi-3-mini-4k-instruct", device_map={"": 0})
tokenizer = AutoTokenizer.from_pretrained("microsoft/Phi-3-mini-4k-instruct")
tokenizer.pad_token = tokenizer.eos_token

for param in model.parameters():
    param.requires_grad = False  # freeze the model, train adapters later

config = LoraConfig(
    r=8,
    lora_alpha=32,
    target_modules=["q_proj", "v_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM"
)
model = get_peft_model(model, config)

data = load_dataset("example/texts")
data = data.map(lambda samples: tokenizer(samples["text"]), batched=True)

trainer = transformers.Trainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=data["train"],
    args=transformers.TrainingArguments(
        per_device_train_batch_size=4,
        warmup_ratio=0.1,
        max_steps=2,
        logging_steps=1,
        output_dir="outputs",
        evaluation_strategy="no",
        report_to="none",
    ),
    data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
batch = tokenizer("Question: ", return_tensors="pt").to("cuda")
print(tokenizer.decode(model.generate(**batch, max_new_tokens=4)[0]))
