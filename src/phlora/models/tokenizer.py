"""A model's tokenizer, ready for training and generation, and the configuration that it is read beside."""

from __future__ import annotations

import os
from dataclasses import dataclass

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from phlora.errors import ModelError
from phlora.models import families
from phlora.models.locate import Location, locate, reading, resolve_source


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer ready for training and generation.

    Attributes:
        tokenizer: its `pad_token` ends no reply.
        stop_token_ids: ids that end a reply, the end of a turn first.
        family: of the model.
        training_template: chat template with generation markers, None when none is known.
        notes: what the user should hear.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    family: families.Family
    training_template: str | None
    notes: tuple[str, ...] = ()


def load_tokenizer(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> LoadedTokenizer:
    """The tokenizer of a model, with a pad token that ends no reply and with every stop token known.

    Raises:
        ModelError: there is no such model, or its files cannot be read.
        NetworkError: it is not on this machine and no hub may or can be asked.
    """
    location = locate(resolve_source(name, revision=revision), offline=offline)
    config, remote, notes = read_config(location, trust_remote_code=trust_remote_code)
    return read_tokenizer(location, config, trust_remote_code=remote, notes=notes)


def read_config(
    location: Location, *, trust_remote_code: bool
) -> tuple[PreTrainedConfig, bool, tuple[str, ...]]:
    """The configuration, whether the model's own code may run, and what to say about that."""
    with reading(location, "The configuration"):
        # A GGUF file carries no code, and reading its head takes seconds.
        in_gguf = location.source.kind == "gguf"
        raw = {} if in_gguf else PreTrainedConfig.get_config_dict(location.path, **location.kwargs)[0]
        native = raw.get("model_type") == "phi3"
        remote = trust_remote_code and not native
        if raw.get("auto_map") and raw.get("model_type") not in CONFIG_MAPPING and not remote:
            raise ModelError(
                f"The model type `{raw.get('model_type')}` needs code that comes with the model",
                where=location.source.location,
                fix="read that code, then set trust_remote_code: true",
            )
        config = AutoConfig.from_pretrained(location.path, trust_remote_code=remote, **location.kwargs)
    if trust_remote_code and native:
        note = (
            "trust_remote_code is not used: transformers has Phi-3 itself, the model's own copy is outdated"
        )
        return config, remote, (note,)
    return config, remote, ()


def read_tokenizer(
    location: Location, config: PreTrainedConfig, *, trust_remote_code: bool, notes: tuple[str, ...]
) -> LoadedTokenizer:
    with reading(location, "The tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            location.path, trust_remote_code=trust_remote_code, **location.kwargs
        )
    return prepare_tokenizer(
        tokenizer, config=config, generation_config=_generation_config(location), notes=notes
    )


def _generation_config(location: Location) -> GenerationConfig | None:
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
