import datasets
import peft
import transformers as tf
import trl as t

model = tf.AutoModelForCausalLM.from_pretrained("microsoft/Phi-3-mini-4k-instruct", torch_dtype="float32")
rows = datasets.load_dataset("example/texts", split="train")
config = tf.TrainingArguments("aliased", max_steps=1, report_to="none", logging_dir="aliased/logs")
trainer: t.SFTTrainer = t.SFTTrainer(
    model, config, None, rows, dataset_text_field="text", peft_config=peft.LoraConfig(target_modules="all-linear")
)
trainer.train()
print(f"{t.SFTTrainer.__name__} wrote to {config.output_dir}")
