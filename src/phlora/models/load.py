"""Loading a model with its tokenizer, and saying where they came from and what was chosen."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from phlora.config import ModelConfig
from phlora.errors import ModelError, NoRoomError
from phlora.extras import require
from phlora.models.causal_lm import embedding_weight
from phlora.models.device import (
    Choice,
    choose_attention,
    choose_device,
    choose_dtype,
)
from phlora.models.fingerprint import fingerprint
from phlora.models.locate import ModelSource, reading
from phlora.models.quantization import quantize
from phlora.models.requirements import needed_by_model
from phlora.models.tokenizer import (
    LoadedTokenizer,
    ModelFields,
    ModelFiles,
    find_files,
    model_config,
    read_tokenizer,
)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its tokenizer, and what was chosen for this machine.

    Attributes:
        fingerprint: of the weights, see `fingerprint`.
        notes: what the user should hear, the tokenizer's notes included.
    """

    model: PreTrainedModel
    tokenizer: LoadedTokenizer
    source: ModelSource
    device: torch.device
    dtype: Choice[torch.dtype]
    attention: Choice[str]
    fingerprint: str
    notes: tuple[str, ...] = ()


def load_model(
    model: ModelConfig | str | os.PathLike[str],
    *,
    tokenizer: LoadedTokenizer | None = None,
    **fields: Unpack[ModelFields],
) -> LoadedModel:
    """Load a causal language model for training or generation: `load_model("smollm2-135m", dtype="float32")`.

    Args:
        model: embedded name, folder, `.gguf` file or hub id, or all settings as a `ModelConfig`.
        tokenizer: the model's own, where it is loaded already; it is not read again, and no hub is asked again.
        fields: settings in the place of those of `model`:
            dtype: `auto`, or a key of `DTYPES`; `auto` takes what is fastest and sound here and says why.
            attn_implementation: `auto`, or one of `ATTENTIONS`.
            use_cache: the model's default for keeping keys and values; training wants False.
            revision: branch, tag or commit of a hub model.
            offline: never ask a network.
            trust_remote_code: run code that comes with a hub model; never done for Phi-3, which transformers has.
            device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
            quantization: `nf4`, `int8` or `QuantizationConfig` fields: the linear layers of the blocks in 4 or
                8 bits, everything else in `dtype`; None leaves the model as it is.

    Raises:
        ModelError: there is no such model, or its files cannot be read or are incomplete.
        ConfigError: an unknown dtype, attention, device or quantization, or a model that is quantised already.
        EnvironmentProblem: a device or package that this machine lacks.
        NetworkError: the model is not on this machine and no hub may or can be asked.
    """
    wanted = model_config(model, fields)
    require(needed_by_model(wanted))
    device = choose_device(wanted.device)
    dtype = choose_dtype(wanted.dtype, device=device)
    attention = choose_attention(wanted.attn_implementation, device=device, dtype=dtype.value)
    found = tokenizer.files if tokenizer is not None else None
    files = found if found is not None and found.belong_to(wanted) else find_files(wanted)
    tokenizer = tokenizer or read_tokenizer(files)
    weights, notes = _load_weights(files, dtype=dtype.value, attention=attention.value)
    _check_vocabulary(weights, tokenizer, where=files.location.source.location)
    _agree_on_tokens(weights, tokenizer)
    weights.config.use_cache = wanted.use_cache
    with _needing_room(weights, device):
        if wanted.quantization:
            notes += (str(quantize(weights, wanted.quantization, device=device)),)
        nn.Module.to(weights, device)
    return LoadedModel(
        model=weights,
        tokenizer=tokenizer,
        source=files.location.source,
        device=device,
        dtype=dtype,
        attention=attention,
        fingerprint=fingerprint(weights),
        notes=tokenizer.notes + notes,
    )


def _load_weights(
    files: ModelFiles, *, dtype: torch.dtype, attention: str
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    model: PreTrainedModel
    loading: dict[str, Any]
    with reading(files.location, "The weights"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.location.path,
            config=copy.deepcopy(files.config),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=files.runs_code,
            output_loading_info=True,
            **files.location.kwargs,
        )
        model, loading = loaded
    missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing:
        raise ModelError(
            f"The weights lack {len(missing)} tensors that the configuration calls for, such as {missing[0]}",
            where=files.location.source.location,
            fix="copy or download the model again, or correct its config.json",
        )
    if not unexpected:
        return model.eval(), ()
    return model.eval(), (f"{len(unexpected)} tensors of the file are not used, such as {unexpected[0]}",)


@contextlib.contextmanager
def _needing_room(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NoRoomError(
            f"The weights take {model.get_memory_footprint() / 1e9:.1f} GB, more than {device} has free",
            fix="choose a smaller model, dtype: bfloat16, quantization: nf4, or device: cpu",
        ) from error


def _check_vocabulary(model: PreTrainedModel, tokenizer: LoadedTokenizer, *, where: str) -> None:
    rows = embedding_weight(model).shape[0]
    largest = max(tokenizer.tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"The tokenizer has ids up to {largest}, the model has embeddings up to {rows - 1}",
            where=where,
            expected="a tokenizer that belongs to the model",
        )


def _agree_on_tokens(model: PreTrainedModel, tokenizer: LoadedTokenizer) -> None:
    """The model stops and pads with the tokenizer's choice, also in whatever is saved from it."""
    pad = tokenizer.tokenizer.pad_token_id
    model.config.pad_token_id = pad
    model.generation_config.pad_token_id = pad
    model.generation_config.eos_token_id = list(tokenizer.stop_token_ids)
