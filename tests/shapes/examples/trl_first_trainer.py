# Of the first SFTTrainer, 2023
from dataclasses import dataclass, field
from typing import Optional
import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HfArgumentParser, TrainingArguments

from trl import SFTTrainer, is_xpu_available

tqdm.pandas()

@dataclass
class ScriptArguments:
    model_name: Optional[str] = field(default="facebook/opt-350m", metadata={"help": "the model name"})
    dataset_name: Optional[str] = field(default="timdettmers/openassistant-guanaco")
    dataset_text_field: Optional[str] = field(default="text")
    log_with: Optional[str] = field(default="none")
    learning_rate: Optional[float] = field(default=1.41e-5)
    batch_size: Optional[int] = field(default=64)
    seq_length: Optional[int] = field(default=512)
    load_in_8bit: Optional[bool] = field(default=False)
    load_in_4bit: Optional[bool] = field(default=False)
    use_peft: Optional[bool] = field(default=False)
    peft_lora_r: Optional[int] = field(default=64)
    use_auth_token: Optional[bool] = field(default=True)

parser = HfArgumentParser(ScriptArguments)
script_args = parser.parse_args_into_dataclasses()[0]

# Step 1: Load the model
if script_args.load_in_8bit and script_args.load_in_4bit:
    raise ValueError("You can't load the model in 8 bits and 4 bits at the same time")
elif script_args.load_in_8bit or script_args.load_in_4bit:
    quantization_config = BitsAndBytesConfig(load_in_8bit=script_args.load_in_8bit, load_in_4bit=script_args.load_in_4bit)
    device_map = {"": f"xpu:{Accelerator().local_process_index}"} if is_xpu_available() else {"": Accelerator().local_process_index}
    torch_dtype = torch.bfloat16
else:
    device_map = None
    quantization_config = None
    torch_dtype = None

model = AutoModelForCausalLM.from_pretrained(
    script_args.model_name,
    quantization_config=quantization_config,
    device_map=device_map,
    trust_remote_code=True,
    torch_dtype=torch_dtype,
    use_auth_token=script_args.use_auth_token,
)

dataset = load_dataset(script_args.dataset_name, split="train", use_auth_token=True)

training_args = TrainingArguments(
    output_dir="output",
    per_device_train_batch_size=script_args.batch_size,
    gradient_accumulation_steps=16,
    learning_rate=script_args.learning_rate,
    logging_steps=1,
    num_train_epochs=3,
    max_steps=-1,
    report_to=script_args.log_with,
    save_steps=100,
    push_to_hub=False,
    hub_model_id=None,
    push_to_hub_token="x",
)

if script_args.use_peft:
    peft_config = LoraConfig(r=script_args.peft_lora_r, lora_alpha=16, bias="none", task_type="CAUSAL_LM")
else:
    peft_config = None

trainer = SFTTrainer(
    model=model,
    args=training_args,
    max_seq_length=script_args.seq_length,
    train_dataset=dataset,
    dataset_text_field=script_args.dataset_text_field,
    peft_config=peft_config,
)

trainer.train()
trainer.save_model("output")
