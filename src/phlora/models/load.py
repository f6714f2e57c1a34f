"""Loading a model with its tokenizer, and saying where they came from and what was chosen."""

from __future__ import annotations

import contextlib
import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from phlora.config import ModelConfig
from phlora.display import Display
from phlora.errors import ConfigError, EnvironmentProblem, ModelError, NetworkError, NoRoomError
from phlora.extras import require
from phlora.model_names import in_own_words
from phlora.models.causal_lm import embedding_weight
from phlora.models.checkpoint import Checkpoint, is_here, open_checkpoint, pickled_numbers
from phlora.models.device import (
    DTYPES,
    Choice,
    choose_attention,
    choose_device,
    choose_dtype,
)
from phlora.models.families import has_plain_layout, widest_product
from phlora.models.fingerprint import WeightsIdentity, fingerprint, identity_of, keep_identity
from phlora.models.locate import ModelSource, reading
from phlora.models.packed import PackedCheckpoint, Packing, method_of, open_packed, packing_of, plain_config
from phlora.models.quantization import (
    layers_to_quantize,
    quantize,
    require_bitsandbytes,
    require_unquantized,
    storage_name,
    stored_bytes,
    use_operands,
)
from phlora.models.requirements import needed_by_model
from phlora.models.storage import QUANTIZED, Storage, asked_dtype, choose_storage, storage_settings
from phlora.models.stored_layers import compute_wider, require_finite, store
from phlora.models.streaming import Skeleton, empty_model, fill, sizes_of, skeleton
from phlora.models.tokenizer import (
    LoadedTokenizer,
    ModelFields,
    ModelFiles,
    find_files,
    model_config,
    read_tokenizer,
)

_MEGABYTE = 1_000_000
# Megabytes from which reading takes long enough to be shown.
_WORTH_SHOWING = 1_000


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its tokenizer, and what was chosen for this machine.

    Attributes:
        dtype: what is computed with.
        storage: what the weights are stored as.
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
    storage: Choice[str]
    notes: tuple[str, ...] = ()


def load_model(
    model: ModelConfig | str | os.PathLike[str],
    *,
    tokenizer: LoadedTokenizer | None = None,
    display: Display | None = None,
    **fields: Unpack[ModelFields],
) -> LoadedModel:
    """Load a causal language model for training or generation: `load_model("smollm2-135m", dtype="float32")`.

    Args:
        model: embedded name, folder, `.gguf` file or hub id, or all settings as a `ModelConfig`.
        tokenizer: the model's own, where it is loaded already; it is not read again, and no hub is asked again.
        display: where the progress of reading a large model goes; nowhere by default.
        fields: settings in the place of those of `model`, also under the names of `phlora.model_names`:
            dtype: what is computed with: `auto`, or a key of `DTYPES`; `auto` takes what is fastest and sound here and
                says why.
            storage_dtype: what the weights are stored as: `auto`, or one of `STORAGES`; `auto` takes what loses
                nothing and fits into the memory that is free, and says why.
            attn_implementation: `auto`, or one of `ATTENTIONS`.
            use_cache: the model's default for keeping keys and values; training wants False.
            revision: branch, tag or commit of a hub model.
            offline: never ask a network.
            trust_remote_code: run code that comes with a hub model; never done for Phi-3, which transformers has.
            device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
            quantization: `nf4`, `int8` or `QuantizationConfig` fields: the linear layers of the blocks in 4 or
                8 bits, as `storage_dtype` says it too; None leaves the model as it is.

    Raises:
        ModelError: there is no such model, or its files cannot be read or are incomplete.
        ConfigError: an unknown dtype, attention, device or quantization, or a model that is quantised already.
        EnvironmentProblem: a device or package that this machine lacks.
        NoRoomError: the weights do not fit into memory, however they may be stored.
        NetworkError: the model is not on this machine and no hub may or can be asked.
    """
    told = in_own_words(fields, where="load_model").notes
    wanted = storage_settings(model_config(model, fields))
    require(needed_by_model(wanted))
    device = choose_device(wanted.device)
    found = tokenizer.files if tokenizer is not None else None
    files = found if found is not None and found.belong_to(wanted) else find_files(wanted)
    dtype = choose_dtype(wanted.dtype, device=device, product=widest_product(files.config))
    attention = choose_attention(wanted.attn_implementation, device=device, dtype=dtype.value)
    tokenizer = tokenizer or read_tokenizer(files)
    loading = _Loading(files, wanted, dtype.value, device, attention.value, display or Display(quiet=True))
    weights, storage, notes = loading.load()
    _check_vocabulary(weights, tokenizer, where=files.location.source.location)
    _agree_on_tokens(weights, tokenizer)
    weights.config.use_cache = wanted.use_cache
    return LoadedModel(
        model=weights,
        tokenizer=tokenizer,
        source=files.location.source,
        device=device,
        dtype=dtype,
        attention=attention,
        storage=storage,
        fingerprint=fingerprint(weights),
        notes=told + tokenizer.notes + notes,
    )


@dataclass(frozen=True)
class _Loading:
    """What the weights are loaded with."""

    files: ModelFiles
    wanted: ModelConfig
    dtype: torch.dtype
    device: torch.device
    attention: str
    display: Display

    def load(self) -> tuple[PreTrainedModel, Choice[str], tuple[str, ...]]:
        """The model on its device, what it is stored as, and notes."""
        packing = packing_of(self.files.config)
        if packing is not None and not self.files.runs_code:
            return self._unpacked(packing)
        if self.files.runs_code or getattr(self.files.config, "quantization_config", None) is not None:
            return self._as_transformers_does()
        with reading(self.files.location, "The weights"):
            checkpoint = open_checkpoint(self.files.location)
        return self._from(checkpoint)

    def _unpacked(self, packing: Packing) -> tuple[PreTrainedModel, Choice[str], tuple[str, ...]]:
        """Weights of GPTQ or AWQ as the dense ones that they stand for, where the layout is one that is read here."""
        source = self.files.location.source.location
        asked = "quantization" if self.wanted.quantization is not None else "storage_dtype"
        if self.wanted.quantization is not None or self.wanted.storage_dtype in QUANTIZED:
            raise ConfigError(
                f"The model is quantised already, by {packing.method}",
                where=f"model.{asked}",
                fix=f"leave `{asked}` out, or name its 16-bit original",
            )
        with reading(self.files.location, "The weights"):
            checkpoint = open_checkpoint(self.files.location)
        if checkpoint is None or not has_plain_layout(self.files.config):
            return self._as_transformers_does()
        dense = open_packed(checkpoint, packing, where=source)
        plain = replace(self, files=replace(self.files, config=plain_config(self.files.config)))
        model, storage, notes = plain._from(dense)
        told = (
            f"{packing.method}: {len(dense.parts)} packed matrices are read as the dense ones that they compute with, "
            f"stored in {storage.value}"
        )
        return model, storage, (told, *notes)

    def _from(self, checkpoint: Checkpoint | None) -> tuple[PreTrainedModel, Choice[str], tuple[str, ...]]:
        """A model of dense weights."""
        with reading(self.files.location, "The weights"):
            empty = empty_model(self.files, dtype=self.dtype, attention=self.attention)
            numbers = _numbers(self.files, checkpoint)
            bones = skeleton(empty, checkpoint, self.files.location)
        if bones is None and isinstance(checkpoint, PackedCheckpoint):
            raise ModelError(
                "The packed weights are not those that the configuration calls for",
                where=self.files.location.source.location,
                fix="copy or download the model again, or name its 16-bit original",
            )
        sizes = sizes_of(empty, _most_common(numbers, self.files))
        storage = choose_storage(self.wanted, sizes, dtype=self.dtype, device=self.device)
        if storage.value.quantization is not None:
            require_bitsandbytes()
        del empty
        if bones:
            model, notes = self._streamed(bones, storage.value)
        else:
            model, notes = self._converted(storage.value, narrow=set(numbers) == {storage.value.dtype})
        return model, Choice(value=str(storage.value), reason=storage.reason), notes

    def _streamed(self, bones: Skeleton, storage: Storage) -> tuple[PreTrainedModel, tuple[str, ...]]:
        megabytes = bones.num_bytes // _MEGABYTE
        shown = megabytes if megabytes >= _WORTH_SHOWING else 0
        with (
            reading(self.files.location, "The weights"),
            self._needing_room(bones.model),
            self.display.progress("Reading the weights", shown, unit="MB") as advance,
        ):
            done = _Megabytes(advance)
            model, identity, notes = fill(
                bones, storage, dtype=self.dtype, device=self.device, advance=done.add
            )
            nn.Module.to(model, self.device)
        _keep(model, identity, storage)
        return model, notes + _of_unused(bones.unused)

    def _converted(self, storage: Storage, *, narrow: bool) -> tuple[PreTrainedModel, tuple[str, ...]]:
        """Loaded whole by transformers, then stored as asked, one layer after the other.

        Args:
            narrow: whether every tensor of the files has the dtype of the storage: then none is rounded to it, and
                none widened that is to be stored so.
        """
        narrow = narrow and storage.quantization is None
        model, notes = self._by_transformers(storage.dtype if narrow else self.dtype)
        identity = identity_of(model)
        with self._needing_room(model):
            layers = None
            if storage.quantization:
                # What is quantised is not rounded to the dtype of the rest before.
                layers = layers_to_quantize(model, storage.quantization, device=self.device)
                layers.put_all()
            if narrow and storage.dtype != self.dtype:
                compute_wider(model, self.dtype)
            else:
                store(model, storage.dtype)
            notes += () if layers is None else (str(layers.report()),)
            nn.Module.to(model, self.device)
        _keep(model, identity, storage)
        return model, notes

    def _as_transformers_does(self) -> tuple[PreTrainedModel, Choice[str], tuple[str, ...]]:
        """A model that is quantised already, or that brings its own code."""
        with _naming_method(self.files):
            model, notes = self._by_transformers(self.dtype)
        use_operands(model)
        storage = Choice(value=str(self.dtype).removeprefix("torch."), reason="what is computed with")
        if getattr(model, "is_quantized", False):
            storage = Choice(value=str(method_of(model.config)), reason="as it is in the files")
        with self._needing_room(model):
            if self.wanted.quantization:
                notes += (str(quantize(model, self.wanted.quantization, device=self.device)),)
                storage = Choice(value=self.wanted.quantization.type, reason="asked for")
            elif self.wanted.storage_dtype != "auto":
                require_unquantized(model, setting="storage_dtype")
                store(model, asked_dtype(self.wanted.storage_dtype, compute=self.dtype))
                storage = Choice(value=self.wanted.storage_dtype, reason="asked for")
            nn.Module.to(model, self.device)
        return model, storage, notes

    def _by_transformers(self, dtype: torch.dtype) -> tuple[PreTrainedModel, tuple[str, ...]]:
        files = self.files
        with reading(files.location, "The weights"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files.location.path,
                config=copy.deepcopy(files.config),
                dtype=dtype,
                attn_implementation=self.attention,
                trust_remote_code=files.runs_code,
                output_loading_info=True,
                # It tells which these are; else its error does not.
                ignore_mismatched_sizes=True,
                **files.location.kwargs,
            )
        model, loading = loaded
        missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
        for name, found, wanted in sorted(loading["mismatched_keys"]):
            raise ModelError(
                f"The weights cannot be read: {name} has the shape {tuple(found)}, "
                f"the configuration calls for {tuple(wanted)}",
                where=files.location.source.location,
                fix="copy or download the model again, or correct its config.json",
            )
        if missing:
            raise ModelError(
                f"The weights lack {len(missing)} tensors that the configuration calls for, such as {missing[0]}",
                where=files.location.source.location,
                fix="copy or download the model again, or correct its config.json",
            )
        for name, parameter in model.named_parameters():
            require_finite(parameter, name=name)
        return model.eval(), _of_unused(unexpected)

    def _needing_room(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return _needing_room(model, self.device)


@contextlib.contextmanager
def _naming_method(files: ModelFiles) -> Iterator[None]:
    """An error about a quantised model says by what, and that its original needs nothing of the kind."""
    method = method_of(files.config)
    try:
        yield
    except (EnvironmentProblem, ModelError) as error:
        if method is None or isinstance(error, NoRoomError | NetworkError):
            raise
        raise type(error)(
            f"The model is quantised by `{method}`. {error.found}",
            where=error.where or files.location.source.location,
            expected=error.expected,
            fix=f"{error.fix or 'install what it asks for'}, or name its 16-bit original",
        ) from error


def _keep(model: PreTrainedModel, identity: WeightsIdentity, storage: Storage) -> None:
    quantization = storage.quantization
    keep_identity(model, identity, storage="" if quantization is None else storage_name(quantization))


def stored_dtype(files: ModelFiles) -> torch.dtype:
    """What most of a model's weights are in its files, by their heads where these are here, else by its configuration.

    Nothing is downloaded.

    Raises:
        ModelError: the files cannot be read.
    """
    with reading(files.location, "The weights"):
        if not is_here(files.location):
            return _most_common(Counter(), files)
        return _most_common(_numbers(files, open_checkpoint(files.location)), files)


def _numbers(files: ModelFiles, checkpoint: Checkpoint | None) -> Counter[torch.dtype]:
    """How many numbers a model's files hold in each dtype; empty where their heads do not tell."""
    return pickled_numbers(files.location) if checkpoint is None else checkpoint.numbers


def _most_common(numbers: Counter[torch.dtype], files: ModelFiles) -> torch.dtype:
    stated = DTYPES.get(str(files.config.dtype).removeprefix("torch."), torch.float32)
    return max(numbers, key=numbers.__getitem__, default=stated)


@dataclass
class _Megabytes:
    """Bytes that are done, shown as megabytes."""

    advance: Callable[[int], None]
    left: int = 0

    def add(self, num_bytes: int) -> None:
        done, self.left = divmod(self.left + num_bytes, _MEGABYTE)
        self.advance(done)


def _of_unused(names: Sequence[str]) -> tuple[str, ...]:
    return (f"{len(names)} tensors of the file are not used, such as {names[0]}",) if names else ()


@contextlib.contextmanager
def _needing_room(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NoRoomError(
            f"The weights take {stored_bytes(model) / 1e9:.1f} GB, more than {device} has free",
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
