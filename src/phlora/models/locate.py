"""What a model's name means, and where its files are.

A name is an embedded model, a local folder, a local `.gguf` file or a hub id, looked up in this order: a
misspelt folder is not asked of a hub. Whatever goes wrong is one `PhloraError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from phlora.errors import (
    EnvironmentProblem,
    ModelError,
    NetworkError,
    NoRoomError,
    nearest,
    shown,
)
from phlora.extras import require
from phlora.files import read_json
from phlora.models.builtin import EMBEDDED, GGUF_FILE, embedded_folder, silent_gguf

_HUB_TIMEOUT_SECONDS = 10
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
_WHOLE_MODELS = ("model.safetensors", "pytorch_model.bin")
# One of the files that an index belongs to.
_SHARD = re.compile(r"(.+)-\d+-of-\d+\.(safetensors|bin)")
# What transformers lets through when a file is not what it should be.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, RuntimeError, EOFError),
    *(SafetensorError, pickle.UnpicklingError, struct.error),
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: as the user gave it.
        kind: of source.
        location: the folder, the `.gguf` file or the hub id.
        revision: of a hub model, as asked for.
    """

    name: str
    kind: Literal["embedded", "folder", "gguf", "hub"]
    location: str
    revision: str | None = None


def resolve_source(
    name: str | os.PathLike[str], *, revision: str | None = None, needs_weights: bool = True
) -> ModelSource:
    """Decide what a name means, without reading a weight and without a network.

    An embedded name wins over a folder of the same name, which stays reachable as `./name`.

    Args:
        needs_weights: False: a folder may hold the configuration and the tokenizer alone.

    Raises:
        ModelError: a path that does not exist, a folder that holds no model, or a name that can be nothing.
    """
    text = os.fspath(name)
    if text in EMBEDDED:
        return ModelSource(name=text, kind="embedded", location=text)
    path = Path(text).expanduser()
    if not _is_usable(path):
        raise ModelError("No model can have this name", where=shown(text))
    if path.is_dir():
        _check_folder(path, needs_weights=needs_weights)
        return ModelSource(name=text, kind="folder", location=str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                "A single file that is no .gguf file is no model",
                where=text,
                expected="a folder with config.json and weights, or a .gguf file",
            )
        return ModelSource(name=text, kind="gguf", location=str(path))
    if _looks_like_path(text):
        raise ModelError("The folder does not exist", where=text, fix=path_advice(path))
    meant = nearest(text, EMBEDDED)
    if meant:
        raise ModelError(f"There is no model `{text}`", fix=f"did you mean the embedded model `{meant}`?")
    return ModelSource(name=text, kind="hub", location=text, revision=revision)


def _is_usable(path: Path) -> bool:
    try:
        path.exists()
    except (OSError, ValueError):
        return False
    return True


def _looks_like_path(text: str) -> bool:
    return (
        not _HUB_ID.fullmatch(text)
        or text.startswith(".")
        or text.endswith((".gguf", ".safetensors", ".bin", ".pt", ".pth"))
    )


def _sibling(path: Path) -> str | None:
    """The entry beside a missing path whose name is nearest."""
    if not path.parent.is_dir():
        return None
    match = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    return str(path.parent / match) if match else None


def path_advice(path: Path) -> str:
    sibling = _sibling(path)
    if sibling:
        return f"did you mean `{sibling}`?"
    return f"give an existing folder, a hub id such as owner/name, or one of {', '.join(EMBEDDED)}"


def _check_folder(folder: Path, *, needs_weights: bool) -> None:
    """Refuse a folder without config or weights, and tell an adapter from a model."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_json(folder / "adapter_config.json", ModelError).get("base_model_name_or_path")
        raise ModelError(
            f"This folder holds an adapter of `{base or 'an unnamed base model'}`, not a model",
            where=str(folder),
            expected="a folder with config.json and weights",
            fix="load the base model and put the adapter on it",
        )
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    missing += _missing_weights(folder) if needs_weights else []
    if missing:
        raise ModelError(
            f"The folder lacks {', '.join(missing)}",
            where=str(folder),
            expected="a folder with config.json and weights (*.safetensors or pytorch_model*.bin)",
            fix="copy or download the model whole; `phlora plan` and `phlora data` need no weights",
        )


def _missing_weights(folder: Path) -> list[str]:
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        shards = set(shards_of(index).values())
        return sorted(shard for shard in shards if not (folder / shard).is_file())
    found = [file.name for pattern in _WEIGHT_FILES for file in folder.glob(pattern)]
    if not found:
        return ["weights (*.safetensors)"]
    parts = [] if set(found) & set(_WHOLE_MODELS) else filter(None, map(_SHARD.fullmatch, found))
    return sorted(f"{part[1]}.{part[2]}.index.json" for part in parts)[:1]


def shards_of(index: Path) -> dict[str, str]:
    """Tensor -> file, as the index of a model in several files has it.

    Raises:
        ModelError: the index has no such thing.
    """
    shards = read_json(index, ModelError).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError("The index has no `weight_map` from tensors to files", where=str(index))
    return shards


@dataclass(frozen=True)
class Location:
    """What transformers' `from_pretrained` gets for a source."""

    source: ModelSource
    path: str
    kwargs: dict[str, Any]


def locate(source: ModelSource, *, offline: bool) -> Location:
    if source.kind == "embedded":
        return Location(source, str(embedded_folder(source.location)), {"local_files_only": True})
    if source.kind == "gguf":
        require(GGUF_FILE)
        file = Path(source.location)
        return Location(source, str(file.parent), {"gguf_file": file.name, "local_files_only": True})
    if source.kind == "folder":
        return Location(source, source.location, {"local_files_only": True})
    local_only = offline or not _hub_answers(source)
    if local_only:
        _require_cached(source)
    return Location(source, source.location, {"revision": source.revision, "local_files_only": local_only})


def _hub_answers(source: ModelSource) -> bool:
    """True when the hub has the model, False when the hub cannot be reached.

    One plain request: transformers' own first contact repeats itself for 23 s without a network.
    """
    try:
        with hub_errors(source):
            huggingface_hub.HfApi().model_info(
                source.location, revision=source.revision, timeout=_HUB_TIMEOUT_SECONDS
            )
    except NetworkError:
        return False
    return True


def _require_cached(source: ModelSource) -> None:
    try:
        cached = huggingface_hub.try_to_load_from_cache(
            source.location, "config.json", revision=source.revision
        )
    except huggingface_hub.errors.HFValidationError as error:
        raise ModelError(f"This is no name of a hub model: {error}", where=shown(source.location)) from None
    if not isinstance(cached, str):
        raise _unreachable(source)


def _unreachable(source: ModelSource) -> NetworkError:
    sibling = _sibling(Path(source.location))
    return NetworkError(
        f"The model `{source.location}` is neither on this machine nor can a hub be reached",
        expected="a network, or a copy in the local cache of huggingface_hub",
        fix=f"did you mean the folder `{sibling}`?"
        if sibling
        else f"download it once with a network, give a local folder, or take `{next(iter(EMBEDDED))}`",
    )


@contextlib.contextmanager
def hub_errors(source: ModelSource) -> Iterator[None]:
    """Map what huggingface_hub raises; the more special classes come first."""
    try:
        yield
    except GatedRepoError as error:
        raise _gated(source) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"`{source.location}` has no revision `{source.revision}`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _not_on_hub(source) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise _gated(source) from error
        raise NetworkError(f"The hub answered with status {status} for `{source.location}`") from error
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise _unreachable(source) from error


def _gated(source: ModelSource) -> ModelError:
    return ModelError(
        f"The hub gives `{source.location}` only to people whom its owner lets in",
        expected="an account with access, and its token on this machine",
        fix=f"ask for access on https://huggingface.co/{source.location}, then run `hf auth login` "
        "(`huggingface-cli login` in older versions) or set HF_TOKEN",
    )


def _not_on_hub(source: ModelSource) -> ModelError:
    sibling = _sibling(Path(source.location))
    return ModelError(
        f"There is no model `{source.location}`, neither here nor on the hub",
        fix=f"did you mean the folder `{sibling}`?"
        if sibling
        else "check the spelling; for a private model run `hf auth login` or set HF_TOKEN",
    )


@contextlib.contextmanager
def reading(location: Location, what: str) -> Iterator[None]:
    """Turn what transformers raises for unusable files into one `ModelError`."""
    try:
        with hub_errors(location.source), _quiet(location):
            yield
    except ImportError as error:
        raise EnvironmentProblem(f"{what} cannot be read ({first_line(error)})") from error
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise NoRoomError("The disk is full", where=location.source.location) from error
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError)):
                with hub_errors(location.source):
                    raise cause from None
            cause = cause.__cause__
        raise ModelError(
            f"{what} cannot be read ({first_line(error)})",
            where=location.source.location,
            fix="the file may be incomplete: copy or download it again",
        ) from error


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


@contextlib.contextmanager
def _quiet(location: Location) -> Iterator[None]:
    """No reports, and no bars but those of downloads: what matters is in errors and notes."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if location.source.kind != "hub":
        transformers_logging.disable_progress_bar()
    try:
        with silent_gguf() if location.source.kind == "gguf" else contextlib.nullcontext():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
