# Load the model in half precision
model = AutoModelForCausalLM.from_pretrained(
    "microsoft/Phi-3-mini-4k-instruct",
    torch_dtype=torch.float16,
    trust_remote_code=True,
    device_map="cuda",
)
tokenizer = AutoTokenizer.from_pretrained("microsoft/Phi-3-mini-4k-instruct", trust_remote_code=True)
tokenizer.pad_token = tokenizer.eos_token
tokenizer.padding_side = "right"

# Chats with `from` and `value`
dataset = load_dataset("example/sharegpt-shop", split="train")


def formatting_func(example):
    texts = []
    for chat in example["conversations"]:
        text = ""
        for turn in chat:
            who = "user" if turn["from"] == "human" else "assistant"
            text += f"<|{who}|>\n{turn['value']}<|end|>\n"
        texts.append(text)
    return texts


training_args = TrainingArguments(
    output_dir="phi3-finetuned",
    overwrite_output_dir=True,
    num_train_epochs=1,
    per_device_train_batch_size=7,
    gradient_accumulation_steps=4,  # 28 rows a step
    gradient_checkpointing=True,
    learning_rate=2e-4,
    lr_scheduler_type="linear",
    optim="paged_adamw_32bit",
    save_strategy="epoch",
    logging_steps=1,
    fp16=True,
    report_to="none",
)

trainer = SFTTrainer(
    model=model,
    args=training_args,
    train_dataset=dataset,
    tokenizer=tokenizer,
    dataset_text_field="text",
    max_seq_length=128,
    formatting_func=formatting_func,
)

trainer.train()
trainer.save_model("phi3-finetuned/final")
