from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

dataset = load_dataset("example/texts")

sft_config = SFTConfig(
    dataset_text_field="text",
    max_seq_length=64,
    output_dir="/tmp/sft",
    evaluation_strategy="steps", eval_steps=0.5,
    neftune_noise_alpha=5,
    group_by_length=True,
    num_train_epochs=1,
    per_gpu_train_batch_size=4,
    optim="adamw_hf",
    dataset_batch_size=500,
    save_safetensors=True,
    dataset_kwargs={"add_special_tokens": False, "append_concat_token": False},
    report_to="none",
)
trainer = SFTTrainer("microsoft/Phi-3-mini-4k-instruct", train_dataset=dataset["train"],
                     eval_dataset=dataset["test"], args=sft_config)
trainer.train()
