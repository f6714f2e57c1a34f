from unsloth import FastModel
from unsloth.chat_templates import get_chat_template, standardize_data_formats, train_on_responses_only
from trl import SFTTrainer, SFTConfig
model, tokenizer = FastModel.from_pretrained(
    model_name = "unsloth/gemma-3-4b-it",
    max_seq_length = 2048,
    load_in_4bit = True,
    load_in_8bit = False,
    full_finetuning = False,
)
model = FastModel.get_peft_model(
    model,
    finetune_vision_layers     = False,
    finetune_language_layers   = True,
    finetune_attention_modules = True,
    finetune_mlp_modules       = True,
    r = 8, lora_alpha = 8, lora_dropout = 0, bias = "none", random_state = 3407,
)
tokenizer = get_chat_template(tokenizer, chat_template = "gemma-3")
dataset = standardize_data_formats(dataset)
trainer = SFTTrainer(
    model = model, tokenizer = tokenizer, train_dataset = dataset, eval_dataset = None,
    args = SFTConfig(dataset_text_field = "text", per_device_train_batch_size = 2, max_steps = 30, report_to = "none"),
)
trainer = train_on_responses_only(trainer, instruction_part = "<start_of_turn>user\n", response_part = "<start_of_turn>model\n")
trainer.train()
