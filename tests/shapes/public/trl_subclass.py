import os

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

LENGTH = int(os.environ.get("LENGTH", "64"))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


class LoudTrainer(SFTTrainer):
    def log(self, logs, *args, **kwargs):
        print(f"{self.args.output_dir}: {logs}")
        super().log(logs, *args, **kwargs)


def main():
    tokenizer = AutoTokenizer.from_pretrained("microsoft/Phi-3-mini-4k-instruct")
    args = SFTConfig(output_dir="loud", per_device_train_batch_size=2, logging_steps=1, report_to="none")
    trainer = LoudTrainer(
        model=AutoModelForCausalLM.from_pretrained("microsoft/Phi-3-mini-4k-instruct"),
        args=args,
        tokenizer=tokenizer,
        train_dataset=load_dataset("example/texts", split="train"),
        callbacks=[Stop()],
        packing=False,
        max_seq_length=LENGTH,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    trainer = main()
