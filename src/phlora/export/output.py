"""What a merge or a conversion writes: only where nothing stands yet, and only where it fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from phlora.errors import ModelError, RunError
from phlora.files import clear_leftovers, read_json, require_room, write_json
from phlora.models.tokenizer import LoadedTokenizer

# Tokenizer, configuration and report, which do not grow with the model.
_SMALL_FILES_BYTES = 50_000_000
# What nobody wrote to for so long was left by a process that was killed.
_ABANDONED_SECONDS = 3600


def require_new(output: Path) -> None:
    """Refuse an output that exists: nobody's files are replaced. What a killed export left half-written beside it goes.

    Raises:
        RunError: a file, or a folder that is not empty.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise RunError("The output exists already", where=str(output), fix="name another --output")
    with suppress(OSError):
        clear_leftovers(output.absolute().parent, only=output.name, idle_seconds=_ABANDONED_SECONDS)


def require_inside(file: Path, folder: Path) -> Path:
    """A file of a folder that is copied, refused where it is a link to somewhere else: private files would go along.

    Raises:
        ModelError: it leads out of the folder, and not into the `blobs` of a hub's cache.
    """
    place, real = folder.resolve(), file.resolve()
    cache = [above.parent / "blobs" for above in place.parents if above.name == "snapshots"]
    if not any(real.is_relative_to(root) for root in (place, *cache)):
        raise ModelError(
            f"{file.name} is a link out of the folder, so it is not copied",
            where=str(file),
            fix="replace it by the file itself, or remove it",
        )
    return file


def require_room_for(output: Path, tensor_bytes: int) -> None:
    """Refuse an output that does not fit.

    Raises:
        NoRoomError: less free disk than the tensors and their small companions take.
    """
    require_room(
        output,
        tensor_bytes + _SMALL_FILES_BYTES,
        what="The output",
        fix="make room, or name an --output on another disk",
    )


def save_model(model: Any, tokenizer: LoadedTokenizer, folder: Path) -> None:
    """Everything that stock transformers needs to load the model and to end its replies."""
    pad = tokenizer.tokenizer.pad_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = pad
    model.generation_config.eos_token_id = list(tokenizer.stop_token_ids)
    if type(model).__module__.startswith("transformers."):
        # It would point to code files that are not in the folder.
        vars(model.config).pop("auto_map", None)
    with no_bars():
        model.save_pretrained(folder)
    _spell_rotation_twice(folder / "config.json")
    tokenizer.tokenizer.save_pretrained(folder)


def _spell_rotation_twice(file: Path) -> None:
    """Beside transformers 5's `rope_parameters` the older keys, which are all that many converters and servers read."""
    config = read_json(file, ModelError)
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        # None, or one for each kind of layer, for which there never was an older spelling.
        return
    config.setdefault("rope_theta", rope["rope_theta"])
    if "partial_rotary_factor" in rope:
        config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    if rope.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", {**rope, "type": rope["rope_type"]})
    write_json(file, config)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' own progress bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
