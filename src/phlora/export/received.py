"""An exported folder that lay about: export.json by its keys, files by size and digest, before anything opens it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from phlora.errors import Finding, PhloraError, RunError, shown
from phlora.export.gguf_types import TYPES
from phlora.export.job import Written
from phlora.export.targets import TARGETS, Target
from phlora.files import Expected, is_count, is_text, read_json, require_values
from phlora.models.device import DTYPES

EXPORT_FILE = "export.json"
CARD = "README.md"
# People write into the card, and every verdict is kept in both.
_NOT_COMPARED = (EXPORT_FILE, CARD)
_BASES = ("full", "dequantized")
# Endings of what the clients read.
_READ = (".json", ".jinja", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".model", ".py", "Modelfile")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
_NEEDED: Mapping[Target, tuple[str, ...]] = {
    "peft": _ADAPTER_FILES,
    "vllm": _ADAPTER_FILES,
    "sglang": _ADAPTER_FILES,
    "merged": ("config.json", ".safetensors", "tokenizer.json"),
    "gguf": (".gguf",),
    "ollama": (".gguf", "Modelfile"),
    "loralib": (".pt",),
}


@dataclass(frozen=True, kw_only=True)
class Received:
    """What export.json says of its folder.

    Attributes:
        files: names and bytes.
        digests: names and SHA-256 of all but the card.
        notes: what the user should hear.
    """

    target: Target
    written: Written
    files: dict[str, int]
    digests: dict[str, str]
    notes: tuple[str, ...]


def digests_of(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of each file that clients read."""
    return {
        file.name: _digest(file)
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in _NOT_COMPARED
    }


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_export(folder: Path) -> Received:
    """What export.json says, each value as an export writes it.

    Raises:
        RunError: there is none, or it holds something else.
    """
    file = folder / EXPORT_FILE
    if not file.is_file():
        raise RunError(
            "The folder holds no export",
            where=str(folder),
            expected=f"one with {EXPORT_FILE}, of phlora export",
        )
    said = read_json(file, RunError)
    require_values(said, _EXPECTED, RunError, where=str(file))
    missing = [key for key in _EXPECTED if said.get(key) is None]
    if missing:
        raise RunError(f"There is no `{missing[0]}`", where=str(file), fix="export it again")
    target: Target = said["target"]
    _require_type(target, said["type"], said["rank"], file)
    names = set(said["digests"])
    if names - set(said["files"]) or set(said["files"]) - names - set(_NOT_COMPARED):
        raise RunError("`files` and `digests` name other files", where=str(file), fix="export it again")
    absent = next((n for n in _NEEDED[target] if not any(name.endswith(n) for name in names)), "")
    if absent:
        raise RunError(f"`files` names no {absent}", where=str(file), fix="export it again")
    main = next((name for name in sorted(names) if name.endswith((".gguf", ".pt"))), "")
    return Received(
        target=target,
        written=Written(file=main, rank=said["rank"], type=said["type"], base=said["base"], received=True),
        files=said["files"],
        digests=said["digests"],
        notes=tuple(said["notes"]),
    )


def _is_name(value: Any) -> bool:
    """Of a file in the folder itself."""
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0\n")


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_name(k) and is_count(v) for k, v in value.items())


def _is_digests(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_name(k) and is_text(v) for k, v in value.items())


def _is_notes(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


_EXPECTED: Expected = {
    "target": (lambda value: is_text(value) and value in get_args(Target), " or ".join(TARGETS)),
    "type": (is_text, "a type, or an empty text"),
    "base": (lambda value: is_text(value) and value in _BASES, " or ".join(_BASES)),
    "rank": (is_count, "a rank, or 0"),
    "files": (_is_files, "names of files in the folder, with their bytes"),
    "digests": (_is_digests, "names of files in the folder, with their SHA-256"),
    "notes": (_is_notes, "a list of texts"),
}


def _require_type(target: Target, type: str, rank: int, file: Path) -> None:
    whole_gguf = target == "ollama" or (target == "gguf" and not rank)
    known = TYPES if whole_gguf else DTYPES if target == "merged" else ("",)
    if type not in known:
        raise RunError(
            f"`type` is {shown(type)} for {target}",
            where=str(file),
            expected=" or ".join(known) if whole_gguf or target == "merged" else "an empty text",
            fix="export it again",
        )


def what_changed(folder: Path, said: Received) -> str:
    """How the files differ from those that were exported; empty where they do not."""
    for name, digest in said.digests.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        size, was = file.stat().st_size, said.files[name]
        if size != was:
            return f"{name} is not what was exported: it has {size:,} bytes, and had {was:,}"
        if _digest(file) != digest:
            return f"{name} is not what was exported: its digest is another"
    for file in sorted(folder.iterdir()):
        if file.name not in {*said.digests, *_NOT_COMPARED} and file.name.endswith(_READ):
            return f"{file.name} was not exported"
    return _other_type(folder, said)


def _other_type(folder: Path, said: Received) -> str:
    """What the main file says of itself against what export.json says."""
    written = said.written
    try:
        if said.target in ("gguf", "ollama"):
            found = _gguf_type(folder / written.file)
        elif said.target == "merged":
            found = _merged_types(folder)
        else:
            return ""
    except Exception as error:  # a reader's, of a file of which nothing is known
        return f"what was exported cannot be read ({_first_line(error)})"
    if (written.type or "adapter") not in found:
        return (
            f"export.json says {written.type or 'adapter'}, and the file {' and '.join(found) or 'nothing'}"
        )
    return ""


def _gguf_type(file: Path) -> tuple[str, ...]:
    import gguf

    reader = gguf.GGUFReader(file)
    kind = reader.get_field("general.type")
    if kind is not None and kind.contents() == "adapter":
        return ("adapter",)
    number = reader.get_field("general.file_type")
    return tuple(name for name, (_, n) in TYPES.items() if number is not None and n == number.contents())


def _merged_types(folder: Path) -> tuple[str, ...]:
    from safetensors import safe_open

    short = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    kinds = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            kinds |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return tuple(sorted(short.get(kind, kind) for kind in kinds))


def refused(error: Exception, folder: Path) -> Finding:
    """The finding for what a client raises over a folder that lay about."""
    return Finding(
        f"What was exported cannot be opened ({_first_line(error)})", where=str(folder), fix="export it again"
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, PhloraError):
        return f"{error.found}"
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
