"""Adapters between loralib's file and PEFT's folder, or on to a merged model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from phlora.adapters.convert import BLOCK_NAMES, Adapter, BlockSizes
from phlora.adapters.loralib_file import read_loralib, write_loralib
from phlora.adapters.peft_folder import (
    read_peft,
    read_peft_config,
    read_peft_tensors,
    write_fitted,
    write_peft,
    write_peft_tensors,
)
from phlora.adapters.portable import is_of_other_layout
from phlora.config import ModelConfig
from phlora.errors import ConfigError, RunError
from phlora.export.merge import MergeReport, merge_run
from phlora.export.output import require_inside, require_new, require_room_for
from phlora.files import replaced_file, replaced_folder
from phlora.models.families import fused_row_blocks
from phlora.models.tokenizer import find_files
from phlora.parameters import require_choice, require_path
from phlora.runs.resolve import resolve_adapter

_LORALIB_SUFFIXES = (".pt", ".pth", ".bin")
# Configuration, tokenizer, chat template and card of an adapter; no optimizer states.
_SIDE_FILES = (".json", ".jinja", ".txt", ".model", ".md")
# A block-diagonal B of q, k and v is three times as wide.
_LARGEST_GROWTH = 3


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What was converted.

    Attributes:
        output: the folder or file that was written.
        format: `peft` or `loralib`.
        num_tensors: tensors of the input; every one was used.
        layers: how the layers of each kind have to be built in loralib to take the weights; empty for a copy.
    """

    output: str
    format: str
    num_tensors: int
    layers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for people."""
        head = f"{self.num_tensors} tensors converted to {self.format}: {self.output}"
        return "\n".join([head, *(f"  {line}" for line in self.layers)])


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: Literal["peft", "loralib"],
    lora_alpha: float | None = None,
    enable: Sequence[str] = (),
    blocks: BlockSizes | None = None,
    kernels: Mapping[str, Sequence[int]] | None = None,
    model: str | None = None,
    offline: bool = False,
) -> ConvertReport:
    """Convert an adapter between loralib's state dict and PEFT's folder without losing a bit.

    Args:
        source: a loralib file (`.pt`), a PEFT adapter folder, or a run folder (its best adapter is taken).
        output: a new folder (`peft`), or a new file (`loralib`).
        to: what to write.
        lora_alpha: that of the layers of a loralib file, which does not know it.
        enable: the row blocks that are adapted, such as `q` and `v`, where shapes leave several possibilities.
        blocks: last part of a layer's name -> rows of its blocks by name; by default those of `model`.
        kernels: last part of a convolution's name in a loralib file -> its kernel, (3, 3) for one of 3 x 3.
        model: the base model; its configuration gives the blocks, and its name is written down.
        offline: never ask a hub for that configuration.

    Raises:
        ModelError: the source is no adapter, cannot be opened safely, or has tensors without a place.
        ConfigError: `lora_alpha` or the blocks are missing, not needed, or do not fit.
        RunError: the output exists.
        NoRoomError: the disk has no room.
    """
    require_choice(to, ("peft", "loralib"), where="to")
    require_path(source, where="source", expected="an adapter or a run")
    require_path(output, where="output", expected="the new folder or file")
    source, output = Path(source).expanduser(), Path(output).expanduser()
    require_new(output)
    if to == "loralib" and output.is_dir():
        raise RunError("A folder stands where the file should be", where=str(output), fix="name a file")
    config = None
    if model is not None:
        config = find_files(ModelConfig(name=model, offline=offline), needs_weights=False).config
        blocks = fused_row_blocks(config) if blocks is None else blocks
    if _is_loralib(source):
        adapter = _read_loralib(source, lora_alpha, enable, blocks, kernels)
    else:
        _refuse_options(lora_alpha, () if to == "loralib" else enable, kernels)
        source = resolve_adapter(source, model=model, offline=offline, needs_base=False).adapter
        if to == "peft":
            return _copy_peft(source, output, config, base_model=model)
        adapter = read_peft(source, enable=enable, blocks=blocks)
    require_room_for(output, _LARGEST_GROWTH * sum(t.nbytes for t in adapter.tensors()))
    if to == "peft":
        with replaced_folder(output) as part:
            write_peft(adapter, part, base_model=model)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(output) as part:
            write_loralib(adapter, part)
    return ConvertReport(
        output=str(output), format=to, num_tensors=len(adapter.tensors()), layers=tuple(adapter.describe())
    )


def convert_to_model(
    source: str | Path,
    output: str | Path,
    *,
    lora_alpha: float | None = None,
    enable: Sequence[str] = (),
    blocks: BlockSizes | None = None,
    model: str | None = None,
    **how: Any,
) -> MergeReport:
    """`merge_run` (which takes `how`) for a loralib file too; the other arguments are those of `convert`."""
    if not _is_loralib(Path(source)):
        _refuse_options(lora_alpha, enable)
        return merge_run(source, output, model=model, **how)
    if model is None:
        raise ConfigError(
            "A loralib file does not say what its base model is",
            where=str(source),
            fix="name it: --model BASE",
        )
    options: dict[str, Any] = {"lora_alpha": lora_alpha, "enable": enable, "blocks": blocks}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        convert(source, folder, to="peft", model=model, offline=how.get("offline", False), **options)
        return replace(merge_run(folder, output, model=model, **how), adapter=str(source))


def parse_blocks(texts: Sequence[str]) -> dict[str, dict[str, int]] | None:
    """`qkv_proj=64,32,32` -> {"qkv_proj": {"q_proj": 64, "k_proj": 32, "v_proj": 32}}; None for no text.

    Blocks of a layer whose blocks have no known names are called 0, 1, 2 ...

    Raises:
        ConfigError: a text of another form, or another number of blocks than the layer has.
    """
    parsed = {}
    for text in texts:
        layer, _, listed = text.partition("=")
        sizes = [int(size) if size.strip().isdecimal() else 0 for size in listed.split(",")]
        names = BLOCK_NAMES.get(layer) or tuple(str(i) for i in range(len(sizes)))
        if not layer or min(sizes) < 1 or len(names) != len(sizes):
            raise ConfigError(
                f"`{text}` was given",
                where="--blocks",
                expected=f"a layer and the rows of its blocks ({', '.join(names)}), "
                "such as qkv_proj=3072,1024,1024",
            )
        parsed[layer] = dict(zip(names, sizes, strict=True))
    return parsed or None


def parse_kernels(texts: Sequence[str]) -> dict[str, tuple[int, ...]] | None:
    """`conv1=3,3` -> {"conv1": (3, 3)}; None for no text.

    Raises:
        ConfigError: a text of another form.
    """
    parsed = {}
    for text in texts:
        layer, _, listed = text.partition("=")
        kernel = tuple(int(size) if size.strip().isdecimal() else 0 for size in listed.split(","))
        if not layer or min(kernel) < 1 or len(kernel) > 3:
            raise ConfigError(
                f"`{text}` was given",
                where="--kernel",
                expected="a convolution and the sizes of its kernel, such as conv1=3,3",
            )
        parsed[layer] = kernel
    return parsed or None


def _refuse_options(
    lora_alpha: float | None, enable: Sequence[str], kernels: Mapping[str, Sequence[int]] | None = None
) -> None:
    if kernels:
        raise ConfigError("An adapter folder knows its own kernels", where="--kernel", fix="leave it out")
    if lora_alpha is not None:
        raise ConfigError(
            "An adapter folder knows its own lora_alpha", where="--lora-alpha", fix="leave it out"
        )
    if enable:
        raise ConfigError(
            "An adapter folder is plain PEFT, which knows no blocks", where="--enable", fix="leave it out"
        )


def _is_loralib(source: Path) -> bool:
    source = source.expanduser()
    return source.is_file() or (source.suffix in _LORALIB_SUFFIXES and not source.is_dir())


def _read_loralib(
    file: Path,
    lora_alpha: float | None,
    enable: Sequence[str],
    blocks: BlockSizes | None,
    kernels: Mapping[str, Sequence[int]] | None = None,
) -> Adapter:
    if lora_alpha is None:
        raise ConfigError(
            "A loralib file does not say with which lora_alpha its layers were built",
            where=str(file),
            fix="name it: --lora-alpha 32",
        )
    return read_loralib(file, lora_alpha=lora_alpha, enable=enable, blocks=blocks, kernels=kernels)


def _copy_peft(source: Path, output: Path, base: Any, *, base_model: str | None) -> ConvertReport:
    """What is saved is plain PEFT already; a pickle becomes safetensors, its layout that of a base that is named."""
    read_peft_config(source)
    tensors = read_peft_tensors(source)
    layers = {name.partition(".lora_")[0] for name in tensors}
    require_room_for(output, _LARGEST_GROWTH * sum(t.nbytes for t in tensors.values()))
    with replaced_folder(output) as part:
        for file in sorted(source.iterdir()):
            if file.suffix in _SIDE_FILES and file.is_file():
                shutil.copy(require_inside(file, source), part)
        if base is not None and is_of_other_layout(layers, base):
            write_fitted(source, part, base, base_model=base_model)
        else:
            write_peft_tensors(tensors, part)
    return ConvertReport(output=str(output), format="peft", num_tensors=len(tensors))
