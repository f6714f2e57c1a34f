"""What was asked for: the arguments of `finetune`, or a `RunConfig`, as one configuration."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phlora.config import RunConfig, build_config
from phlora.errors import ConfigError, EnvironmentProblem

IN_MEMORY = "(in memory)"


@dataclass(frozen=True)
class Objects:
    """Rows that were handed over as Python objects; None where files are read."""

    train: Any = None
    held_out: Any = None


def require_one_process() -> None:
    """A run folder has one writer.

    Raises:
        EnvironmentProblem: a launcher started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EnvironmentProblem(
            f"A launcher started {os.environ['WORLD_SIZE']} processes; a Phlora run is one process",
            fix="start it without the launcher, or use phlora.SFTTrainer in a script of your own, as in "
            "examples/sample_finetune.py, which accelerate can launch",
        )


def collect_config(config: RunConfig | None, arguments: Mapping[str, Any]) -> tuple[RunConfig, Objects]:
    """One configuration from either a `RunConfig` or the arguments of `finetune`.

    Raises:
        ConfigError: both were given, or neither says what to train on.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if config is not None:
        if given:
            raise ConfigError(
                f"Both `config` and {', '.join(f'`{n}`' for n in given)} were given", fix="give one"
            )
        return _take_output_dir(config), Objects()
    objects = Objects(
        *(given.pop(name) if _is_rows(given.get(name)) else None for name in ("data", "eval_data"))
    )
    data = given.pop("data", None)
    section = (
        dict(data)
        if isinstance(data, Mapping)
        else {"files": data or ([IN_MEMORY] if objects.train is not None else None)}
    )
    if "eval_data" in given:
        section["eval"] = given.pop("eval_data")
    elif objects.held_out is not None:
        section["eval"] = [IN_MEMORY]
    values = {**given, "data": {key: _paths(value) for key, value in section.items()}}
    if isinstance(values.get("model"), Path):
        values["model"] = str(values["model"])
    if section.get("files") is None:
        raise ConfigError("`data` is missing", expected="file(s), a `datasets.Dataset` or a list of rows")
    origins = {name: "argument" for name in (*given, "data")}
    config = _take_output_dir(build_config(values, origins))
    if "output" not in given and config.output == RunConfig.output:
        stem = "run" if objects.train is not None else Path(config.data.files[0].path).stem
        config = dataclasses.replace(config, output=str(Path("runs") / stem))
    return config, objects


def _take_output_dir(config: RunConfig) -> RunConfig:
    """`training_config.output_dir`, as scripts have it, names the run folder unless `output` does."""
    settings = dict(config.training_config)
    named = settings.pop("output_dir", None)
    if named and config.output == RunConfig.output:
        config = dataclasses.replace(config, output=str(named))
    return dataclasses.replace(config, training_config=settings)


def _is_rows(value: Any) -> bool:
    """Whether rows themselves were given, rather than the name of a file or several."""
    if value is None or isinstance(value, str | Path | Mapping):
        return False
    if isinstance(value, list | tuple):
        return bool(value) and isinstance(value[0], Mapping) and "path" not in value[0]
    return True


def _paths(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_paths(entry) for entry in value] if isinstance(value, list | tuple) else value
