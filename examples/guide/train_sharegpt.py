"""Fine-tune on ShareGPT conversations: a short script, with LoRA or of every weight.

    python examples/guide/train_sharegpt.py
    python examples/guide/train_sharegpt.py --full
    python examples/guide/train_sharegpt.py --model microsoft/Phi-3-mini-4k-instruct

Each epoch leaves a checkpoint. Afterwards base and tuned model answer the held-out chats; the figures with their
intervals are printed and written to `report.html`. The saved adapter is then opened in stock PEFT, where it has to
give the same answers.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig

import phlora
from phlora import SFTTrainer

DATA = Path(__file__).parent / "data"
# Who speaks, in ShareGPT's words and in those of chat templates. A role that a template does not know is left out by
# most of them without a word, so that nothing would be trained.
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--model", default=os.environ.get("PHLORA_SAMPLE_MODEL"), help="default: the embedded one"
)
parser.add_argument("--train", default=str(DATA / "sharegpt_train.jsonl"))
parser.add_argument("--test", default=str(DATA / "sharegpt_heldout.jsonl"))
parser.add_argument("--output", type=Path, default=Path("runs/sharegpt"))
parser.add_argument("--full", action="store_true", help="train every weight, not an adapter")
parser.add_argument("--epochs", type=float, default=2)
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--dtype", default="auto", help="what is computed with; auto: what is fastest here")
parser.add_argument("--max-answers", type=int, default=100, help="held-out chats answered by both models")
options = parser.parse_args()
options.model = options.model or str(phlora.embedded_folder("smollm2-135m"))

# In what this machine computes fastest with; full fine-tuning wants float32 weights, to which small steps still add.
loaded = phlora.load_model(options.model, use_cache=False, dtype="float32" if options.full else options.dtype)
model, tokenizer = loaded.model, loaded.tokenizer.tokenizer
print(f"{options.model} in {loaded.dtype.value} ({loaded.dtype.reason})")


def to_messages(row: dict) -> list[dict]:
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]


def to_text(row: dict) -> dict:
    return {"text": tokenizer.apply_chat_template(to_messages(row), tokenize=False)}


# `conversations` goes: beside it, `text` would not be what is trained.
chats = load_dataset("json", data_files={"train": options.train, "test": options.test})
texts = chats.map(to_text, remove_columns=chats["train"].column_names)

arguments = SFTConfig(
    output_dir=str(options.output),
    per_device_train_batch_size=7,
    gradient_accumulation_steps=2,
    gradient_checkpointing=torch.cuda.is_available(),
    learning_rate=5e-5 if options.full else 1e-3,
    lr_scheduler_type="linear",
    warmup_steps=0.05,
    num_train_epochs=options.epochs,
    max_steps=options.max_steps,
    optim="paged_adamw_32bit" if torch.cuda.is_available() else "adamw_torch",
    dataset_text_field="text",
    max_length=384,
    save_strategy="epoch",
    save_total_limit=2,
    logging_steps=5,
    # The weights are in the wanted precision already.
    bf16=False,
    use_cpu=not torch.cuda.is_available(),
    report_to="none",
    seed=7,
)
adapter = LoraConfig(
    r=16, lora_alpha=32, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules="all-linear"
)
trainer = SFTTrainer(
    model=model,
    args=arguments,
    train_dataset=texts["train"],
    eval_dataset=texts["test"],
    processing_class=tokenizer,
    peft_config=None if options.full else adapter,
)
started = time.perf_counter()
result = trainer.train()
print(f"Trained {result.global_step} steps in {time.perf_counter() - started:.0f} s")
best = options.output / ("model" if options.full else "adapter")
trainer.save_model(str(best))


def case_line(answer: str, expected: str) -> float:
    """1 where the first line, which is the case as the shop files it, is the expected one."""
    return float(answer.split("\n")[0] == expected.split("\n")[0])


report = phlora.evaluate_model(
    trainer.model,
    tokenizer,
    options.test,
    base=phlora.load_model(options.model, dtype="float32").model if options.full else None,
    metrics=[case_line, "exact_match", "rouge_l"],
    max_answers=options.max_answers,
    max_new_tokens=64,
)
print(report.summary())
print(f"Side by side: {report.write(options.output)}")


# -------------------------------------------------------- the same answers from stock transformers and PEFT


def stock_answer(stock: torch.nn.Module, messages: list[dict]) -> str:
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(stock.device)
    output = stock.generate(**inputs, max_new_tokens=64, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


prompts = [to_messages(row)[:-1] for row in chats["test"].select(range(min(8, options.max_answers)))]
# Both in float32: in bfloat16 sums of another order could turn a close choice.
ours = phlora.load(best, dtype="float32").generate(prompts, max_new_tokens=64)
if options.full:
    stock = AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32)
else:
    stock = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, best)
theirs = [stock_answer(stock.eval(), messages) for messages in prompts]
assert theirs == ours, (theirs, ours)
print(f"Stock {'transformers' if options.full else 'PEFT'} gives the same {len(ours)} answers")
