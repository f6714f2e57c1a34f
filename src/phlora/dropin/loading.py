"""A model that a script gives by its name: loaded as TRL does it, where its adapter has to be made before that."""

from __future__ import annotations

import copy
from typing import Any

from peft import LoraConfig
from transformers import AutoConfig, AutoProcessor, set_seed
from trl.trainer.utils import create_model_from_path

from phlora.models.builtin import EMBEDDED, embedded_folder
from phlora.models.families import fused_row_blocks


def with_tokenizer(call: dict[str, Any]) -> dict[str, Any]:
    """The call with the model's own tokenizer, where none is given and one is looked into before TRL's turn."""
    args, model = call["args"], call.get("model")
    if call.get("processing_class") is not None or not args.assistant_only_loss or model is None:
        return call
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    keywords = args.model_init_kwargs or {}
    of_hub = {key: keywords[key] for key in ("revision", "token") if key in keywords}
    made = AutoProcessor.from_pretrained(name, trust_remote_code=args.trust_remote_code, **of_hub)
    return {**call, "processing_class": made}


def loaded(call: dict[str, Any]) -> dict[str, Any]:
    """The call with the model itself, where its adapter may name parts of fused weights; a built-in model's folder."""
    name, config = call.get("model"), call.get("peft_config")
    if not isinstance(name, str):
        return call
    if name in EMBEDDED:
        name = str(embedded_folder(name))
        call = {**call, "model": name}
    if not isinstance(config, LoraConfig) or not config.target_modules:
        return call
    args = call["args"]
    keywords = dict(args.model_init_kwargs or {})
    keywords.setdefault("trust_remote_code", args.trust_remote_code)
    of_hub = {key: keywords[key] for key in ("revision", "token", "trust_remote_code") if key in keywords}
    parts = {
        part
        for blocks in fused_row_blocks(AutoConfig.from_pretrained(name, **of_hub)).values()
        for part in blocks
    }
    targets: Any = config.target_modules
    # An expression is searched for the names, and a list for names that end in them.
    named = [targets] if isinstance(targets, str) else list(targets)
    if not any(part in target for part in parts for target in named):
        return call
    if call.get("quantization_config") is not None:
        keywords["quantization_config"] = call["quantization_config"]
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        keywords["device_map"] = None
    args = copy.copy(args)
    args.model_init_kwargs = None
    set_seed(args.seed)
    model = create_model_from_path(name, **keywords)
    if call.get("processing_class") is None:
        call = {**call, "processing_class": AutoProcessor.from_pretrained(name, **of_hub)}
    return {**call, "args": args, "model": model, "quantization_config": None}
