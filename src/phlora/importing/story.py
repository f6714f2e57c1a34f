"""A configuration of another tool becomes one of Phlora's: read, recognised, mapped, checked, written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phlora.config import build_config
from phlora.config_values import read_mapping
from phlora.errors import ConfigError, InputError
from phlora.importing import axolotl, llamafactory, torchtune, unsloth
from phlora.importing.recognise import TOOLS, tool_of
from phlora.importing.settings import LeftOut, Mapped, Settings, flattened, said
from phlora.importing.written import as_values, as_yaml


@dataclass(frozen=True)
class ImportedConfig:
    """A configuration that was read from another tool's file.

    Attributes:
        tool: as people call it.
        file: that was read.
        config: as nested mappings, which `phlora.load_config` reads.
        mapped: each value of it, and where it comes from.
        left_out: settings that have no place in it, and why.
        notes: what a person should look at.
        text: it as YAML, with all of that as comments.
    """

    tool: str
    file: str
    config: dict[str, Any]
    mapped: tuple[Mapped, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    text: str = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values, without the text."""
        return {
            "tool": self.tool,
            "file": self.file,
            "config": self.config,
            "mapped": [
                {"target": one.target, "value": one.value, "source": one.source, "remark": one.remark}
                for one in self.mapped
            ],
            "left_out": [{"source": one.source, "value": one.value, "why": one.why} for one in self.left_out],
            "notes": list(self.notes),
        }


def import_config(
    file: str | Path, *, tool: str | None = None, dataset_info: str | Path | None = None
) -> ImportedConfig:
    """Read a configuration of LLaMA-Factory, Axolotl, torchtune or Unsloth Studio as one of Phlora's.

    Every setting is mapped, left out with a reason, or refused. Defaults of the tool that Phlora does not share are
    written out, so that the same is trained.

    Args:
        file: YAML or JSON.
        tool: a key of `phlora.importing.recognise.TOOLS`; by default the names in the file tell.
        dataset_info: LLaMA-Factory's dataset_info.json; by default it is looked for in the `dataset_dir` of the file.

    Raises:
        ConfigError: no tool is known by these names, a value is wrong, or something else than a LoRA adapter on chats
            would be trained.
    """
    values = read_mapping(file)
    flat = flattened(values)
    name = tool_of(values, flat, file=str(file), asked=tool)
    if name in ("torchtune", "unsloth"):
        taken = torchtune.resolve_references(flat) if name == "torchtune" else flat
    else:
        taken = said(values)
    settings = Settings(TOOLS[name], str(file), dict(taken))
    _MAPPERS[name](settings, None if dataset_info is None else Path(dataset_info))
    config = as_values(settings.mapped)
    try:
        build_config(config)
    except InputError as error:
        raise ConfigError(
            f"What it says makes no run: {error.found}",
            where=f"{file}: {error.where}",
            expected=error.expected,
            fix=error.fix,
        ) from None
    title = f"From {TOOLS[name]}'s {Path(file).name}, by `phlora import-config`."
    return ImportedConfig(
        tool=TOOLS[name],
        file=str(file),
        config=config,
        mapped=tuple(settings.mapped.values()),
        left_out=tuple(settings.left),
        notes=tuple(settings.notes),
        text=as_yaml(title, settings.mapped, settings.left, settings.notes),
    )


_MAPPERS: dict[str, Callable[[Settings, Path | None], None]] = {
    "llamafactory": lambda settings, info: llamafactory.map_settings(settings, dataset_info=info),
    "axolotl": lambda settings, _: axolotl.map_settings(settings),
    "torchtune": lambda settings, _: torchtune.map_settings(settings),
    "unsloth": lambda settings, _: unsloth.map_settings(settings),
}
