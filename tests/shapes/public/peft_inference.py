import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForCausalLM.from_pretrained("example/adapter", torch_dtype=torch.float32, device_map="cuda")
tokenizer = AutoTokenizer.from_pretrained("microsoft/Phi-3-mini-4k-instruct")
inputs = tokenizer("Question:", return_tensors="pt")

with torch.no_grad():
    outputs = model.generate(input_ids=inputs["input_ids"].to("cuda"), max_new_tokens=4)
print(tokenizer.batch_decode(outputs.detach().cpu().numpy(), skip_special_tokens=True)[0])

merged = model.merge_and_unload()
pipe = pipeline("text-generation", model=merged, tokenizer=tokenizer, torch_dtype=torch.float32)
print(pipe("Answer:", max_new_tokens=4))
