import logging, random, sys
import datasets, torch, transformers
from transformers import AutoModelForCausalLM, set_seed
from alignment import DataArguments, H4ArgumentParser, ModelArguments, SFTConfig, get_checkpoint, get_peft_config
from trl import SFTTrainer, setup_chat_format

logger = logging.getLogger(__name__)

def main():
    parser = H4ArgumentParser((ModelArguments, DataArguments, SFTConfig))
    model_args, data_args, training_args = parser.parse()
    model_kwargs = dict(
        revision=model_args.model_revision,
        use_flash_attention_2=model_args.use_flash_attention_2,
        torch_dtype="auto",
        use_cache=False if training_args.gradient_checkpointing else True,
    )
    model = model_args.model_name_or_path
    training_args.model_init_kwargs = model_kwargs
    trainer = SFTTrainer(
        model=model,
        model_init_kwargs=model_kwargs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        dataset_text_field="text",
        max_seq_length=training_args.max_seq_length,
        tokenizer=tokenizer,
        packing=True,
        peft_config=get_peft_config(model_args),
        dataset_kwargs=training_args.dataset_kwargs,
    )
    train_result = trainer.train(resume_from_checkpoint=None)
    metrics = train_result.metrics
    trainer.log_metrics("train", metrics)
    kwargs = {"finetuned_from": "x", "dataset": list(data_args.dataset_mixer.keys())}
    if trainer.accelerator.is_main_process:
        trainer.create_model_card(**kwargs)

if __name__ == "__main__":
    main()
