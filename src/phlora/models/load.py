"""Loading a model with its tokenizer, and saying where they came from and what was chosen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from phlora.config import ModelConfig, quantization_config
from phlora.errors import ModelError, NoRoomError
from phlora.extras import require
from phlora.models.device import (
    Choice,
    choose_attention,
    choose_device,
    choose_dtype,
)
from phlora.models.fingerprint import fingerprint
from phlora.models.locate import (
    Location,
    ModelSource,
    locate,
    reading,
    resolve_source,
)
from phlora.models.quantization import quantize
from phlora.models.requirements import needed_by_model
from phlora.models.tokenizer import LoadedTokenizer, read_config, read_tokenizer


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
    name: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    attn_implementation: str = "auto",
    use_cache: bool = False,
    revision: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    device: str = "auto",
    quantization: str | Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load a causal language model for training or generation.

    Args:
        name: embedded name, folder, `.gguf` file or hub id.
        dtype: `auto`, or a key of `DTYPES`; `auto` takes what is fastest and sound here and says why.
        attn_implementation: `auto`, or one of `ATTENTIONS`.
        use_cache: the model's default for keeping keys and values; training wants False.
        revision: branch, tag or commit of a hub model.
        offline: never ask a network.
        trust_remote_code: run code that comes with a hub model; never done for Phi-3, which transformers has.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        quantization: `nf4`, `int8` or a mapping of `QuantizationConfig` fields: the linear layers of the blocks
            in 4 or 8 bits, everything else in `dtype`; None leaves the model as it is.

    Raises:
        ModelError: there is no such model, or its files cannot be read or are incomplete.
        ConfigError: an unknown dtype, attention, device or quantization, or a model that is quantised already.
        EnvironmentProblem: a device or package that this machine lacks.
        NetworkError: the model is not on this machine and no hub may or can be asked.
    """
    storage = quantization_config(quantization)
    require(needed_by_model(ModelConfig(name=str(name), quantization=storage)))
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, device=chosen_device)
    attention = choose_attention(attn_implementation, device=chosen_device, dtype=chosen_dtype.value)
    location = locate(resolve_source(name, revision=revision), offline=offline)
    config, remote, notes = read_config(location, trust_remote_code=trust_remote_code)
    tokenizer = read_tokenizer(location, config, trust_remote_code=remote, notes=notes)
    model, model_notes = _load_weights(
        location, config, dtype=chosen_dtype.value, attention=attention.value, trust_remote_code=remote
    )
    _check_vocabulary(model, tokenizer, where=location.source.location)
    _agree_on_tokens(model, tokenizer)
    model.config.use_cache = use_cache
    with _needing_room(model, chosen_device):
        if storage:
            model_notes += (str(quantize(model, storage, device=chosen_device)),)
        model = model.to(chosen_device)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        source=location.source,
        device=chosen_device,
        dtype=chosen_dtype,
        attention=attention,
        fingerprint=fingerprint(model),
        notes=tokenizer.notes + model_notes,
    )


def _load_weights(
    location: Location,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    with reading(location, "The weights"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            location.path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **location.kwargs,
        )
    missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing:
        raise ModelError(
            f"The weights lack {len(missing)} tensors that the configuration calls for, such as {missing[0]}",
            where=location.source.location,
            fix="copy or download the model again, or correct its config.json",
        )
    notes = (
        (f"{len(unexpected)} tensors of the file are not used, such as {unexpected[0]}",)
        if unexpected
        else ()
    )
    return model.eval(), notes


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
    rows = model.get_input_embeddings().weight.shape[0]
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
