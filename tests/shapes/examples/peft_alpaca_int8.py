import argparse
import torch, transformers, datasets
from datasets import load_dataset
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_int8_training,
    set_peft_model_state_dict,
    TaskType,
)
from transformers import LlamaForCausalLM, LlamaTokenizer

def train(base_model="", data_path="x", output_dir="./lora-alpaca", batch_size=128, micro_batch_size=4, cutoff_len=256, val_set_size=2000, lora_r=8, lora_target_modules=["q_proj", "v_proj"], group_by_length=False, resume_from_checkpoint=None):
    gradient_accumulation_steps = batch_size // micro_batch_size
    ddp = False
    model = LlamaForCausalLM.from_pretrained(base_model, load_in_8bit=True, torch_dtype=torch.float16, device_map="auto")
    tokenizer = LlamaTokenizer.from_pretrained(base_model)
    def tokenize(prompt, add_eos_token=True):
        result = tokenizer(prompt, truncation=True, max_length=cutoff_len, padding=False, return_tensors=None)
        result["labels"] = result["input_ids"].copy()
        return result
    model = prepare_model_for_int8_training(model)
    config = LoraConfig(r=lora_r, lora_alpha=16, target_modules=lora_target_modules, lora_dropout=0.05, bias="none", task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(model, config)
    data = load_dataset("json", data_files=data_path)
    train_data = data["train"].shuffle().map(lambda row: tokenize(row["text"]))
    model.print_trainable_parameters()
    trainer = transformers.Trainer(
        model=model,
        train_dataset=train_data,
        eval_dataset=None,
        args=transformers.TrainingArguments(
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            warmup_steps=100,
            num_train_epochs=3,
            fp16=True,
            logging_steps=10,
            optim="adamw_torch",
            evaluation_strategy="steps" if val_set_size > 0 else "no",
            save_strategy="steps",
            eval_steps=200 if val_set_size > 0 else None,
            save_steps=200,
            output_dir=output_dir,
            save_total_limit=3,
            load_best_model_at_end=True if val_set_size > 0 else False,
            ddp_find_unused_parameters=False if ddp else None,
            group_by_length=group_by_length,
            report_to=None,
        ),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, return_tensors="pt", padding=True),
    )
    model.config.use_cache = False
    old_state_dict = model.state_dict
    model.state_dict = (lambda self, *_, **__: get_peft_model_state_dict(self, old_state_dict())).__get__(model, type(model))
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    model.save_pretrained(output_dir)

if __name__ == "__main__":
    import fire
    fire.Fire(train)
