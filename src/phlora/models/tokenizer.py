"""A model's tokenizer, ready for training and generation, and the configuration that it is read beside."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from phlora.config import TRUST_VARIABLE, ModelConfig, QuantizationConfig, quantization_config
from phlora.errors import ConfigError, ModelError, did_you_mean
from phlora.model_names import in_own_words
from phlora.models import families
from phlora.models.locate import Location, ModelSource, locate, reading, resolve_source
from phlora.parameters import require_path


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files of a model, found once for its tokenizer and its weights.

    Attributes:
        model: what was asked for.
        config: the model's configuration.
        runs_code: whether code that comes with the model may run.
        notes: what the user should hear.
    """

    model: ModelConfig
    location: Location
    config: PreTrainedConfig
    runs_code: bool = False
    notes: tuple[str, ...] = ()

    def belong_to(self, model: ModelConfig) -> bool:
        """Whether they are those of this model too: its name, revision and rights are the same."""
        return all(
            getattr(self.model, name) == getattr(model, name)
            for name in ("name", "revision", "offline", "trust_remote_code")
        )


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer ready for training and generation.

    Attributes:
        tokenizer: its `pad_token` ends no reply.
        stop_token_ids: ids that end a reply, the end of a turn first.
        family: of the model.
        training_template: chat template with generation markers, None when none is known.
        notes: what the user should hear.
        files: of the model that it was read from; None for one made in memory.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    family: families.Family
    training_template: str | None
    notes: tuple[str, ...] = ()
    files: ModelFiles | None = field(default=None, repr=False, compare=False)


class ModelFields(TypedDict, total=False):
    """The fields of `ModelConfig` that a model may be loaded with, beside its name."""

    dtype: str
    attn_implementation: str
    use_cache: bool
    device: str
    storage_dtype: str
    quantization: str | Mapping[str, Any] | QuantizationConfig | None
    revision: str | None
    offline: bool
    trust_remote_code: bool


def model_config(model: ModelConfig | str | os.PathLike[str], fields: ModelFields) -> ModelConfig:
    """What `load_model` and `load_tokenizer` are asked for, as one object.

    Raises:
        ConfigError: a field that there is not, with the nearest name that there is; or no name of a model.
    """
    known = ModelFields.__annotations__
    fields = cast(ModelFields, in_own_words(fields, where="load_model").values)
    for name in fields:
        if name not in known:
            raise ConfigError(f"A model has no setting `{name}`", fix=did_you_mean(name, known))
    changes: dict[str, Any] = dict(fields)
    if "quantization" in changes:
        changes["quantization"] = quantization_config(changes["quantization"])
    if not isinstance(model, ModelConfig):
        require_path(model, where="model", expected="a model by its name or folder")
    config = model if isinstance(model, ModelConfig) else ModelConfig(name=os.fspath(model))
    return replace(config, **changes)


def load_tokenizer(
    model: ModelConfig | str | os.PathLike[str], **fields: Unpack[ModelFields]
) -> LoadedTokenizer:
    """The tokenizer of a model, with a pad token that ends no reply and with every stop token known; needs no weights.

    Args:
        model: embedded name, folder, `.gguf` file or hub id, or all settings as a `ModelConfig`.
        fields: settings in the place of those of `model`; `revision`, `offline` and `trust_remote_code` matter.

    Raises:
        ModelError: there is no such model, or its files cannot be read.
        NetworkError: it is not on this machine and no hub may or can be asked.
    """
    return read_tokenizer(find_files(model_config(model, fields), needs_weights=False))


def find_files(model: ModelConfig, *, needs_weights: bool = True) -> ModelFiles:
    """Where the files of a model are, with its configuration; a hub is asked once, here.

    Args:
        needs_weights: False: a folder may hold the configuration and the tokenizer alone.

    Raises:
        ModelError, NetworkError: as `load_tokenizer`.
    """
    source = resolve_source(model.name, revision=model.revision, needs_weights=needs_weights)
    location = locate(source, offline=model.offline)
    with reading(location, "The configuration"):
        # A GGUF file carries no code, and reading its head takes seconds.
        in_gguf = location.source.kind == "gguf"
        raw = {} if in_gguf else PreTrainedConfig.get_config_dict(location.path, **location.kwargs)[0]
        native = raw.get("model_type") == "phi3"
        runs_code = model.trust_remote_code and not native
        if raw.get("auto_map") and raw.get("model_type") not in CONFIG_MAPPING and not runs_code:
            raise ModelError(
                f"The model type `{raw.get('model_type')}` needs code that comes with the model",
                where=location.source.location,
                fix="read that code, then set model.trust_remote_code: true to train, or "
                f"{TRUST_VARIABLE}=1 for a run that was trained with it",
            )
        config = AutoConfig.from_pretrained(location.path, trust_remote_code=runs_code, **location.kwargs)
    note = "trust_remote_code is not used: transformers has Phi-3 itself, the model's own copy is outdated"
    return ModelFiles(
        model=model,
        location=location,
        config=config,
        runs_code=runs_code,
        notes=(note,) if model.trust_remote_code and native else (),
    )


def read_tokenizer(files: ModelFiles, *, folder: Path | None = None) -> LoadedTokenizer:
    """The tokenizer among the files of a model, or that of an adapter folder on this model.

    Raises:
        ModelError: its files cannot be read.
    """
    location = files.location if folder is None else _folder_location(folder)
    with reading(location, "The tokenizer" if folder is None else "The adapter's tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            location.path, trust_remote_code=files.runs_code, **location.kwargs
        )
    prepared = prepare_tokenizer(
        tokenizer,
        config=files.config,
        generation_config=generation_config_of(files.location),
        notes=files.notes,
    )
    return replace(prepared, files=files)


def _folder_location(folder: Path) -> Location:
    source = ModelSource(name=str(folder), kind="folder", location=str(folder))
    return locate(source, offline=True)


def generation_config_of(location: Location) -> GenerationConfig | None:
    """What a model's files say of generation; None where they say nothing."""
    if location.source.kind == "gguf":
        return None
    try:
        return GenerationConfig.from_pretrained(location.path, **location.kwargs)
    except OSError:
        # Many models have none.
        return None


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None = None,
    notes: tuple[str, ...] = (),
) -> LoadedTokenizer:
    """Find the stop tokens of a tokenizer in memory, and give it a pad token that is none of them.

    `tokenizer.pad_token` is changed in place where it ends replies, as Phi-3's own; the vocabulary stays.

    Raises:
        ModelError: no token ends a turn, or none is left for padding.
    """
    family = families.family_of(config, tokenizer)
    stops = families.stop_token_ids(tokenizer, generation_config, family=family)
    shipped, chosen = tokenizer.pad_token, families.choose_pad_token(tokenizer, stops)
    if chosen != shipped:
        tokenizer.pad_token = chosen
        reason = f"the tokenizer's own, {shipped}, ends replies" if shipped else "the tokenizer names none"
        notes += (f"Padding with {chosen}: {reason}",)
    if not tokenizer.chat_template:
        notes += ("The tokenizer has no chat template: it can train on plain text, not on chats",)
    return LoadedTokenizer(
        tokenizer=tokenizer,
        stop_token_ids=stops,
        family=family,
        training_template=families.training_template(tokenizer),
        notes=notes,
    )
