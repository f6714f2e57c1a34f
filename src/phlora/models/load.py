"""Loading a model, its tokenizer and an adapter, and saying where they came from and what was chosen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from phlora.config import ModelConfig, quantization_config
from phlora.errors import ModelError, NoRoomError
from phlora.extras import require
from phlora.files import read_json
from phlora.models import phi3
from phlora.models.choices import (
    DTYPES,
    Choice,
    choose_attention,
    choose_device,
    choose_dtype,
)
from phlora.models.fingerprint import fingerprint, split_fingerprint
from phlora.models.quantized import quantize
from phlora.models.requirements import needed_by_model
from phlora.models.sources import (
    Location,
    ModelSource,
    first_line,
    locate,
    path_advice,
    reading,
    resolve_source,
)

__all__ = [
    "ADAPTER_FACTS",
    "AdapterReport",
    "LoadedAdapter",
    "LoadedModel",
    "LoadedTokenizer",
    "ModelSource",
    "fingerprint",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "prepare_tokenizer",
    "resolve_source",
]

# Written beside an adapter's tensors; `base_fingerprint` in it names the weights it was trained on.
ADAPTER_FACTS = "phlora.json"


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer ready for training and generation.

    Attributes:
        tokenizer: its `pad_token` ends no reply.
        stop_token_ids: ids that end a reply, the end of a turn first.
        turn_end_token: the token that ends an assistant's turn.
        family: of the model.
        training_template: chat template with generation markers, None when none is known.
        notes: what the user should hear.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    turn_end_token: str
    family: phi3.Family
    training_template: str | None
    notes: tuple[str, ...] = ()


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


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What was read from an adapter folder.

    Attributes:
        num_tensors: tensors in the file; every one was used.
        delta_norm: root of the summed squares of all lora_B tensors; at 0 the adapter changes nothing.
        base_model: the base's name as the adapter records it.
        notes: what the user should hear.
    """

    num_tensors: int
    delta_norm: float
    base_model: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """A base model with an adapter on it (a `peft.PeftModel`), and what was read."""

    model: nn.Module
    report: AdapterReport


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
    config, remote, notes = _load_config(location, trust_remote_code=trust_remote_code)
    return _load_tokenizer(location, config, trust_remote_code=remote, notes=notes)


def _load_config(
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


def _load_tokenizer(
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
    family = phi3.family_of(config, tokenizer)
    stops = phi3.stop_token_ids(tokenizer, generation_config, family=family)
    shipped, chosen = tokenizer.pad_token, phi3.choose_pad_token(tokenizer, stops)
    if chosen != shipped:
        tokenizer.pad_token = chosen
        reason = f"the tokenizer's own, {shipped}, ends replies" if shipped else "the tokenizer names none"
        notes += (f"Padding with {chosen}: {reason}",)
    if not tokenizer.chat_template:
        notes += ("The tokenizer has no chat template: it can train on plain text, not on chats",)
    return LoadedTokenizer(
        tokenizer=tokenizer,
        stop_token_ids=stops,
        turn_end_token=phi3.turn_end_token(tokenizer),
        family=family,
        training_template=phi3.training_template(tokenizer),
        notes=notes,
    )


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
    config, remote, notes = _load_config(location, trust_remote_code=trust_remote_code)
    tokenizer = _load_tokenizer(location, config, trust_remote_code=remote, notes=notes)
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


def load_adapter(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    trainable: bool = False,
    allow_zero: bool = False,
) -> LoadedAdapter:
    """Put a plain PEFT adapter on a base model, in place, or leave the base model as it was and say why not.

    Args:
        model: the base, without an adapter.
        folder: with adapter_config.json and adapter_model.safetensors.
        trainable: whether its parameters require gradients.
        allow_zero: accept an adapter that changes nothing, as a fresh one.

    Raises:
        ModelError: no adapter there, another base, unused or missing tensors, or a zero delta.
    """
    from peft import PeftConfig, PeftModelForCausalLM

    path = Path(folder).expanduser()
    file = _adapter_file(path)
    tensors, delta_norm = _survey_adapter(file)
    if delta_norm == 0 and not allow_zero:
        raise ModelError("The adapter changes nothing: every lora_B is zero", where=str(file))
    notes = _compare_base(model, path)
    try:
        config = PeftConfig.from_pretrained(str(path))
        config.inference_mode = not trainable
        adapted = PeftModelForCausalLM(model, config)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"The adapter does not fit ({first_line(error)})", where=str(path)) from error
    try:
        result = adapted.load_adapter(str(path), "default", is_trainable=trainable)
        _require_all_used(result, tensors, where=str(file))
    except RuntimeError as error:
        adapted.unload()
        raise ModelError(
            f"The adapter's sizes do not fit the model ({first_line(error)})", where=str(file)
        ) from error
    except ModelError:
        adapted.unload()
        raise
    report = AdapterReport(
        num_tensors=tensors, delta_norm=delta_norm, base_model=config.base_model_name_or_path, notes=notes
    )
    return LoadedAdapter(model=adapted, report=report)


def _adapter_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelError("The adapter's folder does not exist", where=str(folder), fix=path_advice(folder))
    file = folder / "adapter_model.safetensors"
    missing = [path.name for path in (folder / "adapter_config.json", file) if not path.is_file()]
    if missing:
        raise ModelError(f"The folder holds no adapter: it lacks {' and '.join(missing)}", where=str(folder))
    kind = read_json(folder / "adapter_config.json", ModelError).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"The adapter is of the kind {kind}", where=str(folder), expected="a LoRA adapter")
    return file


def _survey_adapter(file: Path) -> tuple[int, float]:
    """How many tensors an adapter file holds, and the norm of all its lora_B."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            squares = [tensors.get_tensor(n).double().pow(2).sum().item() for n in names if "lora_B" in n]
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"The adapter cannot be read ({first_line(error)})",
            where=str(file),
            fix="the file may be incomplete: copy it again",
        ) from error
    return len(names), sum(squares) ** 0.5


def _compare_base(model: PreTrainedModel, folder: Path) -> tuple[str, ...]:
    """Refuse an adapter of other weights; a note where that cannot be told."""
    facts = folder / ADAPTER_FACTS
    recorded = read_json(facts, ModelError).get("base_fingerprint") if facts.is_file() else None
    if not recorded:
        return ("The adapter does not say which weights it was trained on, so they are not compared",)
    precision = recorded.partition(":")[0]
    trained_on, trained_storage = split_fingerprint(recorded)
    base, storage = split_fingerprint(
        fingerprint(model, precision=precision if precision in DTYPES else None)
    )
    if trained_on == base:
        return () if trained_storage == storage else (_other_storage(trained_storage, storage),)
    if {DTYPES.get(precision), model.dtype} == {torch.float16, torch.bfloat16}:
        return ("Whether the adapter was trained on these weights cannot be told across float16",)
    raise ModelError(
        "The adapter was trained on other weights than these",
        where=str(facts),
        expected=f"a base with the fingerprint {recorded}, not {fingerprint(model)}",
        fix="load the adapter's own base model, in the revision that it was trained on",
    )


def _other_storage(trained: str, here: str) -> str:
    names = [f"the {storage} form" if storage else "the unquantised form" for storage in (trained, here)]
    return f"The adapter was trained on {names[0]} of these weights and sits on {names[1]}: compare its loss on both"


def _require_all_used(result: Any, num_tensors: int, *, where: str) -> None:
    unused, missing = result.unexpected_keys, result.missing_keys
    if unused:
        raise ModelError(
            f"{len(unused)} of {num_tensors} tensors unused: the model has no place for {unused[0]}",
            where=where,
            expected="an adapter whose module names are those of the model",
            fix="convert the adapter to the model's own module names first",
        )
    if missing:
        raise ModelError(f"The adapter lacks {len(missing)} tensors, such as {missing[0]}", where=where)
