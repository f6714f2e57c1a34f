"""The model that trains: loaded by its name, or handed over as an object (`handed_over` gives that one back)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from phlora.config import ModelConfig
from phlora.display import Display
from phlora.errors import ConfigError, ModelError
from phlora.models.device import DTYPES, Choice, choose_device
from phlora.models.fingerprint import fingerprint
from phlora.models.load import LoadedModel, load_model
from phlora.models.locate import ModelSource, resolve_source
from phlora.models.quantization import use_operands
from phlora.models.storage import STORAGES
from phlora.models.stored_layers import compute_dtype
from phlora.models.tokenizer import LoadedTokenizer, find_files, prepare_tokenizer, read_tokenizer
from phlora.train.request import IN_MEMORY, Objects

_OBJECT = "as it was handed over"


def device_of(model: ModelConfig, objects: Objects) -> torch.device:
    """Where the training computes: where the object is, or where the configuration says."""
    if objects.model is None:
        return choose_device(model.device)
    return require_plain_model(objects.model).device


def tokenizer_of(model: ModelConfig, objects: Objects, *, needs_weights: bool) -> LoadedTokenizer:
    """The tokenizer that was handed over, or the model's own.

    Args:
        needs_weights: whether a model whose weights are not there is refused now, before anything else is done.

    Raises:
        ModelError: the tokenizer of a model object is nowhere to be found.
    """
    if objects.tokenizer is None:
        if objects.model is not None and model.name == IN_MEMORY:
            raise ModelError(
                "The model object does not say where it came from, so that its tokenizer cannot be loaded",
                fix="give it too: finetune(model=model, tokenizer=tokenizer, ...)",
            )
        return read_tokenizer(find_files(model, needs_weights=needs_weights))
    if objects.model is not None:
        checked = require_plain_model(objects.model)
        return prepare_tokenizer(
            copy.deepcopy(objects.tokenizer),
            config=checked.config,
            generation_config=checked.generation_config,
        )
    own = read_tokenizer(find_files(model, needs_weights=needs_weights))
    prepared = prepare_tokenizer(copy.deepcopy(objects.tokenizer), config=own.files.config)  # type: ignore[union-attr]
    return replace(prepared, files=own.files)


def as_before(model: ModelConfig, facts: Mapping[str, Any]) -> ModelConfig:
    """The settings with which a run is continued: what `auto` chose then is not chosen again.

    What is timed, or depends on the memory that is free, may fall otherwise in another process.
    """
    then = facts.get("model", {})
    if model.dtype == "auto" and then.get("dtype") in DTYPES:
        model = replace(model, dtype=then["dtype"])
    stored = then.get("storage")
    if model.storage_dtype == "auto" and model.quantization is None and stored in STORAGES:
        model = replace(model, storage_dtype=stored)
    return model


def model_of(
    model: ModelConfig,
    objects: Objects,
    tokenizer: LoadedTokenizer,
    *,
    device: torch.device,
    display: Display,
) -> LoadedModel:
    """The model that was handed over, or the one that the configuration names.

    Raises:
        ModelError: the object is no causal language model of transformers, or carries an adapter already.
    """
    if objects.model is None:
        return load_model(replace(model, device=str(device)), tokenizer=tokenizer, display=display)
    given = require_plain_model(objects.model)
    use_operands(given)
    return LoadedModel(
        model=given,
        tokenizer=tokenizer,
        source=_source(model.name),
        device=device,
        dtype=Choice(value=compute_dtype(given), reason=_OBJECT),
        attention=Choice(value=given.config._attn_implementation or "eager", reason=_OBJECT),
        storage=Choice(value=str(given.dtype).removeprefix("torch."), reason=_OBJECT),
        fingerprint=fingerprint(given, trusted=False),
        notes=tokenizer.notes,
    )


def require_plain_model(model: nn.Module) -> PreTrainedModel:
    """
    Raises:
        ModelError: no plain model of transformers.
    """
    carries = hasattr(model, "peft_config") or any(isinstance(m, BaseTunerLayer) for m in model.modules())
    if isinstance(model, PreTrainedModel) and not carries:
        return model
    found = f"The model is a `{type(model).__name__}`"
    fix = "give the base model, as from AutoModelForCausalLM.from_pretrained; finetune attaches the adapter"
    if carries:
        found += ", which carries an adapter already"
        fix += (
            ". A model around which PEFT put an adapter, as run.model after finetune, gives it back by unload(), or "
            "with the adapter in its weights by merge_and_unload()"
        )
    raise ModelError(found, expected="a causal language model of transformers, without an adapter", fix=fix)


def require_no_adapted_head(model: nn.Module) -> None:
    """The loss is computed from the head's own weight.

    Raises:
        ConfigError: an adapter sits on the head, where it would not train.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, LoraLayer):
        raise ConfigError(
            "An adapter on the head (lm_head) would not train: the loss is computed from the head's own weight",
            where="peft_config.target_modules",
            fix="leave it out, or train the whole head by modules_to_save: [lm_head]",
        )


def _source(name: str) -> ModelSource:
    """Where a model object says that it came from; it need not be there any more."""
    try:
        return resolve_source(name)
    except ModelError:
        return ModelSource(name=name, kind="folder", location=name)
